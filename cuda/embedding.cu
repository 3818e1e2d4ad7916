// The token embedding: rows of a table picked by token id, and rows written back to their places.
//
//   gather   out[i] = table[ids[i]]
//   scatter  out[ids[i]] = values[i], where no id comes twice
//   backward sums[ids[t]] += sum of dy[rows[i]] for i in starts[t] .. starts[t + 1], where no id comes twice
//
// A block of threads copies one row, so grid = rows; 16 bytes a thread where the rows allow it. 4 bytes an element.
// In backward a block has one token, so grid = tokens; a thread adds up every 256th column in the order of the rows, whatever
// the grid. 2 bytes an element of dy and 8 an element of the rows that change.

#include "common.cuh"

namespace {

__device__ __forceinline__ void copy_row(const bf16* __restrict__ from, unsigned d, bf16* __restrict__ to) {
    const uintptr_t misalignment = reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to);
    unsigned copied = 0;
    if (misalignment % sizeof(uint4) == 0) {
        const unsigned vectors = d / 8;
        for (unsigned i = threadIdx.x; i < vectors; i += blockDim.x) {
            reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
        }
        copied = vectors * 8;
    }
    for (unsigned i = copied + threadIdx.x; i < d; i += blockDim.x) {
        to[i] = from[i];
    }
}

}  // namespace

KERNEL(256, embedding_gather_bf16)
(const bf16* table, const unsigned* ids, unsigned rows, unsigned d, bf16* out) {
    const uint64_t row = blockIdx.x;
    if (row < rows) {
        copy_row(table + static_cast<uint64_t>(ids[row]) * d, d, out + row * d);
    }
}

KERNEL(256, embedding_scatter_bf16)
(const bf16* values, const unsigned* ids, unsigned rows, unsigned d, bf16* out) {
    const uint64_t row = blockIdx.x;
    if (row < rows) {
        copy_row(values + row * d, d, out + static_cast<uint64_t>(ids[row]) * d);
    }
}

KERNEL(256, embedding_backward_bf16)
(const bf16* dy, const unsigned* ids, const unsigned* starts, const unsigned* rows, unsigned tokens, unsigned d, float* sums) {
    const unsigned token = blockIdx.x;
    if (token >= tokens) {
        return;
    }
    const unsigned first = starts[token];
    const unsigned end = starts[token + 1];
    float* sum_of_token = sums + static_cast<uint64_t>(ids[token]) * d;
    for (unsigned column = threadIdx.x; column < d; column += blockDim.x) {
        float sum = sum_of_token[column];
        for (unsigned i = first; i < end; ++i) {
            sum += to_float(dy[static_cast<uint64_t>(rows[i]) * d + column]);
        }
        sum_of_token[column] = sum;
    }
}
