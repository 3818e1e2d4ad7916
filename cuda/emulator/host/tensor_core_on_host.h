// The functions of tensor_core.cuh on the host: the fragment layouts stated there, taken apart and put together.
#pragma once

#include "block.h"

namespace emulator {

inline float bf16_of(unsigned packed, int half) {
    return __uint_as_float(half == 0 ? packed << 16 : packed & 0xffff0000u);
}

struct MatrixMultiply {
    float* d;
    const unsigned *a, *b;
};

inline void multiply_fragments(void* const* operands, unsigned) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; lane++) {
        const auto& fragment = *static_cast<const MatrixMultiply*>(operands[lane]);
        const int g = lane / 4, t = lane % 4;
        for (int half = 0; half < 2; half++) {
            for (int i = 0; i < 4; i++) {
                a[g + i % 2 * 8][2 * t + i / 2 * 8 + half] = bf16_of(fragment.a[i], half);
            }
            for (int i = 0; i < 2; i++) {
                b[2 * t + i * 8 + half][g] = bf16_of(fragment.b[i], half);
            }
        }
    }
    for (int lane = 0; lane < 32; lane++) {
        const auto& fragment = *static_cast<const MatrixMultiply*>(operands[lane]);
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; i++) {
            const int row = g + i / 2 * 8, col = 2 * t + i % 2;
            float sum = fragment.d[i];
            for (int k = 0; k < 16; k++) {
                sum += a[row][k] * b[k][col];
            }
            fragment.d[i] = sum;
        }
    }
}

template <int MATRICES>
struct MatrixLoad {
    unsigned* r;
    const void* row;
};

template <int MATRICES, bool TRANSPOSED>
inline void load_fragments(void* const* operands, unsigned) {
    for (int lane = 0; lane < 32; lane++) {
        for (int matrix = 0; matrix < MATRICES; matrix++) {
            const auto element = [&](int row, int col) {
                const auto& source = *static_cast<const MatrixLoad<MATRICES>*>(operands[matrix * 8 + row]);
                return static_cast<unsigned>(static_cast<const uint16_t*>(source.row)[col]);
            };
            const int g = lane / 4, t = lane % 4;
            const unsigned low = TRANSPOSED ? element(2 * t, g) : element(g, 2 * t);
            const unsigned high = TRANSPOSED ? element(2 * t + 1, g) : element(g, 2 * t + 1);
            static_cast<MatrixLoad<MATRICES>*>(operands[lane])->r[matrix] = low | high << 16;
        }
    }
}

template <int MATRICES, bool TRANSPOSED>
inline void load_matrix(unsigned* r, const void* shared_row) {
    const bool gives_address = static_cast<int>(current_lane()) < 8 * MATRICES;
    if (gives_address && reinterpret_cast<uintptr_t>(shared_row) % 16 != 0) {
        fault("a row of a matrix load is not 16-byte aligned");
    }
    MatrixLoad<MATRICES> mine{r, shared_row};
    join_warp_operation(0xffffffffu, load_fragments<MATRICES, TRANSPOSED>, &mine);
}

}  // namespace emulator

inline void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    emulator::MatrixMultiply mine{d, a, b};
    emulator::join_warp_operation(0xffffffffu, emulator::multiply_fragments, &mine);
}

inline void load_matrix_x4(unsigned (&r)[4], const void* shared_row) { emulator::load_matrix<4, false>(r, shared_row); }
inline void load_matrix_x2(unsigned (&r)[2], const void* shared_row) { emulator::load_matrix<2, false>(r, shared_row); }

inline void load_matrix_x4_transposed(unsigned (&r)[4], const void* shared_row) {
    emulator::load_matrix<4, true>(r, shared_row);
}

inline void load_matrix_x2_transposed(unsigned (&r)[2], const void* shared_row) {
    emulator::load_matrix<2, true>(r, shared_row);
}

// The bytes land as late as the hardware may let them, so that a wait that is missing shows as stale data.
inline void copy_async_16(void* shared, const void* global, bool valid) {
    const auto misaligned = [](const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 != 0; };
    if (misaligned(shared) || (valid && misaligned(global))) {
        emulator::fault("an address of an asynchronous copy is not 16-byte aligned");
    }
    emulator::current_thread->copies.push_back({shared, valid ? global : nullptr});
}

inline void copy_async_commit() {
    emulator::Thread& thread = *emulator::current_thread;
    thread.group_ends.push_back(thread.copies.size());
}

template <int N>
inline void copy_async_wait() {
    emulator::Thread& thread = *emulator::current_thread;
    const size_t groups = thread.group_ends.size();
    if (groups <= N) {
        return;
    }
    const size_t landed = thread.group_ends[groups - 1 - N];
    for (size_t i = 0; i < landed; i++) {
        const emulator::PendingCopy& copy = thread.copies[i];
        if (copy.from == nullptr) {
            std::memset(copy.to, 0, 16);
        } else {
            std::memcpy(copy.to, copy.from, 16);
        }
    }
    thread.copies.erase(thread.copies.begin(), thread.copies.begin() + static_cast<ptrdiff_t>(landed));
    thread.group_ends.erase(thread.group_ends.begin(), thread.group_ends.end() - N);
    for (size_t& end : thread.group_ends) {
        end -= landed;
    }
}
