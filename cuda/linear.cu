// The bias of a linear layer, added to each row in place; the products around it are cuBLAS's.
//
// A block takes a row: grid = rows. 4 bytes moved an element.

#include "common.cuh"

KERNEL(256, linear_add_bias_bf16)(bf16* __restrict__ y, const float* __restrict__ bias, unsigned rows, unsigned d) {
    if (blockIdx.x >= rows) {
        return;
    }
    bf16* const row = y + static_cast<uint64_t>(blockIdx.x) * d;
    const bool by_two = d % 2 == 0 && reinterpret_cast<uintptr_t>(y) % 4 == 0;
    if (by_two) {
        unsigned* const pairs = reinterpret_cast<unsigned*>(row);
        for (unsigned i = threadIdx.x; i < d / 2; i += blockDim.x) {
            pairs[i] = pack_bf16(low_bf16(pairs[i]) + bias[2 * i], high_bf16(pairs[i]) + bias[2 * i + 1]);
        }
    } else {
        for (unsigned i = threadIdx.x; i < d; i += blockDim.x) {
            row[i] = from_float<bf16>(to_float(row[i]) + bias[i]);
        }
    }
}
