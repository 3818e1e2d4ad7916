#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef EMULATOR_ASM_SWITCH
// Saves the registers that a called function must preserve on the current stack, stores the stack pointer through the first
// argument, takes the second as the new stack pointer and restores from there.
extern "C" void qlora_emulator_switch_stack(void** save, void* load);
asm(R"(
    .text
    .globl qlora_emulator_switch_stack
    .type qlora_emulator_switch_stack, @function
qlora_emulator_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size qlora_emulator_switch_stack, . - qlora_emulator_switch_stack
)");
static constexpr int SAVED_REGISTERS = 6;
#endif

namespace emulator {

#ifdef __SANITIZE_ADDRESS__
namespace {
// AddressSanitizer asks on which stack the scheduler runs; it tells us on the first switch away from it.
thread_local const void* scheduler_stack_bottom = nullptr;
thread_local size_t scheduler_stack_bytes = 0;
}  // namespace
#endif

Stacks::~Stacks() {
    if (memory_ != nullptr) {
        munmap(memory_, count_ * (GUARD_BYTES + BYTES));
    }
}

void Stacks::reserve(size_t count) {
    if (count <= count_) {
        return;
    }
    this->~Stacks();
    void* memory = mmap(nullptr, count * (GUARD_BYTES + BYTES), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
        std::perror("the emulator's stacks");
        std::abort();
    }
    memory_ = static_cast<char*>(memory);
    count_ = count;
    for (size_t i = 0; i < count; i++) {
        mprotect(bottom(i) - GUARD_BYTES, GUARD_BYTES, PROT_NONE);
    }
}

char* Stacks::bottom(size_t index) const { return memory_ + index * (GUARD_BYTES + BYTES) + GUARD_BYTES; }

void Stacks::forget_frames() {
#ifdef __SANITIZE_ADDRESS__
    for (size_t i = 0; i < count_; i++) {
        ASAN_UNPOISON_MEMORY_REGION(bottom(i), BYTES);
    }
#endif
}

void prepare_fiber(ExecutionState& fiber, char* stack_bottom, void (*entry)()) {
    fiber.sanitizer_stack = nullptr;
#ifdef EMULATOR_ASM_SWITCH
    // The stack looks as if `entry` had been about to run: below a zero return address lie its address and the registers.
    void** top = reinterpret_cast<void**>(stack_bottom + Stacks::BYTES);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < SAVED_REGISTERS; i++) {
        *--top = nullptr;
    }
    fiber.stack_pointer = top;
#else
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack_bottom;
    fiber.context.uc_stack.ss_size = Stacks::BYTES;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
#endif
}

static void switch_from_to(ExecutionState& from, ExecutionState& to) {
#ifdef EMULATOR_ASM_SWITCH
    qlora_emulator_switch_stack(&from.stack_pointer, to.stack_pointer);
#else
    swapcontext(&from.context, &to.context);
#endif
}

void resume_fiber(ExecutionState& scheduler, ExecutionState& fiber, char* stack_bottom) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&scheduler.sanitizer_stack, stack_bottom, Stacks::BYTES);
#else
    (void)stack_bottom;
#endif
    switch_from_to(scheduler, fiber);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(scheduler.sanitizer_stack, nullptr, nullptr);
#endif
}

void suspend_fiber(ExecutionState& fiber, ExecutionState& scheduler, bool forever) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(forever ? nullptr : &fiber.sanitizer_stack, scheduler_stack_bottom, scheduler_stack_bytes);
#else
    (void)forever;
#endif
    switch_from_to(fiber, scheduler);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fiber.sanitizer_stack, &scheduler_stack_bottom, &scheduler_stack_bytes);
#endif
}

void announce_fiber_start() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack_bottom, &scheduler_stack_bytes);
#endif
}

}  // namespace emulator
