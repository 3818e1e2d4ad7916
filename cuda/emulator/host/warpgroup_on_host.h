// The functions of warpgroup.cuh for the host.
#pragma once

#include "cuda_on_host.h"

// A factor in shared memory.
struct SharedFactor {
    const unsigned char* start;
    int panel_bytes;

    SharedFactor after(int bytes) const { return {start + bytes, panel_bytes}; }
};

inline SharedFactor shared_factor(const void* start, int panel_bytes) {
    return {static_cast<const unsigned char*>(start), panel_bytes};
}

namespace emulator {
void start_warpgroup_product(float* d, int columns, const unsigned* a_registers, SharedFactor a, SharedFactor b, bool add,
                             Site site);
void commit_warpgroup_products(Site site);
void wait_for_warpgroup_products(int newest_to_leave, Site site);
}  // namespace emulator

template <int N>
void start_product(float (&d)[N][4], SharedFactor a, SharedFactor b, emulator::Site site = emulator::here()) {
    emulator::start_warpgroup_product(d[0], 8 * N, nullptr, a, b, false, site);
}

template <int N>
void add_product(float (&d)[N][4], SharedFactor a, SharedFactor b, emulator::Site site = emulator::here()) {
    emulator::start_warpgroup_product(d[0], 8 * N, nullptr, a, b, true, site);
}

inline void add_product_of_rows(float (&d)[16][4], const unsigned (&a)[4], SharedFactor b,
                                emulator::Site site = emulator::here()) {
    emulator::start_warpgroup_product(d[0], 128, a, {}, b, true, site);
}

// Registers and memory have one order for all on the host.
inline void begin_products() {}
inline void show_to_products() {}

template <int N>
void hold_in_place(float (&)[N][4]) {}

inline void commit_products(emulator::Site site = emulator::here()) { emulator::commit_warpgroup_products(site); }

template <int NEWEST>
void wait_for_products(emulator::Site site = emulator::here()) {
    emulator::wait_for_warpgroup_products(NEWEST, site);
}
