// The functions of tensor_core.cuh for the host.
#pragma once

#include "cuda_on_host.h"

namespace emulator {
void multiply_matrices(float* d, const unsigned* a, const unsigned* b, Site site);
void load_matrices(unsigned* registers, int count, const void* shared_row, bool transposed, Site site);
void start_copy(void* shared, const void* global, bool valid);
void commit_copies(Site site);
void wait_for_copies(int newest_to_leave, Site site);
}  // namespace emulator

inline void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                         emulator::Site site = emulator::here()) {
    emulator::multiply_matrices(d, a, b, site);
}

inline void load_matrix_x4(unsigned (&r)[4], const void* shared_row, emulator::Site site = emulator::here()) {
    emulator::load_matrices(r, 4, shared_row, false, site);
}

inline void load_matrix_x4_transposed(unsigned (&r)[4], const void* shared_row, emulator::Site site = emulator::here()) {
    emulator::load_matrices(r, 4, shared_row, true, site);
}

inline void load_matrix_x2(unsigned (&r)[2], const void* shared_row, emulator::Site site = emulator::here()) {
    emulator::load_matrices(r, 2, shared_row, false, site);
}

inline void load_matrix_x2_transposed(unsigned (&r)[2], const void* shared_row, emulator::Site site = emulator::here()) {
    emulator::load_matrices(r, 2, shared_row, true, site);
}

inline void copy_async_16(void* shared, const void* global, bool valid) { emulator::start_copy(shared, global, valid); }

inline void copy_async_commit(emulator::Site site = emulator::here()) { emulator::commit_copies(site); }

template <int N>
void copy_async_wait(emulator::Site site = emulator::here()) {
    emulator::wait_for_copies(N, site);
}
