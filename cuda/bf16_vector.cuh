// Neighbouring bf16 that move in one access: eight in 16 bytes, or one where a size or an address allows no more.
#pragma once

#include "common.cuh"

template <unsigned COUNT>
struct Bf16Vector;

template <>
struct Bf16Vector<8> {
    static constexpr unsigned WIDTH = 8;
    uint4 packed;

    static __device__ __forceinline__ Bf16Vector load(const bf16* from) {
        return {*reinterpret_cast<const uint4*>(from)};
    }

    static __device__ __forceinline__ Bf16Vector round(const float (&values)[WIDTH]) {
        return {make_uint4(pack_bf16(values[0], values[1]), pack_bf16(values[2], values[3]),
                           pack_bf16(values[4], values[5]), pack_bf16(values[6], values[7]))};
    }

    __device__ __forceinline__ void store(bf16* to) const { *reinterpret_cast<uint4*>(to) = packed; }

    __device__ __forceinline__ void widen(float (&values)[WIDTH]) const {
        const unsigned words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
        for (unsigned i = 0; i < 4; i++) {
            values[2 * i] = low_bf16(words[i]);
            values[2 * i + 1] = high_bf16(words[i]);
        }
    }
};

template <>
struct Bf16Vector<1> {
    static constexpr unsigned WIDTH = 1;
    bf16 value;

    static __device__ __forceinline__ Bf16Vector load(const bf16* from) { return {*from}; }
    static __device__ __forceinline__ Bf16Vector round(const float (&values)[WIDTH]) {
        return {from_float<bf16>(values[0])};
    }
    __device__ __forceinline__ void store(bf16* to) const { *to = value; }
    __device__ __forceinline__ void widen(float (&values)[WIDTH]) const { values[0] = to_float(value); }
};

// The f32 that belong to the elements of a vector; eight have to be 16-byte aligned.
__device__ __forceinline__ void load_floats(const float* from, float (&values)[8]) {
    const float4 low = reinterpret_cast<const float4*>(from)[0];
    const float4 high = reinterpret_cast<const float4*>(from)[1];
    const float all[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (unsigned i = 0; i < 8; i++) {
        values[i] = all[i];
    }
}

__device__ __forceinline__ void load_floats(const float* from, float (&values)[1]) { values[0] = *from; }

// Whether each of the addresses takes 16-byte accesses.
template <typename... T>
__device__ __forceinline__ bool are_aligned(const T*... addresses) {
    return (... | reinterpret_cast<uintptr_t>(addresses)) % 16 == 0;
}

// Shares the elements 0..n among all threads of the grid: `body(Bf16Vector<8>{}, i)` has the eight from i on to do, and
// `body(Bf16Vector<1>{}, i)` the one. Without `aligned` each goes alone.
template <typename Body>
__device__ __forceinline__ void for_each_vector(uint64_t n, bool aligned, Body body) {
    const uint64_t thread = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const uint64_t threads = static_cast<uint64_t>(gridDim.x) * blockDim.x;
    const uint64_t vectors = aligned ? n / 8 : 0;
    for (uint64_t i = thread; i < vectors; i += threads) {
        body(Bf16Vector<8>{}, 8 * i);
    }
    for (uint64_t i = 8 * vectors + thread; i < n; i += threads) {
        body(Bf16Vector<1>{}, i);
    }
}
