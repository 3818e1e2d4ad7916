// Runs a kernel from a C++ program of its own, for quick work on one kernel file (see README.md).
#pragma once

#include <cstdio>
#include <cstdlib>

#include "machine.h"

namespace emulator {

template <typename Body>
void run_or_exit(const char* name, unsigned threads, dim3 grid, size_t shared_bytes, Order order, const Body& body) {
    Launch launch;
    launch.threads = threads;
    launch.grid = grid;
    launch.shared_bytes = shared_bytes;
    launch.order = order;
    launch.body = [](const void* arguments) { (*static_cast<const Body*>(arguments))(); };
    launch.arguments = &body;
    Fault fault;
    if (run(launch, fault)) {
        return;
    }
    std::fprintf(stderr, "%s, block (%u, %u, %u), thread %u: %s\n", name, fault.block.x, fault.block.y, fault.block.z,
                 fault.thread, fault.message);
    std::fprintf(stderr, "%u threads ready, %u in a warp operation, %u at a barrier, %u exited\n", fault.ready,
                 fault.in_warp_operation, fault.at_barrier, fault.exited);
    std::exit(1);
}

}  // namespace emulator

// RUN_KERNEL(rms_norm_forward_bf16, dim3(rows), 0, order, x, weight, ...);
#define RUN_KERNEL(kernel, grid, shared_bytes, order, ...) \
    emulator::run_or_exit(#kernel, threads_of_##kernel, grid, shared_bytes, order, [&] { kernel(__VA_ARGS__); })
