// The machine that runs a kernel on the host: a block at a time, one fiber per thread, on the OS thread that calls `run`.
//
// A thread runs until it has to wait (for a barrier or for the other lanes of its warp), exits, or breaks a rule. The last
// lane to arrive at a warp operation does the whole operation. Which thread runs next is the launch's `Order`; an order runs
// one warp as far as it gets before it turns to another, so that a missing barrier meets the greatest possible distance.
#pragma once

#include <cstddef>
#include <cstdint>

#include "fault.h"
#include "vector_types.h"

namespace emulator {

struct Order {
    enum Kind : unsigned { Forward = 0, Reverse = 1, Random = 2 };
    Kind kind = Forward;
    uint64_t seed = 0;
};

// Device memory that a watched kernel may touch.
struct MemoryRange {
    const void* begin;
    size_t bytes;
};

struct Launch {
    unsigned threads = 0;
    dim3 grid;
    size_t shared_bytes = 0;
    // The shared memory that a block may have where the kernel is to run.
    size_t shared_limit = 0;
    Order order;
    // The synchronization at this place does nothing: how tests see that they would notice its absence.
    Site removed;
    // Follow every access to memory: only for kernels compiled for it, see compiler_calls.cpp.
    bool watched = false;
    const MemoryRange* memory = nullptr;
    size_t memory_count = 0;
    // The kernel with its arguments.
    void (*body)(const void* arguments) = nullptr;
    const void* arguments = nullptr;
};

constexpr unsigned MAX_THREADS = 1024;
constexpr unsigned LANES = 32;

// Runs a kernel to its end. False if it broke a rule, which `fault` then tells.
// `visit`, if given, receives each place in the source where the kernel synchronized, once.
bool run(const Launch& launch, Fault& fault, void (*visit)(void* context, Site site) = nullptr, void* context = nullptr);

// What follows is called from within kernels, by way of cuda_on_host.h, tensor_core_on_host.h and
// warpgroup_on_host.h.

// These are fixed while a thread lives, which `const` tells the compiler.
__attribute__((const)) uint3 thread_index();
__attribute__((const)) uint3 block_index();
__attribute__((const)) dim3 block_size();
__attribute__((const)) dim3 grid_size();

void block_barrier(Site site);
void warp_barrier(unsigned mask, Site site);

enum class Shuffle { FromLane, Up, Down, Xor };
uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t value, int operand, int width, Site site);
unsigned ballot(unsigned mask, bool predicate, Site site);

// Waits for all lanes of `mask`; `operation` then runs once, with the argument of each lane by its number.
using WarpOperation = void (*)(void* const* arguments, unsigned mask);
void warp_collective(unsigned mask, WarpOperation operation, void* argument, const char* name, Site site);

void* shared_array(const void* declaration, const char* name, size_t bytes);
void* dynamic_shared();

// True where the launch asks to leave this synchronization out; otherwise notes that it was met.
bool is_removed(Site site);

// What a thread does to memory. A copy (cp.async) owns its destination from its start to its end.
enum class Access { Read, Write, Atomic, StartCopy, EndCopy };

// Reports an access of the calling thread; does nothing unless the launch is watched.
void watch_access(Access access, const void* address, size_t bytes);
// The same for what a warp operation does on behalf of another lane of the calling thread's warp.
void watch_access_of_lane(unsigned lane, Access access, const void* address, size_t bytes);

// True if an asynchronous copy shall land at once; otherwise it lands as late as its wait allows.
bool copy_lands_at_once();

// The copies that the calling thread has under way.
template <typename Work>
class GroupQueue;
struct Copy;
GroupQueue<Copy>& copies_of_this_thread();

// True if a product of a warpgroup shall be over at once; otherwise it is computed as late as its wait allows.
bool products_end_at_once();

// The products of warpgroups that the calling thread has under way.
struct Product;
GroupQueue<Product>& products_of_this_thread();

// Ends the launch with a fault of the calling thread.
[[noreturn]] __attribute__((format(printf, 2, 3))) void fail(FaultKind kind, const char* format, ...);

}  // namespace emulator
