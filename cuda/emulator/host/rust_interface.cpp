// What src/lib.rs calls.
#include "machine.h"

using emulator::Fault;
using emulator::Launch;
using emulator::MemoryRange;
using emulator::Order;
using emulator::Site;

// The layout is that of `RawLaunch` in src/lib.rs.
struct RawLaunch {
    void (*body)(const void* arguments);
    const void* arguments;
    unsigned threads;
    unsigned grid[3];
    size_t shared_bytes;
    size_t shared_limit;
    uint64_t order_seed;
    unsigned order_kind;
    unsigned removed_line;  // 0: none
    const char* removed_file;
    const MemoryRange* memory;
    size_t memory_count;
    bool watched;
};

extern "C" bool qlora_emulator_run(const RawLaunch* raw, Fault* fault, void (*visit)(void* context, Site site), void* context) {
    Launch launch;
    launch.threads = raw->threads;
    launch.grid = dim3(raw->grid[0], raw->grid[1], raw->grid[2]);
    launch.shared_bytes = raw->shared_bytes;
    launch.shared_limit = raw->shared_limit;
    launch.order = Order{static_cast<Order::Kind>(raw->order_kind), raw->order_seed};
    if (raw->removed_line != 0) {
        launch.removed = Site{raw->removed_file, raw->removed_line};
    }
    launch.watched = raw->watched;
    launch.memory = raw->memory;
    launch.memory_count = raw->memory_count;
    launch.body = raw->body;
    launch.arguments = raw->arguments;
    return emulator::run(launch, *fault, visit, context);
}
