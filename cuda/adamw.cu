// AdamW on the trained weights: `g = scale * grad`, `m = b1 m + (1 - b1) g`, `v = b2 v + (1 - b2) g^2`, then
// `w = w decay - step_size m / (sqrt(v) / root_correction + eps)`, with the scalars of src/ops/adamw.rs.
//
// The exact f32 master is kept in two halves: `high`, the bf16 weight that the GEMMs read, and `low`, 16 signed bits, with
// bits(master) = (high << 16) + low. So `high` is the master rounded to the nearest bf16, and any f32 survives the split.
// Every operation rounds once, so the f32 update gives the bits of the CPU's.
//
// adamw_f32_moments: a thread takes one element at a time; 28 bytes an element. Any grid.
// adamw_8bit_moments: a warp takes a block of 256 elements, eight a lane; 16 bytes an element. Any grid, a block of threads
// covers 2048 elements an iteration. The new moments update the weight before they are rounded to codes: m to the nearest of
// the signed dynamic map, v to the nearest of the unsigned one, each times the largest magnitude of its block.
// adamw_squared_norm: 4 bytes an element. The squares are exact in f64, so neither tiny nor huge gradients are lost. At two
// slow f64 instructions an element, even a consumer card needs about 1 ms for the adapters of a 7B model.
//
// Source: arXiv:1711.05101; 8-bit moments arXiv:2110.02861.

#include "common.cuh"
#include "nearest_code.cuh"

namespace {

struct Update {
    float beta1, rest1, beta2, rest2, decay, step_size, root_correction, epsilon, grad_scale;

    __device__ __forceinline__ void apply(float grad, float& w, float& m, float& v) const {
        const float g = __fmul_rn(grad, grad_scale);
        m = __fadd_rn(__fmul_rn(beta1, m), __fmul_rn(rest1, g));
        v = __fadd_rn(__fmul_rn(beta2, v), __fmul_rn(__fmul_rn(rest2, g), g));
        const float root = __fadd_rn(__fdiv_rn(__fsqrt_rn(v), root_correction), epsilon);
        w = __fsub_rn(__fmul_rn(w, decay), __fdiv_rn(__fmul_rn(step_size, m), root));
    }
};

__device__ __forceinline__ float join_master(bf16 high, int16_t low) {
    return __uint_as_float((static_cast<unsigned>(high.bits) << 16) + static_cast<unsigned>(low));
}

__device__ __forceinline__ void split_master(float master, bf16& high, int16_t& low) {
    const unsigned bits = __float_as_uint(master);
    high.bits = static_cast<uint16_t>((bits + 0x8000u) >> 16);
    low = static_cast<int16_t>(bits & 0xffffu);
}

// The 256 values of a dynamic map and the bounds between them, in shared memory.
struct DynamicMap {
    float* values;
    float* lower_bounds;

    __device__ __forceinline__ void load(const float* __restrict__ map) const {
        for (unsigned k = threadIdx.x; k < 256; k += blockDim.x) {
            values[k] = map[k];
            lower_bounds[k] = k == 0 ? -INFINITY : 0.5f * (map[k - 1] + map[k]);
        }
    }

    // A block of zeros takes the code of 0, whatever `value` was divided by.
    __device__ __forceinline__ uint8_t code(float value, float absmax) const {
        const float normalized = absmax > 0.0f ? __fdiv_rn(value, absmax) : 0.0f;
        return static_cast<uint8_t>(nearest_code<256>(lower_bounds, normalized));
    }
};

}  // namespace

KERNEL(256, adamw_f32_moments)
(bf16* __restrict__ high, int16_t* __restrict__ low, const float* __restrict__ grad, float* __restrict__ m,
 float* __restrict__ v, uint64_t n, float beta1, float rest1, float beta2, float rest2, float decay, float step_size,
 float root_correction, float epsilon, float grad_scale) {
    const Update update = {beta1, rest1, beta2, rest2, decay, step_size, root_correction, epsilon, grad_scale};
    const uint64_t stride = static_cast<uint64_t>(gridDim.x) * blockDim.x;
    for (uint64_t i = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += stride) {
        float w = join_master(high[i], low[i]);
        update.apply(grad[i], w, m[i], v[i]);
        split_master(w, high[i], low[i]);
    }
}

