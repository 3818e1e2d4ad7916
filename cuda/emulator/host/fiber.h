// A fiber: a stack of its own and the place where its execution stands. One fiber plays one CUDA thread.
#pragma once

#include <cstddef>

#if defined(__x86_64__) && !defined(EMULATOR_UCONTEXT)
#define EMULATOR_ASM_SWITCH 1
#else
#include <ucontext.h>
#endif

namespace emulator {

// Where execution stands: the registers of a fiber, or of the scheduler that resumes fibers.
struct ExecutionState {
#ifdef EMULATOR_ASM_SWITCH
    void* stack_pointer = nullptr;
#else
    ucontext_t context;
#endif
    void* sanitizer_stack = nullptr;
};

// The stacks of a block's fibers, in one mapping, with an unmapped page below each.
class Stacks {
 public:
    static constexpr size_t BYTES =
#ifdef __SANITIZE_ADDRESS__
        256 << 10;
#else
        128 << 10;
#endif

    Stacks() = default;
    Stacks(const Stacks&) = delete;
    Stacks& operator=(const Stacks&) = delete;
    ~Stacks();

    void reserve(size_t count);
    char* bottom(size_t index) const;

    // To be called when fibers have been abandoned within functions: AddressSanitizer guards the variables of those still.
    void forget_frames();

    bool contain(const void* address) const {
        const char* byte = static_cast<const char*>(address);
        return byte >= memory_ && byte < memory_ + count_ * (GUARD_BYTES + BYTES);
    }

 private:
    static constexpr size_t GUARD_BYTES = 4096;
    char* memory_ = nullptr;
    size_t count_ = 0;
};

// Prepares `fiber` to run `entry` from its beginning on the stack at `stack_bottom`. `entry` must never return.
void prepare_fiber(ExecutionState& fiber, char* stack_bottom, void (*entry)());

// Goes on in `fiber` until it calls suspend_fiber; to be called by the scheduler.
void resume_fiber(ExecutionState& scheduler, ExecutionState& fiber, char* stack_bottom);

// Goes back to the scheduler that resumed `fiber`. With `forever`, the fiber is not resumed again before it is prepared anew.
void suspend_fiber(ExecutionState& fiber, ExecutionState& scheduler, bool forever);

// What each new fiber calls first.
void announce_fiber_start();

}  // namespace emulator
