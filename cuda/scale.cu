// A tensor times a factor, in place: `x = factor x`, rounded once.
//
// A thread takes eight elements at a time; 4 bytes an element. Any grid.

#include "bf16_vector.cuh"

KERNEL(256, scale_bf16)(bf16* x, uint64_t n, float factor) {
    for_each_vector(n, are_aligned(x), [=](auto kind, uint64_t i) {
        using Vector = decltype(kind);
        float values[Vector::WIDTH];
        Vector::load(x + i).widen(values);
#pragma unroll
        for (unsigned e = 0; e < Vector::WIDTH; e++) {
            values[e] *= factor;
        }
        Vector::round(values).store(x + i);
    });
}
