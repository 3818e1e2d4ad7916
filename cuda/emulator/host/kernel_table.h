// What the Rust side knows of a kernel. build.rs writes one table for each kernel file, with ENTRY for each kernel in it.
#pragma once

#include <utility>

#include "machine.h"

namespace emulator {

// The layout is that of `Entry` in src/kernels.rs.
struct Entry {
    const char* name;
    unsigned threads;
    unsigned argument_count;
    const unsigned char* argument_bytes;
    // Runs one thread; `arguments` points to an array of pointers, one to each argument's value, as cuLaunchKernel takes them.
    void (*body)(const void* arguments);
};

template <auto kernel>
struct Signature;

template <typename... Arguments, void (*kernel)(Arguments...)>
struct Signature<kernel> {
    static constexpr unsigned COUNT = sizeof...(Arguments);
    static constexpr unsigned char BYTES[COUNT + 1] = {sizeof(Arguments)..., 0};

    __attribute__((no_sanitize("thread"))) static void run(const void* arguments) {
        call(static_cast<const void* const*>(arguments), std::index_sequence_for<Arguments...>());
    }

 private:
    // The arguments are the host's own memory, which a watched kernel may not touch.
    template <size_t... I>
    __attribute__((no_sanitize("thread"))) static void call(const void* const* arguments, std::index_sequence<I...>) {
        kernel(*static_cast<const Arguments*>(arguments[I])...);
    }
};

}  // namespace emulator

#define ENTRY(kernel)                                                                                              \
    emulator::Entry {                                                                                              \
        #kernel, threads_of_##kernel, emulator::Signature<kernel>::COUNT, emulator::Signature<kernel>::BYTES,      \
            emulator::Signature<kernel>::run                                                                       \
    }
