// The part of CUDA C++ that our kernels use, for a host compiler: kernel files that include common.cuh compile as C++17.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "machine.h"
#include "vector_types.h"

// --- Declarations ---------------------------------------------------------------------------------------------------------

// build.rs finds the kernels of a file by the `threads_of_` constants, after the preprocessor.
#define KERNEL(threads, name)                       \
    constexpr unsigned threads_of_##name = threads; \
    __attribute__((noinline)) void name

// The address of a function's own static variable tells its shared arrays apart, also between instances of a template.
#define SHARED(type, name, count)                \
    static const char declaration_of_##name = 0; \
    type(&name)[count] =                         \
        *static_cast<type(*)[count]>(emulator::shared_array(&declaration_of_##name, #name, sizeof(type) * (count)))

#define SHARED_DYNAMIC(type, name) type* const name = static_cast<type*>(emulator::dynamic_shared())

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#define __restrict__ __restrict

#define threadIdx (emulator::thread_index())
#define blockIdx (emulator::block_index())
#define blockDim (emulator::block_size())
#define gridDim (emulator::grid_size())

// --- Barriers and warp operations -----------------------------------------------------------------------------------------

inline void __syncthreads(emulator::Site site = emulator::here()) { emulator::block_barrier(site); }

inline void __syncwarp(unsigned mask = ~0u, emulator::Site site = emulator::here()) { emulator::warp_barrier(mask, site); }

namespace emulator {

template <typename T>
T shuffle_value(Shuffle kind, unsigned mask, T value, int operand, int width, Site site) {
    static_assert(std::is_arithmetic<T>::value && (sizeof(T) == 4 || sizeof(T) == 8), "a shuffle moves 4 or 8 bytes");
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    bits = shuffle(kind, mask, bits, operand, width, site);
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace emulator

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, emulator::Site site = emulator::here()) {
    return emulator::shuffle_value(emulator::Shuffle::FromLane, mask, value, source, width, site);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32, emulator::Site site = emulator::here()) {
    return emulator::shuffle_value(emulator::Shuffle::Up, mask, value, static_cast<int>(distance), width, site);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32, emulator::Site site = emulator::here()) {
    return emulator::shuffle_value(emulator::Shuffle::Down, mask, value, static_cast<int>(distance), width, site);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, emulator::Site site = emulator::here()) {
    return emulator::shuffle_value(emulator::Shuffle::Xor, mask, value, lane_mask, width, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, emulator::Site site = emulator::here()) {
    return emulator::ballot(mask, predicate != 0, site);
}

inline int __any_sync(unsigned mask, int predicate, emulator::Site site = emulator::here()) {
    return emulator::ballot(mask, predicate != 0, site) != 0;
}

inline int __all_sync(unsigned mask, int predicate, emulator::Site site = emulator::here()) {
    return emulator::ballot(mask, predicate == 0, site) == 0;
}

// --- Memory ---------------------------------------------------------------------------------------------------------------

// Never a function of its own, which watched kernels would share with others: the linker keeps one of each.
template <typename T>
__attribute__((always_inline)) inline T __ldg(const T* pointer) {
    return *pointer;
}

// A thread is never interrupted within one of these, so that nothing has to be locked. The emulator watches them itself: the
// compiler would report them as plain accesses.
#define EMULATOR_ATOMIC __attribute__((noinline, no_sanitize("thread")))

template <typename T>
EMULATOR_ATOMIC T atomicAdd(T* address, typename std::common_type<T>::type value) {
    static_assert(std::is_integral<T>::value, "no floating-point atomics: their order is not fixed");
    emulator::watch_access(emulator::Access::Atomic, address, sizeof(T));
    const T old = *address;
    *address = old + value;
    return old;
}

template <typename T>
EMULATOR_ATOMIC T atomicMin(T* address, typename std::common_type<T>::type value) {
    emulator::watch_access(emulator::Access::Atomic, address, sizeof(T));
    const T old = *address;
    *address = value < old ? value : old;
    return old;
}

template <typename T>
EMULATOR_ATOMIC T atomicMax(T* address, typename std::common_type<T>::type value) {
    emulator::watch_access(emulator::Access::Atomic, address, sizeof(T));
    const T old = *address;
    *address = old < value ? value : old;
    return old;
}

// --- Arithmetic -----------------------------------------------------------------------------------------------------------

inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline int __float_as_int(float value) { return static_cast<int>(__float_as_uint(value)); }
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<unsigned>(bits)); }

// The host compiles with -ffp-contract=off, so that plain operators round once each, as these do.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline int __float2int_rn(float a) { return static_cast<int>(std::nearbyint(a)); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float a) { return 1.0f / std::sqrt(a); }

// The C library declares functions of these names.
#define __expf expf
#define __logf logf
#define __sinf sinf
#define __cosf cosf
#define __powf powf

inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }
inline int __popc(unsigned a) { return __builtin_popcount(a); }
inline int __popcll(unsigned long long a) { return __builtin_popcountll(a); }
inline int __clz(int a) { return a == 0 ? 32 : __builtin_clz(static_cast<unsigned>(a)); }
inline int __clzll(long long a) { return a == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(a)); }
inline int __ffs(int a) { return __builtin_ffs(a); }

