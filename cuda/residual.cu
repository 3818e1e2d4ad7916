// The residual connection, in the memory of the branch: branch += x.
//
// A thread takes eight neighbouring elements at a time by 16-byte accesses, in a grid-stride loop; any grid. 6 bytes moved an
// element.

#include "common.cuh"

namespace {

constexpr unsigned VECTOR = 8;

__device__ __forceinline__ unsigned sum_of_two(unsigned a, unsigned b) {
    return pack_bf16(low_bf16(a) + low_bf16(b), high_bf16(a) + high_bf16(b));
}

}  // namespace

KERNEL(256, residual_forward_bf16)(const bf16* __restrict__ x, bf16* __restrict__ branch, uint64_t n) {
    const uint64_t me = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const uint64_t stride = static_cast<uint64_t>(gridDim.x) * blockDim.x;
    const bool aligned = (reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(branch)) % 16 == 0;
    const uint64_t vectors = aligned ? n / VECTOR : 0;
    for (uint64_t v = me; v < vectors; v += stride) {
        const uint4 a = reinterpret_cast<const uint4*>(x)[v];
        const uint4 b = reinterpret_cast<const uint4*>(branch)[v];
        reinterpret_cast<uint4*>(branch)[v] =
            make_uint4(sum_of_two(a.x, b.x), sum_of_two(a.y, b.y), sum_of_two(a.z, b.z), sum_of_two(a.w, b.w));
    }
    for (uint64_t i = vectors * VECTOR + me; i < n; i += stride) {
        branch[i] = from_float<bf16>(to_float(x[i]) + to_float(branch[i]));
    }
}
