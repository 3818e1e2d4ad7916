// Dropout on an adapter's matrices: input features are dropped from a: [r, d_in], whole columns, and output features from
// b: [d_out, r], whole rows. Feature i has the mask of dropout.cuh for element i.
//
//   forward   masked_a = a where its column is kept, else 0; masked_b by rows
//   backward  d_a += masked_d_a where the column is kept; d_b by rows; in f32
//
// In forward a thread takes eight neighbouring elements at a time where rows of a and of b are made of such, else one; in
// backward it takes one. Bytes an element: 4 and 12. Any grid.
//
// Source: arXiv:2404.09610; src/ops/matrix_dropout.rs makes the same masks.

#include "bf16_vector.cuh"
#include "dropout.cuh"

namespace {

struct Masks {
    Dropout columns, rows;

    __device__ __forceinline__ Masks(unsigned key0, unsigned key1, unsigned layer, unsigned stream_a, unsigned stream_b,
                                     unsigned threshold)
        : columns{{key0, key1}, {layer, stream_a}, threshold, 1.0f},
          rows{{key0, key1}, {layer, stream_b}, threshold, 1.0f} {}
};

// What is kept of a row's elements from column `col` on.
__device__ __forceinline__ Bf16Vector<8> keep(const Dropout& columns, Bf16Vector<8> values, unsigned col) {
    return {columns.apply(values.packed, col)};
}

__device__ __forceinline__ Bf16Vector<1> keep(const Dropout& columns, Bf16Vector<1> value, unsigned col) {
    return columns.keeps(col) ? value : Bf16Vector<1>{};
}

}  // namespace

KERNEL(256, matrix_dropout_forward_bf16)
(const bf16* __restrict__ a, const bf16* __restrict__ b, unsigned d_in, unsigned d_out, unsigned r, unsigned key0,
 unsigned key1, unsigned layer, unsigned stream_a, unsigned stream_b, unsigned threshold, bf16* __restrict__ masked_a, bf16* __restrict__ masked_b) {
    const Masks masks(key0, key1, layer, stream_a, stream_b, threshold);
    const bool a_in_eights = d_in % 8 == 0 && are_aligned(a, masked_a);
    for_each_vector(static_cast<uint64_t>(r) * d_in, a_in_eights, [=](auto kind, uint64_t i) {
        using Vector = decltype(kind);
        keep(masks.columns, Vector::load(a + i), static_cast<unsigned>(i % d_in)).store(masked_a + i);
    });
    const bool b_in_eights = r % 8 == 0 && are_aligned(b, masked_b);
    for_each_vector(static_cast<uint64_t>(d_out) * r, b_in_eights, [=](auto kind, uint64_t i) {
        using Vector = decltype(kind);
        (masks.rows.keeps(i / r) ? Vector::load(b + i) : Vector{}).store(masked_b + i);
    });
}

KERNEL(256, matrix_dropout_backward_f32)
(const float* __restrict__ masked_d_a, const float* __restrict__ masked_d_b, unsigned d_in, unsigned d_out, unsigned r,
 unsigned key0, unsigned key1, unsigned layer, unsigned stream_a, unsigned stream_b, unsigned threshold,
 float* __restrict__ d_a, float* __restrict__ d_b) {
    const Masks masks(key0, key1, layer, stream_a, stream_b, threshold);
    const uint64_t thread = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const uint64_t threads = static_cast<uint64_t>(gridDim.x) * blockDim.x;
    const uint64_t a_count = static_cast<uint64_t>(r) * d_in;
    for (uint64_t i = thread; i < a_count; i += threads) {
        if (masks.columns.keeps(i % d_in)) {
            d_a[i] += masked_d_a[i];
        }
    }
    const uint64_t b_count = static_cast<uint64_t>(d_out) * r;
    for (uint64_t i = thread; i < b_count; i += threads) {
        if (masks.rows.keeps(i / r)) {
            d_b[i] += masked_d_b[i];
        }
    }
}
