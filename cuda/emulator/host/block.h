// One block of CUDA threads played by fibers, and what those threads ask of it: barriers, warp operations, shared memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "fiber.h"
#include "vector_types.h"

namespace emulator {

enum class State : uint8_t { READY, IN_WARP_OPERATION, AT_BARRIER, EXITED };

// A warp operation, done for all its lanes at once by the last lane to arrive. `operands[i]` is what lane i handed over, null
// where the lane is not in `lanes`.
using WarpOperation = void (*)(void* const* operands, unsigned lanes);

// A copy of 16 bytes to shared memory that has been started and has not landed; zeros where `from` is null.
struct PendingCopy {
    void* to;
    const void* from;
};

struct Thread {
    ExecutionState execution;
    State state = State::READY;
    unsigned index = 0;
    uint3 thread_idx = {};
    // The warp operation it waits in.
    WarpOperation operation = nullptr;
    unsigned lanes = 0;
    void* operand = nullptr;
    // Copies in the order they were started, and how many of them each closed group covers.
    std::vector<PendingCopy> copies;
    std::vector<size_t> group_ends;
};

// How the threads of a block take turns.
enum class Order : int { FORWARD, REVERSE, RANDOM };

struct Kernel {
    std::string name;
    unsigned threads;
    unsigned argument_count;
    void (*invoke)(const void* const* arguments);
};

struct Launch {
    const Kernel* kernel;
    dim3 grid;
    size_t dynamic_bytes;
    Order order;
    uint64_t seed;
    const void* const* arguments;
};

// Runs the blocks of a launch one after another on the calling thread. Returns an empty string, or what went wrong in the
// first block that failed; the blocks after it do not run then.
std::string run(const Launch& launch);

// The thread that is running and the indices of its block. Only valid inside a kernel.
extern __thread Thread* current_thread;
extern __thread uint3 current_block_idx;
extern __thread dim3 current_block_dim;
extern __thread dim3 current_grid_dim;

// __syncthreads().
void wait_at_barrier();

// Joins `operation` with the other lanes of the warp that are in `lanes`, and returns when it has been done.
void join_warp_operation(unsigned lanes, WarpOperation operation, void* operand);

// The shared array declared at `site`, the same memory for every thread of the block.
void* shared_array(const void* site, size_t bytes);

void* dynamic_shared_memory();

// Ends the launch with a report.
[[noreturn]] void fault(const char* what);

}  // namespace emulator
