// Dropout whose mask is a function of a key, a stream and the element, so that it is never stored: whoever needs it makes
// the same mask again.
//
// An element is kept where its 16 random bits are at least `threshold`. One Philox call gives those of eight elements: for
// element e its counter is (e / 8, stream), and e % 8 counts the halves of its four words, low half first.
#pragma once

#include "common.cuh"
#include "philox.cuh"

struct Dropout {
    uint2 key, stream;
    unsigned threshold;
    float keep_scale;

    // For each of the eight bf16 from element `first` on, 16 bits that are set where it is kept.
    __device__ __forceinline__ uint4 mask(uint64_t first) const {
        if (threshold == 0) {
            return make_uint4(~0u, ~0u, ~0u, ~0u);
        }
        if (first % 8 == 0) {
            // With all ten rounds unrolled their keys take 20 registers, and lora_down spills (nvcc 13.0, sm_120).
            const uint4 words = numbers<5>(first);
            return make_uint4(mask_of(words.x), mask_of(words.y), mask_of(words.z), mask_of(words.w));
        }
        // A row that starts in the middle of a call's eight: rare, so short rather than fast.
        unsigned kept = 0;
#pragma unroll 1
        for (unsigned j = 0; j < 8; j++) {
            // As in `keeps`, whose call makes lora_down spill (nvcc 13.0, sm_120).
            const uint4 words = numbers<1>(first + j);
            const unsigned place = static_cast<unsigned>((first + j) % 8);
            const unsigned pair = place < 4 ? (place < 2 ? words.x : words.y) : (place < 6 ? words.z : words.w);
            kept |= ((pair >> 16 * (place % 2) & 0xffffu) >= threshold ? 1u : 0u) << j;
        }
        return make_uint4(mask_of_bits(kept), mask_of_bits(kept >> 2), mask_of_bits(kept >> 4), mask_of_bits(kept >> 6));
    }

    __device__ __forceinline__ bool keeps(uint64_t element) const {
        const uint4 words = numbers<1>(element);
        const unsigned place = static_cast<unsigned>(element % 8);
        const unsigned pair = place < 4 ? (place < 2 ? words.x : words.y) : (place < 6 ? words.z : words.w);
        return (pair >> 16 * (place % 2) & 0xffffu) >= threshold;
    }

    __device__ __forceinline__ uint4 apply(uint4 x, uint64_t first) const {
        const uint4 kept = mask(first);
        return make_uint4(x.x & kept.x, x.y & kept.y, x.z & kept.z, x.w & kept.w);
    }

 private:
    // The eight numbers among which is that of `element`.
    template <unsigned UNROLLED>
    __device__ __forceinline__ uint4 numbers(uint64_t element) const {
        const uint64_t call = element / 8;
        const uint4 counter = make_uint4(static_cast<unsigned>(call), static_cast<unsigned>(call >> 32), stream.x, stream.y);
        return philox<UNROLLED>(key, counter);
    }

    __device__ __forceinline__ unsigned mask_of(unsigned two_numbers) const {
        const unsigned low = (two_numbers << 16) >= (threshold << 16) ? 0x0000ffffu : 0;
        const unsigned high = two_numbers >= (threshold << 16) ? 0xffff0000u : 0;
        return low | high;
    }

    static __device__ __forceinline__ unsigned mask_of_bits(unsigned two_bits) {
        return (two_bits & 1 ? 0x0000ffffu : 0) | (two_bits & 2 ? 0xffff0000u : 0);
    }
};
