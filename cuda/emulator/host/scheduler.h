// The machine itself: the threads of the block that is running, and which of them runs next. machine.h says what it does.
#pragma once

#include <cstdarg>
#include <vector>

#include "fiber.h"
#include "group_queue.h"
#include "machine.h"
#include "shared_memory.h"
#include "watch.h"

namespace emulator {

enum class State : unsigned char { Ready, InWarpOperation, AtBarrier, Exited };

struct Thread {
    ExecutionState execution;
    uint3 index;
    State state;
    Site waits_at;
    GroupQueue<Copy> copies;
    GroupQueue<Product> products;
};

struct Warp {
    struct Lane {
        unsigned mask;
        WarpOperation operation;
        const char* name;
        void* argument;
    };
    unsigned present;  // lanes that exist, as a bit mask
    unsigned ready;
    unsigned waiting;  // in a warp operation
    unsigned exited;
    Lane lanes[LANES];
};

class Machine {
 public:
    bool run(const Launch& launch, Fault& fault);

    void block_barrier(Site site);
    void warp_collective(unsigned mask, WarpOperation operation, void* argument, const char* name, Site site);
    [[noreturn]] void fail(FaultKind kind, const char* format, va_list arguments);

    const Launch& launch() const { return *launch_; }
    uint3 block() const { return block_; }
    unsigned current() const { return current_; }
    Thread& thread() { return threads_[current_]; }
    bool is_in_a_thread() const { return is_in_a_thread_; }
    char* stack_bottom() const { return stacks_.bottom(current_); }
    unsigned lane() const { return current_ % LANES; }
    SharedMemory& shared() { return shared_; }
    Watch& watch() { return watch_; }
    const Stacks& stacks() const { return stacks_; }
    std::vector<Site>& met() { return met_; }
    uint64_t random();

 private:
    static void thread_main();
    void run_block(uint64_t number);
    void prepare_threads();
    void run_warp(Warp& warp, unsigned first_thread);
    void resume(unsigned thread);
    void wait_for_others();
    void set_state(unsigned thread, State state);
    unsigned choose_warp();
    void release_barrier();
    void report_deadlock();
    void report(FaultKind kind, const char* format, va_list arguments);
    __attribute__((format(printf, 3, 4))) void report(FaultKind kind, const char* format, ...);
    unsigned warps() const { return (launch_->threads + LANES - 1) / LANES; }

    const Launch* launch_ = nullptr;
    Fault* fault_ = nullptr;
    uint3 block_{};
    unsigned current_ = 0;
    unsigned alive_ = 0;
    unsigned at_barrier_ = 0;
    bool is_in_a_thread_ = false;
    uint64_t random_ = 0;
    ExecutionState scheduler_;
    Stacks stacks_;
    std::vector<Thread> threads_;
    Warp warps_[MAX_THREADS / LANES];
    SharedMemory shared_;
    Watch watch_;
    std::vector<Site> met_;
};

// The machine whose kernel the calling OS thread is running. `__thread`: no initialization to be checked at each use.
extern __thread Machine* machine;

// The file's name without folders, for messages.
const char* base_name(const char* path);

}  // namespace emulator
