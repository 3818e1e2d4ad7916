// The gated activation of the MLP: `y = silu(gate) up`, `silu(z) = z s(z)`, `s(z) = 1 / (1 + e^-z)`.
//
// Backward: `d_up = dy gate s`, `d_gate = dy up s (1 + gate (1 - s))`, each in the place of what it is the gradient of.
//
// A thread takes eight elements at a time; forward moves 6 bytes an element, backward 10. Any grid.
//
// Source: arXiv:2002.05202.

#include "bf16_vector.cuh"

namespace {

// To a few units in the last place of f32, far inside bf16.
__device__ __forceinline__ float sigmoid(float z) { return __fdividef(1.0f, 1.0f + __expf(-z)); }

}  // namespace

KERNEL(256, gated_act_forward_bf16)(const bf16* gate, const bf16* up, uint64_t n, bf16* y) {
    for_each_vector(n, are_aligned(gate, up, y), [=](auto kind, uint64_t i) {
        using Vector = decltype(kind);
        float g[Vector::WIDTH];
        float u[Vector::WIDTH];
        Vector::load(gate + i).widen(g);
        Vector::load(up + i).widen(u);
#pragma unroll
        for (unsigned e = 0; e < Vector::WIDTH; e++) {
            u[e] *= g[e] * sigmoid(g[e]);
        }
        Vector::round(u).store(y + i);
    });
}

KERNEL(256, gated_act_backward_bf16)(const bf16* dy, bf16* gate, bf16* up, uint64_t n) {
    for_each_vector(n, are_aligned(dy, gate, up), [=](auto kind, uint64_t i) {
        using Vector = decltype(kind);
        float d[Vector::WIDTH];
        float g[Vector::WIDTH];
        float u[Vector::WIDTH];
        Vector::load(dy + i).widen(d);
        Vector::load(gate + i).widen(g);
        Vector::load(up + i).widen(u);
#pragma unroll
        for (unsigned e = 0; e < Vector::WIDTH; e++) {
            const float s = sigmoid(g[e]);
            const float d_gate = d[e] * u[e] * s * (1.0f + g[e] * (1.0f - s));
            u[e] = d[e] * g[e] * s;
            g[e] = d_gate;
        }
        Vector::round(g).store(gate + i);
        Vector::round(u).store(up + i);
    });
}