inline unsigned __brev(unsigned a) {
    unsigned reversed = 0;
    for (int i = 0; i < 32; i++) {
        reversed |= (a >> i & 1) << (31 - i);
    }
    return reversed;
}

// Each hexadecimal digit of `selector` picks one of the 8 bytes of (high, low); its bit 3 spreads that byte's sign.
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) {
        const unsigned digit = selector >> (4 * i) & 0xf;
        unsigned byte = bytes >> (8 * (digit & 7)) & 0xff;
        if (digit & 8) {
            byte = byte & 0x80 ? 0xff : 0;
        }
        result |= byte << (8 * i);
    }
    return result;
}

template <typename A, typename B>
constexpr typename std::common_type<A, B>::type min(A a, B b) {
    using T = typename std::common_type<A, B>::type;
    return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}

template <typename A, typename B>
constexpr typename std::common_type<A, B>::type max(A a, B b) {
    using T = typename std::common_type<A, B>::type;
    return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}

// --- 16-bit floats --------------------------------------------------------------------------------------------------------

namespace emulator {

inline uint16_t bf16_bits_from_float(float value) {
    const unsigned bits = __float_as_uint(value);
    if (value != value) {
        return 0x7fff;  // the NaN that the GPU's conversion gives
    }
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float float_from_f16_bits(uint16_t half) {
    const unsigned sign = static_cast<unsigned>(half & 0x8000) << 16;
    const unsigned exponent = half >> 10 & 0x1f;
    const unsigned mantissa = half & 0x3ff;
    if (exponent == 0x1f) {
        return __uint_as_float(sign | 0x7f800000 | mantissa << 13);
    }
    if (exponent == 0) {
        const float magnitude = std::ldexp(static_cast<float>(mantissa), -24);
        return sign ? -magnitude : magnitude;
    }
    return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
}

inline uint16_t f16_bits_from_float(float value) {
    const unsigned bits = __float_as_uint(value);
    const unsigned sign = bits >> 16 & 0x8000;
    const float magnitude = __uint_as_float(bits & 0x7fffffff);
    if (value != value) {
        return 0x7fff;
    }
    if (magnitude >= 65520.0f) {
        return static_cast<uint16_t>(sign | 0x7c00);
    }
    if (magnitude < 6.103515625e-05f) {
        // A subnormal is a multiple of 2^-24; the default rounding mode takes ties to even.
        return static_cast<uint16_t>(sign | static_cast<unsigned>(std::nearbyint(std::ldexp(magnitude, 24))));
    }
    const unsigned rebased = __float_as_uint(magnitude) - (112u << 23);
    return static_cast<uint16_t>(sign | (rebased + 0xfff + (rebased >> 13 & 1)) >> 13);
}

}  // namespace emulator
