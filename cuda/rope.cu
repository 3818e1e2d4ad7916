// Rotary position embedding of queries and keys, in place; the two halves of a head are rotated against each other.
//
//   (x_i, x_{i + E/2}) -> (x_i cos - x_{i + E/2} sin, x_{i + E/2} cos + x_i sin),  sin times `sign`: 1 forward, -1 backward
//
// A thread turns pairs of one head of one row, a grid-stride loop over rows, then heads, then pairs; any grid. Where a half
// head is a multiple of eight it takes eight pairs at a time, by 16-byte accesses. 4 bytes moved an element, the angles of a
// row come from the cache. Source: arXiv:2104.09864.

#include "common.cuh"

namespace {

constexpr unsigned VECTOR = 8;

struct Pair {
    float low, high;
};

__device__ __forceinline__ Pair rotated(float low, float high, float cos, float sin) {
    return {low * cos - high * sin, high * cos + low * sin};
}

// Two bf16 of each half at once.
__device__ __forceinline__ void rotate_two(unsigned& low, unsigned& high, const float* cos, const float* sin, float sign) {
    const Pair first = rotated(low_bf16(low), low_bf16(high), cos[0], sign * sin[0]);
    const Pair second = rotated(high_bf16(low), high_bf16(high), cos[1], sign * sin[1]);
    low = pack_bf16(first.low, second.low);
    high = pack_bf16(first.high, second.high);
}

__device__ __forceinline__ void rotate_vector(bf16* low, bf16* high, const float* cos, const float* sin, float sign) {
    uint4 lows = *reinterpret_cast<const uint4*>(low);
    uint4 highs = *reinterpret_cast<const uint4*>(high);
    rotate_two(lows.x, highs.x, cos, sin, sign);
    rotate_two(lows.y, highs.y, cos + 2, sin + 2, sign);
    rotate_two(lows.z, highs.z, cos + 4, sin + 4, sign);
    rotate_two(lows.w, highs.w, cos + 6, sin + 6, sign);
    *reinterpret_cast<uint4*>(low) = lows;
    *reinterpret_cast<uint4*>(high) = highs;
}

__device__ __forceinline__ bool is_aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

}  // namespace

KERNEL(256, rope_rotate_bf16)
(bf16* q, bf16* k, const unsigned* __restrict__ positions, const float* __restrict__ cos, const float* __restrict__ sin,
 unsigned rows, unsigned q_heads, unsigned k_heads, unsigned half, float sign) {
    const bool by_vector = half % VECTOR == 0 && is_aligned(q) && is_aligned(k);
    const unsigned step = by_vector ? VECTOR : 1;
    const unsigned steps = half / step;
    const unsigned heads = q_heads + k_heads;
    const uint64_t work = static_cast<uint64_t>(rows) * heads * steps;
    const uint64_t stride = static_cast<uint64_t>(gridDim.x) * blockDim.x;
    for (uint64_t i = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < work; i += stride) {
        const unsigned first = static_cast<unsigned>(i % steps) * step;
        const uint64_t head_of_all = i / steps;
        const uint64_t row = head_of_all / heads;
        const unsigned head = static_cast<unsigned>(head_of_all % heads);
        bf16* const start = head < q_heads ? q + (row * q_heads + head) * 2 * half
                                           : k + (row * k_heads + head - q_heads) * 2 * half;
        const uint64_t angle = static_cast<uint64_t>(positions[row]) * half + first;
        bf16* const low = start + first;
        bf16* const high = low + half;
        if (by_vector) {
            rotate_vector(low, high, cos + angle, sin + angle, sign);
        } else {
            const Pair pair = rotated(to_float(*low), to_float(*high), cos[angle], sign * sin[angle]);
            *low = from_float<bf16>(pair.low);
            *high = from_float<bf16>(pair.high);
        }
    }
}
