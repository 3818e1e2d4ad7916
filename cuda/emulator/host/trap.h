// Turns a trap inside a kernel (a wild address, a division by zero, a stack that ran over) into a fault of its thread.
#pragma once

namespace emulator {

// Installs the signal handlers, once per process. Signals outside a kernel go to the handlers that were there before.
void catch_traps();

// The lowest address of the stack of the kernel thread that is running on this OS thread, or null. Defined by scheduler.cpp.
char* stack_of_running_thread();

}  // namespace emulator
