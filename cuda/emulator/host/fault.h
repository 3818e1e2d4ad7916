// What the emulator reports of a kernel that breaks a rule of the machine.
#pragma once

#include "vector_types.h"

namespace emulator {

// A place in a kernel's source. The functions that kernels call take it as a default argument, which names their caller.
struct Site {
    const char* file = nullptr;
    unsigned line = 0;
};

inline Site here(const char* file = __builtin_FILE(), unsigned line = __builtin_LINE()) { return {file, line}; }

bool operator==(const Site& a, const Site& b);

// The numbers are shared with src/fault.rs.
enum class FaultKind : unsigned {
    None = 0,
    Deadlock = 1,           // no thread can go on
    DivergentBarrier = 2,   // threads of one block wait at different __syncthreads()
    LaneMismatch = 3,       // lanes of one warp operation disagree about the operation or its mask, or one has exited
    Misaligned = 4,         // an address is not a multiple of what its access needs
    SharedOverrun = 5,      // bytes beyond a shared array were written
    SharedTooLarge = 6,     // more shared memory than every supported GPU has
    InvalidAccess = 7,      // an address that is no memory of the launch; or a trap, such as a division by zero
    Uninitialized = 8,      // shared memory was read that the block has not written
    Race = 9,               // two threads met at one address, at least one writing, with nothing that orders them
    Undefined = 10,         // what C++ leaves undefined: a signed overflow, a shift too far, an index beyond its array
    UnderWay = 11,          // a thread ended before its copies or products
};

struct Fault {
    FaultKind kind = FaultKind::None;
    uint3 block{};
    unsigned thread = 0;
    // How many threads of the block were in each state.
    unsigned ready = 0;
    unsigned in_warp_operation = 0;
    unsigned at_barrier = 0;
    unsigned exited = 0;
    char message[512] = {};
};

}  // namespace emulator
