// The loss of each row of logits, `loss = logsumexp(z) - z_label`, and `dz = d_loss (softmax(z) - onehot(label))`. Where there is
// a soft cap, logits are capped as they are read, `z = cap tanh(z / cap)`, and dz is times the slope of that.
//
// A block of 1024 threads takes a row, so grid = rows. It reads the row once for the maximum, where that is, and the sum of
// `e^(z - maximum)`, each thread correcting its sum where its maximum grows: 4 bytes an element. Backward reads it again and
// writes dz: 10 bytes an element.
//
// dz is bf16 and takes the place of the row: element j of it lies at byte 2j, where z_{j/2} was. A block goes through the
// row in tiles from the left. All threads have read a tile before one writes its gradient, which reaches no further.
//
// Source: arXiv:1805.02867 (the sum), arXiv:2411.09009 (dz in place).

#include "bf16_vector.cuh"

namespace {

constexpr unsigned THREADS = 1024;
constexpr unsigned PER_THREAD = 8;
constexpr unsigned TILE = THREADS * PER_THREAD;
constexpr float LOWEST_FINITE = -3.40282347e38f;

// What logits may be at most; 0: whatever they are.
struct SoftCap {
    float cap;

    __device__ __forceinline__ float of(float z) const { return cap > 0.0f ? cap * tanhf(z / cap) : z; }

    // The slope where the cap has given y.
    __device__ __forceinline__ float slope(float y) const {
        const float tanh = y / cap;
        return cap > 0.0f ? 1.0f - tanh * tanh : 1.0f;
    }
};

// A row of logits, which a thread reads in groups of WIDTH neighbours: four where 16-byte accesses allow it, else one.
template <unsigned WIDTH>
struct Logits {
    static constexpr unsigned GROUPS = PER_THREAD / WIDTH;
    float* row;
    unsigned vocab;
    SoftCap soft_cap;

    static __device__ __forceinline__ uint64_t group_start(uint64_t tile, unsigned group) {
        return tile + (group * THREADS + threadIdx.x) * WIDTH;
    }

    // This thread's elements of the tile, in their order; -inf, which has no part in anything, past the end of the row.
    __device__ __forceinline__ void load(uint64_t tile, float (&z)[PER_THREAD]) const {
#pragma unroll
        for (unsigned group = 0; group < GROUPS; group++) {
            const uint64_t start = group_start(tile, group);
            float values[WIDTH];
            if (start < vocab) {
                read(row + start, values);
            }
#pragma unroll
            for (unsigned e = 0; e < WIDTH; e++) {
                z[group * WIDTH + e] = start < vocab ? soft_cap.of(values[e]) : -INFINITY;
            }
        }
    }

    __device__ __forceinline__ void store_gradient(uint64_t tile, const float (&dz)[PER_THREAD]) const {
        bf16* const out = reinterpret_cast<bf16*>(row);
#pragma unroll
        for (unsigned group = 0; group < GROUPS; group++) {
            const uint64_t start = group_start(tile, group);
            if (start < vocab) {
                float values[WIDTH];
#pragma unroll
                for (unsigned e = 0; e < WIDTH; e++) {
                    values[e] = dz[group * WIDTH + e];
                }
                write(values, out + start);
            }
        }
    }

 private:
    static __device__ __forceinline__ void read(const float* from, float (&values)[1]) { values[0] = *from; }
    static __device__ __forceinline__ void read(const float* from, float (&values)[4]) {
        const float4 four = *reinterpret_cast<const float4*>(from);
        values[0] = four.x;
        values[1] = four.y;
        values[2] = four.z;
        values[3] = four.w;
    }
    static __device__ __forceinline__ void write(const float (&values)[1], bf16* to) { *to = from_float<bf16>(values[0]); }
    static __device__ __forceinline__ void write(const float (&values)[4], bf16* to) {
        *reinterpret_cast<uint2*>(to) = make_uint2(pack_bf16(values[0], values[1]), pack_bf16(values[2], values[3]));
    }
};

// Of a row: its maximum, the lowest index of that, and the sum of e^(z - maximum).
struct Peak {
    float largest, sum;
    unsigned index;
};

template <unsigned WIDTH>
__device__ __forceinline__ Peak peak_of_thread(const Logits<WIDTH>& logits) {
    Peak peak = {LOWEST_FINITE, 0.0f, 0};
    for (uint64_t tile = 0; tile < logits.vocab; tile += TILE) {
        float z[PER_THREAD];
        logits.load(tile, z);
        float largest = z[0];
#pragma unroll
        for (unsigned e = 1; e < PER_THREAD; e++) {
            largest = fmaxf(largest, z[e]);
        }
        if (largest > peak.largest) {
            peak.sum *= __expf(peak.largest - largest);
            peak.largest = largest;
#pragma unroll
            for (unsigned e = PER_THREAD; e-- > 0;) {
                if (z[e] == largest) {
                    peak.index = static_cast<unsigned>(logits.group_start(tile, e / WIDTH) + e % WIDTH);
                }
            }
        }
#pragma unroll
        for (unsigned e = 0; e < PER_THREAD; e++) {
            peak.sum += __expf(z[e] - peak.largest);
        }
    }
    return peak;
}

struct Lowest {
    __device__ __forceinline__ unsigned operator()(unsigned a, unsigned b) const { return min(a, b); }
};

// The peak of the whole row, the same in each thread.
__device__ __forceinline__ Peak peak_of_block(const Peak& of_thread) {
    const float largest = block_max<THREADS>(of_thread.largest);
    const float sum = block_sum<THREADS>(of_thread.sum * __expf(of_thread.largest - largest));
    const unsigned first = of_thread.largest == largest ? of_thread.index : UINT32_MAX;
    const unsigned index = block_fold<THREADS>(first, UINT32_MAX, Lowest{});
    return {largest, sum, index};
}

// Where the losses of the rows go.
struct Losses {
    float* __restrict__ loss;
    float* __restrict__ confidence;
    unsigned* __restrict__ prediction;

