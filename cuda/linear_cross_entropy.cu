// The loss of rows of logits, and its gradient in the place of the logits.
//
//   loss = logsumexp(z) - z_label,  confidence = max softmax(z),  prediction = the lowest index of the largest logit
//   dz = d_loss (softmax(z) - onehot(label)), in bf16 over the first half of the row's own memory
//
// A block of 1024 threads takes a row: grid = rows. It reads the row once for the maximum and the sum together and, backward,
// once more for dz: 4 bytes read an element forward, 8 read (half of them mostly from the L2 cache) and 2 written backward.
// Sums are in f32 in a fixed order. Source: arXiv:2411.09009.

#include "common.cuh"

namespace {

constexpr unsigned THREADS = 1024;
constexpr unsigned WARPS = THREADS / WARP_LANES;

// What a softmax needs to know of some logits: the largest and where it lies, and the sum of e^(z - largest).
struct Peak {
    float largest;
    unsigned index;
    float sum;
};

constexpr unsigned NOWHERE = 0xffffffffu;

__device__ __forceinline__ Peak no_logits() { return {-INFINITY, NOWHERE, 0.0f}; }

__device__ __forceinline__ float scaled_sum(const Peak& peak, float largest) {
    return peak.sum == 0.0f ? 0.0f : peak.sum * __expf(peak.largest - largest);
}

// Both together; the same whichever comes first.
__device__ __forceinline__ Peak merged(const Peak& a, const Peak& b) {
    const bool a_wins = a.largest > b.largest || (a.largest == b.largest && a.index < b.index);
    const float largest = a_wins ? a.largest : b.largest;
    return {largest, a_wins ? a.index : b.index, scaled_sum(a, largest) + scaled_sum(b, largest)};
}

__device__ __forceinline__ Peak warp_peak(Peak peak) {
#pragma unroll
    for (unsigned distance = WARP_LANES / 2; distance > 0; distance /= 2) {
        const Peak other = {__shfl_xor_sync(ALL_LANES, peak.largest, distance),
                            __shfl_xor_sync(ALL_LANES, peak.index, distance),
                            __shfl_xor_sync(ALL_LANES, peak.sum, distance)};
        peak = merged(peak, other);
    }
    return peak;
}

// The peak of the whole row, in every thread.
__device__ __forceinline__ Peak row_peak(const float* __restrict__ z, unsigned vocab) {
    Peak mine = no_logits();
    for (unsigned i = threadIdx.x; i < vocab; i += THREADS) {
        const float value = z[i];
        if (value > mine.largest) {
            mine.sum = scaled_sum(mine, value) + 1.0f;
            mine.largest = value;
            mine.index = i;
        } else {
            mine.sum += __expf(value - mine.largest);
        }
    }
    SHARED(Peak, of_warp, WARPS);
    mine = warp_peak(mine);
    const unsigned lane = threadIdx.x % WARP_LANES;
    if (lane == 0) {
        of_warp[threadIdx.x / WARP_LANES] = mine;
    }
    __syncthreads();
    return warp_peak(of_warp[lane]);
}

// Writes the results of the row and gives its log-sum-exp. To be called before the logits are overwritten.
__device__ __forceinline__ float write_results(const Peak& peak, const float* z, const unsigned* labels, float* loss,
                                               float* confidence, unsigned* prediction) {
    const float logsumexp = peak.largest + logf(peak.sum);
    if (threadIdx.x == 0) {
        loss[blockIdx.x] = logsumexp - z[labels[blockIdx.x]];
        confidence[blockIdx.x] = 1.0f / peak.sum;
        prediction[blockIdx.x] = peak.index;
    }
    return logsumexp;
}

// Replaces the logits of a row by their gradient. Element j of dz lies over logit j / 2, so that what a round of threads
// writes lies over what this round and earlier ones have read: a barrier between the two is enough.
__device__ __forceinline__ void write_gradient(float* z, unsigned vocab, unsigned label, float logsumexp, float d_loss) {
    bf16* const dz = reinterpret_cast<bf16*>(z);
    for (unsigned start = 0; start < vocab; start += THREADS) {
        const unsigned i = start + threadIdx.x;
        const float value = i < vocab ? z[i] : 0.0f;
        __syncthreads();
        if (i < vocab) {
            const float target = i == label ? 1.0f : 0.0f;
            dz[i] = from_float<bf16>(d_loss * (__expf(value - logsumexp) - target));
        }
    }
}

}  // namespace

KERNEL(1024, linear_cross_entropy_forward_f32)
(const float* __restrict__ logits, const unsigned* __restrict__ labels, unsigned rows, unsigned vocab,
 float* __restrict__ loss, float* __restrict__ confidence, unsigned* __restrict__ prediction) {
    if (blockIdx.x >= rows) {
        return;
    }
    const float* const z = logits + static_cast<uint64_t>(blockIdx.x) * vocab;
    write_results(row_peak(z, vocab), z, labels, loss, confidence, prediction);
}

KERNEL(1024, linear_cross_entropy_backward_f32)
(float* logits, const unsigned* __restrict__ labels, unsigned rows, unsigned vocab, float d_loss, float* __restrict__ loss,
 float* __restrict__ confidence, unsigned* __restrict__ prediction) {
    if (blockIdx.x >= rows) {
        return;
    }
    float* const z = logits + static_cast<uint64_t>(blockIdx.x) * vocab;
    const Peak peak = row_peak(z, vocab);
    const float logsumexp = write_results(peak, z, labels, loss, confidence, prediction);
    write_gradient(z, vocab, labels[blockIdx.x], logsumexp, d_loss);
}
