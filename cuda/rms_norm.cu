// Root-mean-square normalization, forward (alone, or with the residual connection before it) and backward.
//
//   y = w x / rms(x),  rms(x) = sqrt(mean(x^2) + eps)
//   dx += i (w dy - x i^2 mean(w dy x)),  i = 1 / rms(x)
//
// A row of up to 1024 elements belongs to a warp, eight of them to a block: grid = ceil(rows / 8). A longer row belongs to a
// block: grid = rows. A row of up to 16384 elements stays in registers between the sum and its use, so that each tensor moves
// once: 4 bytes an element forward, 8 with the residual, 8 backward. Sums are in f32. Source: arXiv:1910.07467.

#include "common.cuh"

namespace {

constexpr unsigned THREADS = 256;
constexpr unsigned SHORT_ROW = 1024;
constexpr unsigned VECTOR = 8;  // bf16 in 16 bytes

// The threads that share a row: how many, how many 16-byte vectors each holds, and their sum.
struct Warp {
    static constexpr unsigned SIZE = WARP_LANES;
    static constexpr unsigned HELD = SHORT_ROW / VECTOR / SIZE;
    static __device__ __forceinline__ float sum(float value) { return warp_sum(value); }
};

struct Block {
    static constexpr unsigned SIZE = THREADS;
    static constexpr unsigned HELD = 8;
    static __device__ __forceinline__ float sum(float value) { return block_sum<THREADS>(value); }
};

struct Vector {
    float at[VECTOR];
};

__device__ __forceinline__ Vector unpack(uint4 packed) {
    return {{low_bf16(packed.x), high_bf16(packed.x), low_bf16(packed.y), high_bf16(packed.y), low_bf16(packed.z),
             high_bf16(packed.z), low_bf16(packed.w), high_bf16(packed.w)}};
}

__device__ __forceinline__ uint4 pack(const Vector& v) {
    return make_uint4(pack_bf16(v.at[0], v.at[1]), pack_bf16(v.at[2], v.at[3]), pack_bf16(v.at[4], v.at[5]),
                      pack_bf16(v.at[6], v.at[7]));
}

__device__ __forceinline__ Vector load_f32(const float* address) {
    const float4 low = *reinterpret_cast<const float4*>(address);
    const float4 high = *reinterpret_cast<const float4*>(address + 4);
    return {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
}

__device__ __forceinline__ bool is_aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

// Where a row that is to be normalized comes from: memory,
struct Stored {
    const bf16* __restrict__ x;

    __device__ __forceinline__ Stored row(uint64_t start) const { return {x + start}; }
    __device__ __forceinline__ bool aligned() const { return is_aligned(x); }
    __device__ __forceinline__ uint4 vector(unsigned v) const { return reinterpret_cast<const uint4*>(x)[v]; }
    __device__ __forceinline__ float element(unsigned i) const { return to_float(x[i]); }
    __device__ __forceinline__ uint4 vector_again(unsigned v) const { return vector(v); }
    __device__ __forceinline__ float element_again(unsigned i) const { return element(i); }
};

// or the sum of two, which is rounded and stored on the way. `sum` may be the memory of `branch`.
struct Residual {
    const bf16* x;
    const bf16* branch;
    bf16* sum;

    __device__ __forceinline__ Residual row(uint64_t start) const { return {x + start, branch + start, sum + start}; }
    __device__ __forceinline__ bool aligned() const { return is_aligned(x) && is_aligned(branch) && is_aligned(sum); }

    __device__ __forceinline__ uint4 vector(unsigned v) const {
        Vector a = unpack(reinterpret_cast<const uint4*>(x)[v]);
        const Vector b = unpack(reinterpret_cast<const uint4*>(branch)[v]);
#pragma unroll
        for (unsigned k = 0; k < VECTOR; k++) {
            a.at[k] += b.at[k];
        }
        const uint4 packed = pack(a);
        reinterpret_cast<uint4*>(sum)[v] = packed;
        return packed;
    }

    __device__ __forceinline__ float element(unsigned i) const {
        const bf16 rounded = from_float<bf16>(to_float(x[i]) + to_float(branch[i]));
        sum[i] = rounded;
        return to_float(rounded);
    }

    // The thread that stored it reads it.
    __device__ __forceinline__ uint4 vector_again(unsigned v) const { return reinterpret_cast<const uint4*>(sum)[v]; }
    __device__ __forceinline__ float element_again(unsigned i) const { return to_float(sum[i]); }
};

__device__ __forceinline__ float sum_of_squares(uint4 packed) {
    const Vector x = unpack(packed);
    float sum = 0.0f;
#pragma unroll
    for (unsigned k = 0; k < VECTOR; k++) {
        sum += x.at[k] * x.at[k];
    }
    return sum;
}

__device__ __forceinline__ float inverse_rms(float sum_of_squares, unsigned d, float eps) {
    return 1.0f / sqrtf(sum_of_squares / static_cast<float>(d) + eps);
}

__device__ __forceinline__ uint4 normalized(uint4 packed, float scale, const float* weight) {
    Vector x = unpack(packed);
    const Vector w = load_f32(weight);
#pragma unroll
    for (unsigned k = 0; k < VECTOR; k++) {
        x.at[k] = w.at[k] * (x.at[k] * scale);
    }
    return pack(x);
}

template <typename Group, typename Source>
__device__ __forceinline__ void forward_vectors(const Source& source, const float* __restrict__ weight, unsigned d, float eps,
                                                uint4* y) {
    const unsigned me = threadIdx.x % Group::SIZE;
    const unsigned vectors = d / VECTOR;
    uint4 held[Group::HELD];
    float sum = 0.0f;
#pragma unroll
    for (unsigned k = 0; k < Group::HELD; k++) {
        const unsigned v = me + k * Group::SIZE;
        if (v < vectors) {
            held[k] = source.vector(v);
            sum += sum_of_squares(held[k]);
        }
    }
    for (unsigned v = me + Group::HELD * Group::SIZE; v < vectors; v += Group::SIZE) {
        sum += sum_of_squares(source.vector(v));
    }
    const float scale = inverse_rms(Group::sum(sum), d, eps);
#pragma unroll
    for (unsigned k = 0; k < Group::HELD; k++) {
        const unsigned v = me + k * Group::SIZE;
        if (v < vectors) {
            y[v] = normalized(held[k], scale, weight + v * VECTOR);
        }
    }
    for (unsigned v = me + Group::HELD * Group::SIZE; v < vectors; v += Group::SIZE) {
        y[v] = normalized(source.vector_again(v), scale, weight + v * VECTOR);
    }
}

// Any length at any alignment.
template <typename Group, typename Source>
__device__ __forceinline__ void forward_elements(const Source& source, const float* __restrict__ weight, unsigned d,
                                                 float eps, bf16* y) {
    const unsigned me = threadIdx.x % Group::SIZE;
    float sum = 0.0f;
    for (unsigned i = me; i < d; i += Group::SIZE) {
        const float x = source.element(i);
        sum += x * x;
    }
    const float scale = inverse_rms(Group::sum(sum), d, eps);
    for (unsigned i = me; i < d; i += Group::SIZE) {
        y[i] = from_float<bf16>(weight[i] * (source.element_again(i) * scale));
    }
}

template <typename Group, typename Source>
__device__ __forceinline__ void forward_row(const Source& source, const float* weight, unsigned d, float eps, bf16* y) {
    if (d % VECTOR == 0 && source.aligned() && is_aligned(weight) && is_aligned(y)) {
        forward_vectors<Group>(source, weight, d, eps, reinterpret_cast<uint4*>(y));
    } else {
        forward_elements<Group>(source, weight, d, eps, y);
    }
}

template <typename Source>
__device__ __forceinline__ void forward(const Source& source, const float* weight, unsigned rows, unsigned d, float eps,
                                        bf16* y) {
    if (d > SHORT_ROW) {
        const uint64_t start = static_cast<uint64_t>(blockIdx.x) * d;
        forward_row<Block>(source.row(start), weight, d, eps, y + start);
        return;
    }
    const unsigned row = blockIdx.x * (THREADS / WARP_LANES) + threadIdx.x / WARP_LANES;
    if (row < rows) {
        const uint64_t start = static_cast<uint64_t>(row) * d;
        forward_row<Warp>(source.row(start), weight, d, eps, y + start);
    }
}

// What backward adds up over a row.
struct Sums {
    float squares;
    float projection;
};

__device__ __forceinline__ void add(Sums& sums, uint4 packed_dy, uint4 packed_x, const float* weight) {
    const Vector dy = unpack(packed_dy), x = unpack(packed_x), w = load_f32(weight);
#pragma unroll
    for (unsigned k = 0; k < VECTOR; k++) {
        sums.squares += x.at[k] * x.at[k];
        sums.projection += w.at[k] * dy.at[k] * x.at[k];
    }
}

// What the two sums of a row make of it.
struct Factors {
    float scale;
    float projection;

    template <typename Group>
    static __device__ __forceinline__ Factors of(Sums sums, unsigned d, float eps) {
        const float scale = inverse_rms(Group::sum(sums.squares), d, eps);
        return {scale, Group::sum(sums.projection) / static_cast<float>(d) * scale * scale};
    }

    __device__ __forceinline__ float gradient(float w, float dy, float x) const { return scale * (w * dy - x * projection); }
};

__device__ __forceinline__ void add_gradient(uint4* dx, const Factors& factors, uint4 packed_dy, uint4 packed_x,
                                             const float* weight) {
    const Vector dy = unpack(packed_dy), x = unpack(packed_x), w = load_f32(weight);
    Vector sum = unpack(*dx);
#pragma unroll
    for (unsigned k = 0; k < VECTOR; k++) {
        sum.at[k] += factors.gradient(w.at[k], dy.at[k], x.at[k]);
    }
    *dx = pack(sum);
}

template <typename Group>
__device__ __forceinline__ void backward_vectors(const uint4* __restrict__ dy, const uint4* __restrict__ x,
                                                 const float* __restrict__ weight, unsigned d, float eps,
                                                 uint4* __restrict__ dx) {
    const unsigned me = threadIdx.x % Group::SIZE;
    const unsigned vectors = d / VECTOR;
    uint4 held_dy[Group::HELD], held_x[Group::HELD];
    Sums sums = {0.0f, 0.0f};
#pragma unroll
    for (unsigned k = 0; k < Group::HELD; k++) {
        const unsigned v = me + k * Group::SIZE;
        if (v < vectors) {
            held_dy[k] = dy[v];
            held_x[k] = x[v];
            add(sums, held_dy[k], held_x[k], weight + v * VECTOR);
        }
    }
    for (unsigned v = me + Group::HELD * Group::SIZE; v < vectors; v += Group::SIZE) {
        add(sums, dy[v], x[v], weight + v * VECTOR);
    }
    const Factors factors = Factors::of<Group>(sums, d, eps);
#pragma unroll
    for (unsigned k = 0; k < Group::HELD; k++) {
        const unsigned v = me + k * Group::SIZE;
        if (v < vectors) {
            add_gradient(dx + v, factors, held_dy[k], held_x[k], weight + v * VECTOR);
        }
    }
    for (unsigned v = me + Group::HELD * Group::SIZE; v < vectors; v += Group::SIZE) {
        add_gradient(dx + v, factors, dy[v], x[v], weight + v * VECTOR);
    }
}

template <typename Group>
__device__ __forceinline__ void backward_elements(const bf16* __restrict__ dy, const bf16* __restrict__ x,
                                                  const float* __restrict__ weight, unsigned d, float eps,
                                                  bf16* __restrict__ dx) {
    const unsigned me = threadIdx.x % Group::SIZE;
    Sums sums = {0.0f, 0.0f};
    for (unsigned i = me; i < d; i += Group::SIZE) {
        const float x_i = to_float(x[i]);
        sums.squares += x_i * x_i;
        sums.projection += weight[i] * to_float(dy[i]) * x_i;
    }
    const Factors factors = Factors::of<Group>(sums, d, eps);
    for (unsigned i = me; i < d; i += Group::SIZE) {
        dx[i] = from_float<bf16>(to_float(dx[i]) + factors.gradient(weight[i], to_float(dy[i]), to_float(x[i])));
    }
}

template <typename Group>
__device__ __forceinline__ void backward_row(const bf16* dy, const bf16* x, const float* weight, unsigned d, float eps,
                                             bf16* dx) {
    if (d % VECTOR == 0 && is_aligned(dy) && is_aligned(x) && is_aligned(weight) && is_aligned(dx)) {
        backward_vectors<Group>(reinterpret_cast<const uint4*>(dy), reinterpret_cast<const uint4*>(x), weight, d, eps,
                                reinterpret_cast<uint4*>(dx));
    } else {
        backward_elements<Group>(dy, x, weight, d, eps, dx);
    }
}

}  // namespace

KERNEL(256, rms_norm_forward_bf16)
(const bf16* x, const float* weight, unsigned rows, unsigned d, float eps, bf16* y) {
    forward(Stored{x}, weight, rows, d, eps, y);
}

KERNEL(256, rms_norm_forward_residual_bf16)
(const bf16* x, const bf16* branch, const float* weight, unsigned rows, unsigned d, float eps, bf16* sum, bf16* y) {
    forward(Residual{x, branch, sum}, weight, rows, d, eps, y);
}

KERNEL(256, rms_norm_backward_bf16)
(const bf16* dy, const bf16* x, const float* weight, unsigned rows, unsigned d, float eps, bf16* dx) {
    if (d > SHORT_ROW) {
        const uint64_t start = static_cast<uint64_t>(blockIdx.x) * d;
        backward_row<Block>(dy + start, x + start, weight, d, eps, dx + start);
        return;
    }
    const unsigned row = blockIdx.x * (THREADS / WARP_LANES) + threadIdx.x / WARP_LANES;
    if (row < rows) {
        const uint64_t start = static_cast<uint64_t>(row) * d;
        backward_row<Warp>(dy + start, x + start, weight, d, eps, dx + start);
    }
}
