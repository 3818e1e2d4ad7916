// Rotary position embedding in place, the two halves of a head rotated against each other:
// `(x_i, x_{i+E/2}) -> (x_i cos - x_{i+E/2} sin, x_{i+E/2} cos + x_i sin)`, with `sin` times `sign`: -1 in backward. Of a head of
// `head_dim` columns the first E are turned.
//
// A thread takes eight pairs at a time; 4 bytes an element, since the tables come from the cache. Any grid.
// Source: arXiv:2104.09864, in the layout of transformers (`rotate_half`).

#include "bf16_vector.cuh"

namespace {

// Rows of `heads` heads, each of `head_dim` elements, of which the first 2 * half turn.
struct Heads {
    bf16* data;
    unsigned heads, half, head_dim;

    __device__ __forceinline__ bf16* head(uint64_t row, unsigned head) const {
        return data + (row * heads + head) * head_dim;
    }
};

// The angles of each position, [P, half].
struct Table {
    const float* __restrict__ cos;
    const float* __restrict__ sin;
};

template <typename Vector>
__device__ __forceinline__ void rotate(const Heads& q, const Heads& k, const unsigned* __restrict__ positions,
                                       const Table& table, unsigned rows, float sign) {
    const unsigned half = q.half;
    const unsigned vectors = half / Vector::WIDTH;
    const uint64_t row_vectors = static_cast<uint64_t>(q.heads + k.heads) * vectors;
    const uint64_t threads = static_cast<uint64_t>(gridDim.x) * blockDim.x;
    for (uint64_t i = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < rows * row_vectors; i += threads) {
        const uint64_t row = i / row_vectors;
        const unsigned in_row = static_cast<unsigned>(i % row_vectors);
        const unsigned head = in_row / vectors;
        const unsigned pair = in_row % vectors * Vector::WIDTH;
        bf16* const low = (head < q.heads ? q.head(row, head) : k.head(row, head - q.heads)) + pair;
        bf16* const high = low + half;
        const uint64_t angle = static_cast<uint64_t>(positions[row]) * half + pair;

        float x[Vector::WIDTH];
        float y[Vector::WIDTH];
        float cos[Vector::WIDTH];
        float sin[Vector::WIDTH];
        Vector::load(low).widen(x);
        Vector::load(high).widen(y);
        load_floats(table.cos + angle, cos);
        load_floats(table.sin + angle, sin);
#pragma unroll
        for (unsigned e = 0; e < Vector::WIDTH; e++) {
            const float signed_sin = sign * sin[e];
            const float rotated = x[e] * cos[e] - y[e] * signed_sin;
            y[e] = y[e] * cos[e] + x[e] * signed_sin;
            x[e] = rotated;
        }
        Vector::round(x).store(low);
        Vector::round(y).store(high);
    }
}

}  // namespace

// `k_heads` may be 0, and `k` null.
KERNEL(256, rope_rotate_bf16)
(bf16* q, bf16* k, const unsigned* positions, const float* cos, const float* sin, unsigned rows, unsigned q_heads,
 unsigned k_heads, unsigned half, unsigned head_dim, float sign) {
    const Heads q_rows = {q, q_heads, half, head_dim};
    const Heads k_rows = {k, k_heads, half, head_dim};
    const Table table = {cos, sin};
    if (half % 8 == 0 && head_dim % 8 == 0 && are_aligned(q, k, cos, sin)) {
        rotate<Bf16Vector<8>>(q_rows, k_rows, positions, table, rows, sign);
    } else {
        rotate<Bf16Vector<1>>(q_rows, k_rows, positions, table, rows, sign);
    }
}
