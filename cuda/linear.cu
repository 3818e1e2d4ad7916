// What a linear layer adds to its matrix product: `y += bias`, the same for every row.
//
// A thread takes eight elements at a time; 4 bytes an element, the bias comes from the cache. Any grid.

#include "bf16_vector.cuh"

KERNEL(256, linear_add_bias_bf16)(bf16* y, const float* __restrict__ bias, unsigned rows, unsigned d) {
    const bool aligned = d % 8 == 0 && are_aligned(y, bias);
    for_each_vector(static_cast<uint64_t>(rows) * d, aligned, [=](auto kind, uint64_t i) {
        using Vector = decltype(kind);
        float values[Vector::WIDTH];
        float b[Vector::WIDTH];
        Vector::load(y + i).widen(values);
        load_floats(bias + i % d, b);
#pragma unroll
        for (unsigned e = 0; e < Vector::WIDTH; e++) {
            values[e] += b[e];
        }
        Vector::round(values).store(y + i);
    });
}
