// What one thread has under way and waits for in groups: asynchronous copies (cp.async), products of warpgroups (wgmma).
#pragma once

#include <cstddef>
#include <vector>

namespace emulator {

template <typename Work>
class GroupQueue {
 public:
    void start(const Work& work) { under_way_.push_back({work, open_group_}); }

    // Closes a group of what was started since the last call.
    void commit() { open_group_++; }

    // Calls end(work), the oldest first, for what is in a closed group but the newest ones, and forgets it.
    template <typename End>
    void end_all_but(int newest_groups, const End& end) {
        size_t over = 0;
        while (over < under_way_.size() &&
               under_way_[over].group + static_cast<size_t>(newest_groups) < open_group_) {
            end(under_way_[over++].work);
        }
        under_way_.erase(under_way_.begin(), under_way_.begin() + static_cast<std::ptrdiff_t>(over));
    }

    bool is_empty() const { return under_way_.empty(); }

    void clear() {
        under_way_.clear();
        open_group_ = 0;
    }

 private:
    struct InGroup {
        Work work;
        size_t group;
    };
    std::vector<InGroup> under_way_;  // oldest first
    size_t open_group_ = 0;           // the number of groups committed so far
};

struct Copy {
    void* shared;
    const void* global;
    bool valid;
};

struct Product {
    float* d;
    int columns;
    const unsigned* a_registers;  // or, where that is null:
    const unsigned char* a;
    const unsigned char* b;
    int b_panel_bytes;
    bool add;
};

}  // namespace emulator