KERNEL(256, adamw_8bit_moments)
(bf16* __restrict__ high, int16_t* __restrict__ low, const float* __restrict__ grad, uint8_t* __restrict__ m_codes,
 float* __restrict__ m_absmax, uint8_t* __restrict__ v_codes, float* __restrict__ v_absmax,
 const float* __restrict__ signed_map, const float* __restrict__ unsigned_map, uint64_t n, float beta1, float rest1,
 float beta2, float rest2, float decay, float step_size, float root_correction, float epsilon, float grad_scale) {
    constexpr unsigned BLOCK_SIZE = 256;
    constexpr unsigned PER_LANE = BLOCK_SIZE / WARP_LANES;
    const Update update = {beta1, rest1, beta2, rest2, decay, step_size, root_correction, epsilon, grad_scale};

    SHARED(float, m_values, 256);
    SHARED(float, m_bounds, 256);
    SHARED(float, v_values, 256);
    SHARED(float, v_bounds, 256);
    const DynamicMap m_map = {m_values, m_bounds};
    const DynamicMap v_map = {v_values, v_bounds};
    m_map.load(signed_map);
    v_map.load(unsigned_map);
    __syncthreads();

    const unsigned lane = threadIdx.x % WARP_LANES;
    const unsigned warps = blockDim.x / WARP_LANES;
    const uint64_t blocks = (n + BLOCK_SIZE - 1) / BLOCK_SIZE;
    uint64_t block = static_cast<uint64_t>(blockIdx.x) * warps + threadIdx.x / WARP_LANES;
    for (; block < blocks; block += static_cast<uint64_t>(gridDim.x) * warps) {
        // Neighbouring lanes take neighbouring elements, so that each access of the warp is contiguous.
        const uint64_t first = block * BLOCK_SIZE + lane;
        const float m_scale = m_absmax[block];
        const float v_scale = v_absmax[block];
        float m[PER_LANE];
        float v[PER_LANE];
        float m_largest = 0.0f;
        float v_largest = 0.0f;
#pragma unroll
        for (unsigned k = 0; k < PER_LANE; k++) {
            const uint64_t i = first + k * WARP_LANES;
            m[k] = 0.0f;
            v[k] = 0.0f;
            if (i < n) {
                m[k] = __fmul_rn(m_map.values[m_codes[i]], m_scale);
                v[k] = __fmul_rn(v_map.values[v_codes[i]], v_scale);
                float w = join_master(high[i], low[i]);
                update.apply(grad[i], w, m[k], v[k]);
                split_master(w, high[i], low[i]);
            }
            m_largest = fmaxf(m_largest, fabsf(m[k]));
            v_largest = fmaxf(v_largest, v[k]);
        }
        m_largest = warp_max(m_largest);
        v_largest = warp_max(v_largest);
#pragma unroll
        for (unsigned k = 0; k < PER_LANE; k++) {
            const uint64_t i = first + k * WARP_LANES;
            if (i < n) {
                m_codes[i] = m_map.code(m[k], m_largest);
                v_codes[i] = v_map.code(v[k], v_largest);
            }
        }
        // Every lane has read the old scales.
        __syncwarp();
        if (lane == 0) {
            m_absmax[block] = m_largest;
            v_absmax[block] = v_largest;
        }
    }
}

// partial[b] = the squares that block b of the grid meets; the sum depends on the grid, and on nothing else.
KERNEL(256, adamw_squared_norm)(const float* __restrict__ grad, uint64_t n, double* __restrict__ partial) {
    double sum = 0.0;
    const uint64_t stride = static_cast<uint64_t>(gridDim.x) * blockDim.x;
    for (uint64_t i = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += stride) {
        const double g = static_cast<double>(grad[i]);
        sum += g * g;
    }
    sum = block_sum<256>(sum);
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = sum;
    }
}

// One block of threads.
KERNEL(256, adamw_sum)(const double* __restrict__ partial, unsigned count, double* __restrict__ total) {
    double sum = 0.0;
    for (unsigned i = threadIdx.x; i < count; i += blockDim.x) {
        sum += partial[i];
    }
    sum = block_sum<256>(sum);
    if (threadIdx.x == 0) {
        *total = sum;
    }
}
