// The CUDA spellings that kernels use, for a host compiler.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "block.h"
#include "vector_types.h"

#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __restrict__ __restrict
#define __align__(bytes) alignas(bytes)

// A kernel is a function, with its number of threads beside it for the table of kernels.
#define KERNEL(threads, name)                     \
    static constexpr unsigned name##_threads = threads; \
    static void name

// Each declaration is a place of its own in the shared memory of the block.
#define SHARED(type, name, count)                                                                           \
    static const char name##_site = 0;                                                                      \
    auto& name = *static_cast<type(*)[count]>(emulator::shared_array(&name##_site, sizeof(type[count])))

#define SHARED_DYNAMIC(type, name) type* const name = static_cast<type*>(emulator::dynamic_shared_memory())

#define threadIdx (emulator::current_thread->thread_idx)
#define blockIdx (emulator::current_block_idx)
#define blockDim (emulator::current_block_dim)
#define gridDim (emulator::current_grid_dim)

using std::max;
using std::min;

inline void __syncthreads() { emulator::wait_at_barrier(); }

inline void __syncwarp(unsigned lanes = 0xffffffffu) {
    emulator::join_warp_operation(lanes, [](void* const*, unsigned) {}, nullptr);
}

namespace emulator {

inline unsigned current_lane() { return current_thread->index % 32; }

template <typename To, typename From>
inline To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "a cast of bits keeps the size");
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

template <typename T>
struct Shuffle {
    T value;
    unsigned source_lane;
    T result;
};

// Each lane gets the value of the lane it names.
template <typename T>
inline T shuffle(unsigned lanes, T value, unsigned source_lane) {
    Shuffle<T> mine{value, source_lane, value};
    const auto exchange = [](void* const* operands, unsigned lanes) {
        for (unsigned lane = 0; lane < 32; lane++) {
            if ((lanes >> lane & 1) == 0) {
                continue;
            }
            auto& shuffle = *static_cast<Shuffle<T>*>(operands[lane]);
            if ((lanes >> shuffle.source_lane & 1) == 0) {
                fault("a shuffle reads a lane outside its mask");
            }
            shuffle.result = static_cast<Shuffle<T>*>(operands[shuffle.source_lane])->value;
        }
    };
    join_warp_operation(lanes, exchange, &mine);
    return mine.result;
}

struct Ballot {
    bool predicate;
    unsigned result;
};

inline unsigned ballot(unsigned lanes, bool predicate) {
    Ballot mine{predicate, 0};
    const auto count_votes = [](void* const* operands, unsigned lanes) {
        unsigned result = 0;
        for (unsigned lane = 0; lane < 32; lane++) {
            if (lanes >> lane & 1) {
                result |= static_cast<unsigned>(static_cast<Ballot*>(operands[lane])->predicate) << lane;
            }
        }
        for (unsigned lane = 0; lane < 32; lane++) {
            if (lanes >> lane & 1) {
                static_cast<Ballot*>(operands[lane])->result = result;
            }
        }
    };
    join_warp_operation(lanes, count_votes, &mine);
    return mine.result;
}

inline uint16_t bf16_bits_from_float(float value) {
    const auto bits = bit_cast<uint32_t>(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return 0x7fff;  // as cvt.rn.bf16.f32 gives for a NaN
    }
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

inline float float_from_f16_bits(uint16_t bits) { return static_cast<float>(bit_cast<_Float16>(bits)); }

inline uint16_t f16_bits_from_float(float value) { return bit_cast<uint16_t>(static_cast<_Float16>(value)); }

}  // namespace emulator

template <typename T>
inline T __shfl_sync(unsigned lanes, T value, unsigned source_lane) {
    return emulator::shuffle(lanes, value, source_lane % 32);
}

template <typename T>
inline T __shfl_xor_sync(unsigned lanes, T value, unsigned distance) {
    return emulator::shuffle(lanes, value, (emulator::current_lane() ^ distance) % 32);
}

template <typename T>
inline T __shfl_up_sync(unsigned lanes, T value, unsigned distance) {
    const unsigned lane = emulator::current_lane();
    return emulator::shuffle(lanes, value, lane < distance ? lane : lane - distance);
}

template <typename T>
inline T __shfl_down_sync(unsigned lanes, T value, unsigned distance) {
    const unsigned lane = emulator::current_lane();
    return emulator::shuffle(lanes, value, lane + distance > 31 ? lane : lane + distance);
}

inline unsigned __ballot_sync(unsigned lanes, bool predicate) { return emulator::ballot(lanes, predicate); }
inline bool __any_sync(unsigned lanes, bool predicate) { return emulator::ballot(lanes, predicate) != 0; }
inline bool __all_sync(unsigned lanes, bool predicate) { return emulator::ballot(lanes, !predicate) == 0; }

template <typename T>
inline T __ldg(const T* address) {
    return *address;
}

inline unsigned __float_as_uint(float value) { return emulator::bit_cast<unsigned>(value); }
inline float __uint_as_float(unsigned bits) { return emulator::bit_cast<float>(bits); }
inline int __float_as_int(float value) { return emulator::bit_cast<int>(value); }
inline float __int_as_float(int bits) { return emulator::bit_cast<float>(bits); }

// The host is compiled without contraction, so that each of these rounds once.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float rsqrtf(float a) { return 1.0f / std::sqrt(a); }
inline float __fdividef(float a, float b) { return a / b; }

// glibc has functions of these names that headers do not declare as CUDA's.
#define __expf expf
#define __logf logf

inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __clz(unsigned bits) { return bits == 0 ? 32 : __builtin_clz(bits); }
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }

inline unsigned __brev(unsigned bits) {
    unsigned reversed = 0;
    for (int i = 0; i < 32; i++) {
        reversed |= (bits >> i & 1) << (31 - i);
    }
    return reversed;
}

// Four bytes chosen out of the eight of `high:low` by the nibbles of `selector`.
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) {
        const unsigned source = selector >> (4 * i) & 7;
        result |= static_cast<unsigned>(bytes >> (8 * source) & 0xff) << (8 * i);
    }
    return result;
}

// A launch runs on one thread of the host, so that nothing comes between the read and the write.
template <typename T>
inline T atomicAdd(T* address, T value) {
    const T before = *address;
    *address = before + value;
    return before;
}

template <typename T>
inline T atomicMin(T* address, T value) {
    const T before = *address;
    *address = std::min(before, value);
    return before;
}

template <typename T>
inline T atomicMax(T* address, T value) {
    const T before = *address;
    *address = std::max(before, value);
    return before;
}
