// The residual connection: `sum = x + branch`; `sum` may be `branch`.
//
// A thread takes eight elements at a time; 6 bytes an element. Any grid.

#include "bf16_vector.cuh"

KERNEL(256, residual_forward_bf16)(const bf16* x, const bf16* branch, uint64_t n, bf16* sum) {
    for_each_vector(n, are_aligned(x, branch, sum), [=](auto kind, uint64_t i) {
        using Vector = decltype(kind);
        float x_values[Vector::WIDTH];
        float values[Vector::WIDTH];
        Vector::load(x + i).widen(x_values);
        Vector::load(branch + i).widen(values);
#pragma unroll
        for (unsigned e = 0; e < Vector::WIDTH; e++) {
            values[e] += x_values[e];
        }
        Vector::round(values).store(sum + i);
    });
}
