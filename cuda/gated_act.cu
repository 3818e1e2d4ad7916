// The gated activation of the MLP: `y = act(gate) up`, `act(z) = z s(u(z))`, `s(u) = 1 / (1 + e^-u)`.
//
//   gated_act   SiLU                        u(z) = z
//   gated_gelu  GELU, its tanh approximation u(z) = 2 sqrt(2/pi) (z + 0.044715 z^3)
//
// Backward, with `s` at `u(gate)`: `d_up = dy gate s`, `d_gate = dy up s (1 + gate u'(gate) (1 - s))`, each in the place of what it
// is the gradient of.
//
// A thread takes eight elements at a time; forward moves 6 bytes an element, backward 10. Any grid.
//
// Source: arXiv:2002.05202, arXiv:1606.08415.

#include "bf16_vector.cuh"

namespace {

struct Silu {
    // To a few units in the last place of f32, far inside bf16.
    static __device__ __forceinline__ float sigmoid(float z) { return __fdividef(1.0f, 1.0f + __expf(-z)); }
    // z u'(z)
    static __device__ __forceinline__ float slope(float z) { return z; }
};

struct GeluTanh {
    static constexpr float SCALE = 1.5957692f;
    static constexpr float CUBIC = 0.044715f;

    // Beyond 20 the sigmoid is 0 or 1, and the cube could overflow.
    static __device__ __forceinline__ float clamp(float z) { return fminf(fmaxf(z, -20.0f), 20.0f); }
    static __device__ __forceinline__ float sigmoid(float z) {
        const float c = clamp(z);
        return Silu::sigmoid(SCALE * c * (1.0f + CUBIC * c * c));
    }
    static __device__ __forceinline__ float slope(float z) {
        const float c = clamp(z);
        return SCALE * c * (1.0f + 3.0f * CUBIC * c * c);
    }
};

template <typename Act>
__device__ __forceinline__ void forward(const bf16* gate, const bf16* up, uint64_t n, bf16* y) {
    for_each_vector(n, are_aligned(gate, up, y), [=](auto kind, uint64_t i) {
        using Vector = decltype(kind);
        float g[Vector::WIDTH];
        float u[Vector::WIDTH];
        Vector::load(gate + i).widen(g);
        Vector::load(up + i).widen(u);
#pragma unroll
        for (unsigned e = 0; e < Vector::WIDTH; e++) {
            u[e] *= g[e] * Act::sigmoid(g[e]);
        }
        Vector::round(u).store(y + i);
    });
}

template <typename Act>
__device__ __forceinline__ void backward(const bf16* dy, bf16* gate, bf16* up, uint64_t n) {
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
            const float s = Act::sigmoid(g[e]);
            const float d_gate = d[e] * u[e] * s * (1.0f + Act::slope(g[e]) * (1.0f - s));
            u[e] = d[e] * g[e] * s;
            g[e] = d_gate;
        }
        Vector::round(g).store(gate + i);
        Vector::round(u).store(up + i);
    });
}

}  // namespace

KERNEL(256, gated_act_forward_bf16)(const bf16* gate, const bf16* up, uint64_t n, bf16* y) {
    forward<Silu>(gate, up, n, y);
}

KERNEL(256, gated_act_backward_bf16)(const bf16* dy, bf16* gate, bf16* up, uint64_t n) {
    backward<Silu>(dy, gate, up, n);
}

KERNEL(256, gated_gelu_forward_bf16)(const bf16* gate, const bf16* up, uint64_t n, bf16* y) {
    forward<GeluTanh>(gate, up, n, y);
}

KERNEL(256, gated_gelu_backward_bf16)(const bf16* dy, bf16* gate, bf16* up, uint64_t n) {
    backward<GeluTanh>(dy, gate, up, n);
}
