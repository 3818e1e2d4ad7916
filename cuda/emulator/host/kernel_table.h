// The table of kernels by name, and the call of a kernel from a list of pointers to its arguments.
#pragma once

#include <type_traits>
#include <utility>
#include <vector>

#include "block.h"

namespace emulator {

class KernelTable {
 public:
    template <auto FUNCTION>
    void add(const char* name, unsigned threads) {
        add(name, threads, std::integral_constant<decltype(FUNCTION), FUNCTION>{}, FUNCTION);
    }

    const std::vector<Kernel>& kernels() const { return kernels_; }

 private:
    template <typename Function, typename... Arguments>
    void add(const char* name, unsigned threads, Function function, void (*)(Arguments...)) {
        (void)function;
        kernels_.push_back({name, threads, sizeof...(Arguments), [](const void* const* arguments) {
                                invoke<Function, Arguments...>(arguments, std::index_sequence_for<Arguments...>{});
                            }});
    }

    template <typename Function, typename... Arguments, size_t... INDEX>
    static void invoke(const void* const* arguments, std::index_sequence<INDEX...>) {
        (void)arguments;
        Function::value(*static_cast<const std::remove_cv_t<Arguments>*>(arguments[INDEX])...);
    }

    std::vector<Kernel> kernels_;
};

// Generated from the kernel files: adds every kernel.
void add_kernels(KernelTable& table);

}  // namespace emulator
