// Rotary position embedding in place, the two halves of a head rotated against each other:
// `(x_i, x_{i+E/2}) -> (x_i cos - x_{i+E/2} sin, x_{i+E/2} cos + x_i sin)`, with `sin` times `sign`: -1 in backward. Of a head of
// `head_dim` columns the first E are turned. With `neighbours` the pairs are `(x_2i, x_{2i+1})`.
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

// Pairs that lie in two halves.
template <typename Vector>
struct Halves {
    static __device__ __forceinline__ void load(const bf16* head, unsigned half, unsigned pair, float (&x)[Vector::WIDTH],
                                                float (&y)[Vector::WIDTH]) {
        Vector::load(head + pair).widen(x);
        Vector::load(head + half + pair).widen(y);
    }
    static __device__ __forceinline__ void store(bf16* head, unsigned half, unsigned pair, const float (&x)[Vector::WIDTH],
                                                 const float (&y)[Vector::WIDTH]) {
        Vector::round(x).store(head + pair);
        Vector::round(y).store(head + half + pair);
    }
};

// Pairs of neighbours.
template <typename Vector>
struct Neighbours {
    static constexpr unsigned WIDTH = Vector::WIDTH;
    static __device__ __forceinline__ void load(const bf16* head, unsigned, unsigned pair, float (&x)[WIDTH], float (&y)[WIDTH]) {
        float both[2][WIDTH];
        Vector::load(head + 2 * pair).widen(both[0]);
        Vector::load(head + 2 * pair + WIDTH).widen(both[1]);
#pragma unroll
        for (unsigned e = 0; e < WIDTH; e++) {
            x[e] = both[2 * e / WIDTH][2 * e % WIDTH];
            y[e] = both[(2 * e + 1) / WIDTH][(2 * e + 1) % WIDTH];
        }
    }
    static __device__ __forceinline__ void store(bf16* head, unsigned, unsigned pair, const float (&x)[WIDTH],
                                                 const float (&y)[WIDTH]) {
        float both[2][WIDTH];
#pragma unroll
        for (unsigned e = 0; e < WIDTH; e++) {
            both[2 * e / WIDTH][2 * e % WIDTH] = x[e];
            both[(2 * e + 1) / WIDTH][(2 * e + 1) % WIDTH] = y[e];
        }
        Vector::round(both[0]).store(head + 2 * pair);
        Vector::round(both[1]).store(head + 2 * pair + WIDTH);
    }
};

template <typename Vector, template <typename> class Pairs>
__device__ __forceinline__ void rotate(const Heads& q, const Heads& k, const unsigned* __restrict__ positions,
                                       const Table& table, unsigned rows, float sign) {
    const unsigned half = q.half;
    const unsigned vectors = half / Vector::WIDTH;
    const uint64_t row_vectors = static_cast<uint64_t>(q.heads + k.heads) * vectors;
    const uint64_t threads = static_cast<uint64_t>(gridDim.x) * blockDim.x;
    for (uint64_t i = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < rows * row_vectors; i += threads) {
        const uint64_t row = i / row_vectors;
        const unsigned in_row = static_cast<unsigned>(i % row_vectors);
        const unsigned number = in_row / vectors;
        const unsigned pair = in_row % vectors * Vector::WIDTH;
        bf16* const head = number < q.heads ? q.head(row, number) : k.head(row, number - q.heads);
        const uint64_t angle = static_cast<uint64_t>(positions[row]) * half + pair;

        float x[Vector::WIDTH];
        float y[Vector::WIDTH];
        float cos[Vector::WIDTH];
        float sin[Vector::WIDTH];
        Pairs<Vector>::load(head, half, pair, x, y);
        load_floats(table.cos + angle, cos);
        load_floats(table.sin + angle, sin);
#pragma unroll
        for (unsigned e = 0; e < Vector::WIDTH; e++) {
            const float signed_sin = sign * sin[e];
            const float rotated = x[e] * cos[e] - y[e] * signed_sin;
            y[e] = y[e] * cos[e] + x[e] * signed_sin;
            x[e] = rotated;
        }
        Pairs<Vector>::store(head, half, pair, x, y);
    }
}

template <template <typename> class Pairs>
__device__ __forceinline__ void rotate(const Heads& q, const Heads& k, const unsigned* __restrict__ positions,
                                       const Table& table, unsigned rows, float sign) {
    if (q.half % 8 == 0 && q.head_dim % 8 == 0 && are_aligned(q.data, k.data, table.cos, table.sin)) {
        rotate<Bf16Vector<8>, Pairs>(q, k, positions, table, rows, sign);
    } else {
        rotate<Bf16Vector<1>, Pairs>(q, k, positions, table, rows, sign);
    }
}

}  // namespace

// `k_heads` may be 0, and `k` null.
KERNEL(256, rope_rotate_bf16)
(bf16* q, bf16* k, const unsigned* positions, const float* cos, const float* sin, unsigned rows, unsigned q_heads,
 unsigned k_heads, unsigned half, unsigned head_dim, unsigned neighbours, float sign) {
    const Heads q_rows = {q, q_heads, half, head_dim};
    const Heads k_rows = {k, k_heads, half, head_dim};
    const Table table = {cos, sin};
    if (neighbours) {
        rotate<Neighbours>(q_rows, k_rows, positions, table, rows, sign);
    } else {
        rotate<Halves>(q_rows, k_rows, positions, table, rows, sign);
    }
}
