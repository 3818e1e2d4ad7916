// The products of warpgroups (wgmma) that one thread has started and that are not over yet.
#pragma once

#include <cstddef>
#include <vector>

namespace emulator {

struct ProductQueue {
    struct Product {
        float* d;
        int columns;
        const unsigned* a_registers;  // or, where that is null:
        const unsigned char* a;
        const unsigned char* b;
        int b_panel_bytes;
        bool add;
        size_t group;
    };
    std::vector<Product> products;  // oldest first
    size_t open_group = 0;          // the number of groups committed so far

    void clear() {
        products.clear();
        open_group = 0;
    }
};

}  // namespace emulator
