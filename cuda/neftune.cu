// NEFTune: `x += scale noise` on the token embeddings x: [n / d, d], with a scale for each row and noise in [-1, 1).
//
// A thread takes the four elements of one Philox call at a time: element e has the upper 24 bits of word e % 4 of the call
// with counter (e / 4, 0, 0). Both operations round once, so a sum has the bits of the CPU's before it is rounded to bf16.
// 4 bytes an element; it is made once for each micro-batch. Any grid.
//
// Source: arXiv:2310.05914; src/ops/neftune.rs makes the same noise.

#include "common.cuh"
#include "philox.cuh"

KERNEL(256, neftune_forward_bf16)
(bf16* __restrict__ x, const float* __restrict__ scales, unsigned d, uint64_t n, unsigned key0, unsigned key1) {
    const uint64_t stride = static_cast<uint64_t>(gridDim.x) * blockDim.x;
    for (uint64_t call = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x; call * 4 < n; call += stride) {
        const uint4 counter = make_uint4(static_cast<unsigned>(call), static_cast<unsigned>(call >> 32), 0, 0);
        const uint4 numbers = philox<10>(make_uint2(key0, key1), counter);
        const unsigned words[4] = {numbers.x, numbers.y, numbers.z, numbers.w};
#pragma unroll
        for (unsigned j = 0; j < 4; j++) {
            const uint64_t i = call * 4 + j;
            if (i < n) {
                const float noise = static_cast<float>(words[j] >> 8) * (1.0f / 8388608.0f) - 1.0f;
                x[i] = from_float<bf16>(__fadd_rn(to_float(x[i]), __fmul_rn(scales[i / d], noise)));
            }
        }
    }
}
