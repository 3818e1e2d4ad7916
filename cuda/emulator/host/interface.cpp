// What the Rust side calls.
#include <algorithm>
#include <cstring>

#include "kernel_table.h"

namespace {

const std::vector<emulator::Kernel>& all_kernels() {
    static const std::vector<emulator::Kernel> kernels = [] {
        emulator::KernelTable table;
        emulator::add_kernels(table);
        return table.kernels();
    }();
    return kernels;
}

}  // namespace

extern "C" size_t qlora_emulator_kernel_count() { return all_kernels().size(); }

extern "C" const char* qlora_emulator_kernel(size_t index, unsigned* threads, unsigned* argument_count) {
    const emulator::Kernel& kernel = all_kernels()[index];
    *threads = kernel.threads;
    *argument_count = kernel.argument_count;
    return kernel.name.c_str();
}

// Launches kernel number `index`. Returns whether it ran to its end; otherwise `fault` holds what went wrong.
extern "C" bool qlora_emulator_launch(size_t index, const unsigned* grid, size_t shared_bytes, int order, uint64_t seed,
                                      const void* const* arguments, char* fault, size_t fault_bytes) {
    const emulator::Launch launch{&all_kernels()[index], dim3(grid[0], grid[1], grid[2]), shared_bytes,
                                  static_cast<emulator::Order>(order), seed, arguments};
    const std::string what = emulator::run(launch);
    const size_t length = std::min(what.size(), fault_bytes - 1);
    std::memcpy(fault, what.data(), length);
    fault[length] = '\0';
    return what.empty();
}
