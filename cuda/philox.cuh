// Philox 4x32-10: random numbers as a function of a key and a counter, the same bits as src/ops/philox.rs.
//
// Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
#pragma once

#include "common.cuh"

// Four random words for `counter` under `key`. UNROLLED is how many of the rounds are unrolled.
template <unsigned UNROLLED>
__device__ __forceinline__ uint4 philox(uint2 key, uint4 counter) {
    constexpr unsigned ROUNDS = 10;
    uint4 c = counter;
#pragma unroll UNROLLED
    for (unsigned round = 0; round < ROUNDS; round++) {
        const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c.x;
        const uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * c.z;
        c = make_uint4(static_cast<unsigned>(p1 >> 32) ^ c.y ^ key.x, static_cast<unsigned>(p1),
                       static_cast<unsigned>(p0 >> 32) ^ c.w ^ key.y, static_cast<unsigned>(p0));
        key.x += 0x9E3779B9u;
        key.y += 0xBB67AE85u;
    }
    return c;
}
