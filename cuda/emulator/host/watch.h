// Follows every access of a watched kernel to memory and finds what the order of the threads may hide:
//
// - a race: two threads at one byte, at least one writing, with no barrier between them. __syncthreads() orders the threads of
//   a block, __syncwarp() those of a warp; nothing orders two blocks. A byte on its way by cp.async belongs to nobody.
// - a read of shared memory that the block has not written.
// - an access outside of the arguments' buffers, or across the end of a shared array.
//
// The accesses come from the calls that the compiler puts into a watched kernel, see compiler_calls.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "machine.h"
#include "shared_memory.h"

namespace emulator {

class Watch {
 public:
    void begin_launch(const MemoryRange* memory, size_t count, const SharedMemory& shared);
    void begin_block();

    // All threads of the block, or of the warp, have met.
    void order_block();
    void order_warp(unsigned warp);

    // To be called by the thread that accesses. Does not return if the access is a fault.
    void check(Access access, const void* address, size_t bytes, unsigned thread);

 private:
    // What is known of one byte. Times count synchronizations; 0 stands for never.
    struct Cell {
        uint32_t write_time;
        uint32_t read_time;
        uint16_t writer;
        uint16_t reader;
    };
    struct Buffer {
        const char* begin;
        size_t bytes;
        std::unique_ptr<Cell[], void (*)(void*)> cells;
    };
    struct Place {
        Access access;
        const void* address;
        size_t bytes;
        unsigned thread;
        const SharedMemory::Array* array;  // null: global memory
    };

    Buffer* find_buffer(const char* address, size_t bytes);
    void check_byte(Cell& cell, const Place& place);
    bool is_concurrent(uint32_t time, unsigned other, const Place& place) const;
    bool is_concurrent_reader(const Cell& cell, const Place& place) const;
    void note_reader(Cell& cell, unsigned thread) const;
    bool is_of_another_block(uint32_t time) const { return time != 0 && time < block_begin_; }
    [[noreturn]] void fail_outside(const Place& place);
    [[noreturn]] void fail_race(const char* what, unsigned other, bool is_other_block, const Place& place);

    const SharedMemory* shared_ = nullptr;
    std::vector<Cell> shared_cells_;
    std::vector<Buffer> buffers_;
    uint32_t time_ = 0;
    uint32_t block_begin_ = 0;
    uint32_t block_ordered_ = 0;                       // what happened earlier is ordered for the whole block
    uint32_t warp_ordered_[MAX_THREADS / LANES] = {};  // and for each warp
};

// Where the access that is checked happens: the thread's last synchronization. Defined by kernel_calls.cpp.
Site last_synchronization();

// True if `address` lies on the stack of a kernel thread. Defined by kernel_calls.cpp.
bool is_on_a_stack(const void* address);

}  // namespace emulator
