// The asynchronous copies (cp.async) of one thread that have not landed yet.
#pragma once

#include <cstddef>
#include <vector>

namespace emulator {

struct CopyQueue {
    struct Copy {
        void* shared;
        const void* global;
        bool valid;
        size_t group;
    };
    std::vector<Copy> copies;  // oldest first
    size_t open_group = 0;     // the number of groups committed so far

    void clear() {
        copies.clear();
        open_group = 0;
    }
};

}  // namespace emulator