    __device__ __forceinline__ void write(uint64_t row, float label_logit, const Peak& peak) const {
        loss[row] = logf(peak.sum) + (peak.largest - label_logit);
        confidence[row] = 1.0f / peak.sum;
        prediction[row] = peak.index;
    }
};

template <unsigned WIDTH>
__device__ __forceinline__ void write_gradient(const Logits<WIDTH>& logits, const Peak& peak, unsigned label, float d_loss) {
    const float scale = d_loss / peak.sum;
    for (uint64_t tile = 0; tile < logits.vocab; tile += TILE) {
        float z[PER_THREAD];
        logits.load(tile, z);
#pragma unroll
        for (unsigned e = 0; e < PER_THREAD; e++) {
            const bool is_label = logits.group_start(tile, e / WIDTH) + e % WIDTH == label;
            const float slope = logits.soft_cap.slope(z[e]);
            z[e] = (scale * __expf(z[e] - peak.largest) - (is_label ? d_loss : 0.0f)) * slope;
        }
        __syncthreads();
        logits.store_gradient(tile, z);
    }
}

// Gives `body` the row of this block, in groups as wide as rows of `vocab` logits allow.
template <typename Body>
__device__ __forceinline__ void with_row(float* logits, unsigned rows, unsigned vocab, float soft_cap, Body body) {
    if (blockIdx.x >= rows) {
        return;
    }
    float* const row = logits + static_cast<uint64_t>(blockIdx.x) * vocab;
    if (vocab % 4 == 0 && are_aligned(logits)) {
        body(Logits<4>{row, vocab, {soft_cap}});
    } else {
        body(Logits<1>{row, vocab, {soft_cap}});
    }
}

}  // namespace

KERNEL(1024, linear_cross_entropy_forward_f32)
(const float* __restrict__ logits, const unsigned* __restrict__ labels, unsigned rows, unsigned vocab, float soft_cap,
 float* __restrict__ loss, float* __restrict__ confidence, unsigned* __restrict__ prediction) {
    const Losses losses = {loss, confidence, prediction};
    with_row(const_cast<float*>(logits), rows, vocab, soft_cap, [=](auto row_logits) {
        const Peak peak = peak_of_block(peak_of_thread(row_logits));
        if (threadIdx.x == 0) {
            const float z = row_logits.row[labels[blockIdx.x]];
            losses.write(blockIdx.x, row_logits.soft_cap.of(z), peak);
        }
    });
}

// Row i of dz starts where row i of the logits does.
KERNEL(1024, linear_cross_entropy_backward_f32)
(float* logits, const unsigned* __restrict__ labels, unsigned rows, unsigned vocab, float soft_cap, float d_loss,
 float* __restrict__ loss, float* __restrict__ confidence, unsigned* __restrict__ prediction) {
    const Losses losses = {loss, confidence, prediction};
    with_row(logits, rows, vocab, soft_cap, [=](auto row_logits) {
        const unsigned label = labels[blockIdx.x];
        const Peak peak = peak_of_block(peak_of_thread(row_logits));
        // Before the first tile is written, which the barrier in there sees to.
        if (threadIdx.x == 0) {
            losses.write(blockIdx.x, row_logits.soft_cap.of(row_logits.row[label]), peak);
        }
        write_gradient(row_logits, peak, label, d_loss);
    });
}

// Logits under the cap, in place, where they are wanted themselves: any grid.
KERNEL(256, linear_cross_entropy_soft_cap_f32)(float* logits, uint64_t n, float soft_cap) {
    const uint64_t stride = static_cast<uint64_t>(gridDim.x) * blockDim.x;
    for (uint64_t i = blockIdx.x * static_cast<uint64_t>(blockDim.x) + threadIdx.x; i < n; i += stride) {
        logits[i] = SoftCap{soft_cap}.of(logits[i]);
    }
}
