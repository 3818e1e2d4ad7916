#include "trap.h"

#include "fiber.h"
#include "machine.h"

// AddressSanitizer has handlers of its own, which say more.
#if defined(__linux__) && defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)

#include <signal.h>
#include <ucontext.h>

#include <cstdint>
#include <mutex>

namespace emulator {

namespace {

constexpr int SIGNALS[] = {SIGSEGV, SIGBUS, SIGFPE};
struct sigaction previous[sizeof SIGNALS / sizeof *SIGNALS];

thread_local int trapped_signal;
thread_local const void* trapped_address;

void fail_after_trap() {
    if (trapped_signal == SIGFPE) {
        fail(FaultKind::InvalidAccess, "a division by zero");
    }
    fail(FaultKind::InvalidAccess, "no memory at address %p", trapped_address);
}

void restore_previous(int signal) {
    for (size_t i = 0; i < sizeof SIGNALS / sizeof *SIGNALS; i++) {
        if (SIGNALS[i] == signal) {
            sigaction(signal, &previous[i], nullptr);
        }
    }
}

// Makes the thread go on in fail_after_trap, at the top of its stack: nothing that lies there is needed any more.
void on_signal(int signal, siginfo_t* info, void* context) {
    char* stack = stack_of_running_thread();
    if (stack == nullptr) {
        restore_previous(signal);  // the instruction is tried again and traps into the handler that was there before us
        return;
    }
    trapped_signal = signal;
    trapped_address = info->si_addr;
    greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
    const auto top = reinterpret_cast<uintptr_t>(stack + Stacks::BYTES);
    registers[REG_RSP] = static_cast<greg_t>(top - 8);  // as after a call: 8 below a multiple of 16
    registers[REG_RIP] = static_cast<greg_t>(reinterpret_cast<uintptr_t>(fail_after_trap));
}

void install_handlers() {
    for (size_t i = 0; i < sizeof SIGNALS / sizeof *SIGNALS; i++) {
        struct sigaction action = {};
        action.sa_sigaction = on_signal;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        sigemptyset(&action.sa_mask);
        sigaction(SIGNALS[i], &action, &previous[i]);
    }
}

}  // namespace

void catch_traps() {
    static std::once_flag once;
    std::call_once(once, install_handlers);
}

}  // namespace emulator

#else

namespace emulator {
void catch_traps() {}
}  // namespace emulator

#endif
