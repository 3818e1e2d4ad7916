// What every kernel file includes: how a kernel and its shared memory are declared, the 16-bit float types, and sums and
// maxima over a warp and a block.
//
// The same kernels compile with nvcc and, through emulator/host/, as plain C++ for the tests. Kernels therefore say KERNEL,
// SHARED and SHARED_DYNAMIC instead of the CUDA keywords; everything else keeps its CUDA spelling.
#pragma once

#ifdef __CUDACC__

#include <cmath>
#include <cstdint>

// KERNEL(256, rms_norm_forward_bf16)(const bf16* x, ...) { ... } is launched with exactly 256 threads a block.
#define KERNEL(threads, name) extern "C" __global__ void __launch_bounds__(threads) name

// SHARED(float, partial, 32); declares `float partial[32]`, 16-byte aligned.
#define SHARED(type, name, count) __shared__ __align__(16) type name[count]

// SHARED_DYNAMIC(bf16, tile); declares `bf16* tile`, the start of the shared memory that the launch asked for.
#define SHARED_DYNAMIC(type, name)                                         \
    extern __shared__ __align__(128) unsigned char shared_of_the_launch[]; \
    type* const name = reinterpret_cast<type*>(shared_of_the_launch)

#else
#include "emulator/host/cuda_on_host.h"
#endif

constexpr unsigned WARP_LANES = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

struct bf16 {
    uint16_t bits;
};

struct f16 {
    uint16_t bits;
};

__device__ __forceinline__ float to_float(float value) { return value; }

__device__ __forceinline__ float to_float(bf16 value) { return __uint_as_float(static_cast<unsigned>(value.bits) << 16); }

__device__ __forceinline__ float to_float(f16 value) {
#ifdef __CUDACC__
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
#else
    return emulator::float_from_f16_bits(value.bits);
#endif
}

// Rounds to the nearest T, ties to even; a NaN stays a NaN.
template <typename T>
__device__ __forceinline__ T from_float(float value);

template <>
__device__ __forceinline__ float from_float<float>(float value) {
    return value;
}

template <>
__device__ __forceinline__ bf16 from_float<bf16>(float value) {
#ifdef __CUDACC__
    bf16 result;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
#else
    return bf16{emulator::bf16_bits_from_float(value)};
#endif
}

template <>
__device__ __forceinline__ f16 from_float<f16>(float value) {
#ifdef __CUDACC__
    f16 result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
#else
    return f16{emulator::f16_bits_from_float(value)};
#endif
}

// Two bf16 in one register, as they lie in memory: `low` comes first.
__device__ __forceinline__ unsigned pack_bf16(float low, float high) {
#ifdef __CUDACC__
    unsigned result;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
#else
    return emulator::bf16_bits_from_float(low) | static_cast<unsigned>(emulator::bf16_bits_from_float(high)) << 16;
#endif
}

__device__ __forceinline__ float low_bf16(unsigned packed) { return __uint_as_float(packed << 16); }

__device__ __forceinline__ float high_bf16(unsigned packed) { return __uint_as_float(packed & 0xffff0000u); }

// How two values become one.
struct Sum {
    template <typename T>
    __device__ __forceinline__ T operator()(T a, T b) const {
        return a + b;
    }
};

struct Largest {
    __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Folds the 32 values of a warp, the same bits in each lane. All lanes must call it.
template <typename Fold, typename T>
__device__ __forceinline__ T warp_fold(T value, Fold fold) {
#pragma unroll
    for (unsigned distance = WARP_LANES / 2; distance > 0; distance /= 2) {
        value = fold(value, __shfl_xor_sync(ALL_LANES, value, distance));
    }
    return value;
}

// Folds the values of a block of THREADS threads in a fixed order, the same bits in each thread; `identity` changes nothing.
// All threads must call it; it may be called again at once, since it returns when every thread has read the result.
template <unsigned THREADS, typename Fold, typename T>
__device__ __forceinline__ T block_fold(T value, T identity, Fold fold) {
    constexpr unsigned WARPS = THREADS / WARP_LANES;
    static_assert(THREADS % WARP_LANES == 0 && WARPS <= WARP_LANES, "a block has 1 to 32 whole warps");
    value = warp_fold(value, fold);
    if (WARPS == 1) {
        return value;
    }
    SHARED(T, of_warp, WARPS);
    const unsigned lane = threadIdx.x % WARP_LANES;
    if (lane == 0) {
        of_warp[threadIdx.x / WARP_LANES] = value;
    }
    __syncthreads();
    value = warp_fold(lane < WARPS ? of_warp[lane] : identity, fold);
    __syncthreads();
    return value;
}

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
    return warp_fold(value, Sum{});
}

__device__ __forceinline__ float warp_max(float value) { return warp_fold(value, Largest{}); }

template <unsigned THREADS, typename T>
__device__ __forceinline__ T block_sum(T value) {
    return block_fold<THREADS>(value, T(0), Sum{});
}

template <unsigned THREADS>
__device__ __forceinline__ float block_max(float value) {
    return block_fold<THREADS>(value, -INFINITY, Largest{});
}
