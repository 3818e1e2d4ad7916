// Stands in for the libraries of CUDA until they are loaded: every function of theirs is defined here as a jump to where the
// library has it, or to a function that returns an error.
//
// A program that links a library by name does not start where that is missing, and a driver's library is missing wherever there
// is no driver. cuda_functions.inc is made by build.rs out of the toolkit's headers.

#include <dlfcn.h>
#include <stddef.h>
#include <stdio.h>

enum { LIBRARY_COUNT = 5 };

#define LIBRARY(index, file, error) \
    static int not_loaded_##index(void) { return error; }
#define FUNCTION(index, name)
#include "cuda_functions.inc"
#undef LIBRARY
#undef FUNCTION

static const char* const files[] = {
#define LIBRARY(index, file, error) [index] = file,
#define FUNCTION(index, name)
#include "cuda_functions.inc"
#undef LIBRARY
#undef FUNCTION
};

// Where each function is.
#define LIBRARY(index, file, error)
#define FUNCTION(index, name) \
    __attribute__((visibility("hidden"))) void* qlora_address_of_##name = (void*)not_loaded_##index;
#include "cuda_functions.inc"
#undef LIBRARY
#undef FUNCTION

#if defined(__x86_64__)
#define JUMP(name) "jmp *qlora_address_of_" name "(%rip)\n"
#elif defined(__aarch64__)
#define JUMP(name)                             \
    "adrp x16, qlora_address_of_" name "\n"    \
    "ldr x16, [x16, :lo12:qlora_address_of_" name "]\n" \
    "br x16\n"
#else
#error "the loader knows x86-64 and aarch64"
#endif

#define LIBRARY(index, file, error)
#define FUNCTION(index, name)                                                  \
    __asm__(".text\n.globl " #name "\n.type " #name ", %function\n" #name ":\n" \
            JUMP(#name) ".size " #name ", . - " #name "\n");
#include "cuda_functions.inc"
#undef LIBRARY
#undef FUNCTION

struct entry {
    int library;
    const char* name;
    void** address;
};

static const struct entry entries[] = {
#define LIBRARY(index, file, error)
#define FUNCTION(index, name) {index, #name, &qlora_address_of_##name},
#include "cuda_functions.inc"
#undef LIBRARY
#undef FUNCTION
};

// Where the libraries lie if the system does not find them by their names: in the toolkit that this was built with, or in the
// usual one.
static const char* const folders[] = {TOOLKIT_LIBRARIES, "/usr/local/cuda/lib64"};

// The library, or NULL and why the system did not find it.
static void* open_library(const char* file, char* problem, size_t capacity) {
    void* library = dlopen(file, RTLD_NOW | RTLD_GLOBAL);
    if (library == NULL) {
        snprintf(problem, capacity, "%s", dlerror());
    }
    for (size_t i = 0; library == NULL && i < sizeof(folders) / sizeof(folders[0]); i++) {
        char path[4096];
        snprintf(path, sizeof(path), "%s/%s", folders[i], file);
        library = dlopen(path, RTLD_NOW | RTLD_GLOBAL);
    }
    return library;
}

// Loads the libraries. Returns 1, or 0 and why the first one that cannot be loaded cannot.
int qlora_load_cuda(char* problem, size_t capacity) {
    void* libraries[LIBRARY_COUNT];
    for (int i = 0; i < LIBRARY_COUNT; i++) {
        libraries[i] = open_library(files[i], problem, capacity);
        if (libraries[i] == NULL) {
            return 0;
        }
    }
    // A word of a header that is no function of the library stays with its error.
    for (size_t i = 0; i < sizeof(entries) / sizeof(entries[0]); i++) {
        void* const address = dlsym(libraries[entries[i].library], entries[i].name);
        if (address != NULL) {
            *entries[i].address = address;
        }
    }
    return 1;
}
