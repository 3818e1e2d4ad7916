// 4-bit weights (NF4 and FP4): blocks of consecutive elements that share a scale, and the 8-bit codes of those scales.
//
//   quantize         absmax = max |w| of a block, code = nearest(w * (1 / absmax))
//   quantize_absmax  offset = mean(absmax), z = absmax - offset, code = nearest(z * (1 / max |z| of 256))
//   dequantize       scale = dynamic_map[code] * nested_absmax + offset, w = value[code] * scale
//
// Byte j of `packed` holds element 2j in its high nibble and element 2j + 1 in its low one; blocks ignore rows. Every operation
// rounds once, as in src/quant/, and the results are the same bits. Source: arXiv:2305.14314.
//
// nf4_dequantize_T moves 0.5 + sizeof(T) + 1/64 bytes an element: 2.52 for bf16, four fifths of them stores. A warp takes 1024
// consecutive elements at a time. It loads all their codes first, one lane decodes each scale, and a lane then makes 16 bytes
// of output of each group of codes, so that a store of the warp is 512 consecutive bytes. Counted for bf16 on sm_90, that is
// nine instructions an element, half of what an H200 can issue while it moves the bytes. Any grid; a block of threads covers
// 8192 elements an iteration.
//
// nf4_quantize_T: a warp takes a block of weights and reads it twice, the second time from the cache. Any grid.
// nf4_absmax_mean: one block of threads. nf4_quantize_absmax: a block of threads takes 256 scales, so grid = ceil(m / 256).

#include "common.cuh"
#include "nearest_code.cuh"

namespace {

// The scale of each block of weights: in f32, or as an 8-bit code where `codes` is not null.
struct Scales {
    const uint8_t* __restrict__ codes;
    const float* __restrict__ absmax;
    const float* __restrict__ dynamic_map;
    float offset;
    unsigned nested_block_size;

    __device__ __forceinline__ float of_block(uint64_t block) const {
        if (codes == nullptr) {
            return absmax[block];
        }
        const float nested_absmax = absmax[block / nested_block_size];
        return __fadd_rn(__fmul_rn(dynamic_map[codes[block]], nested_absmax), offset);
    }
};

// What a lane stores at once, 16 bytes, and the codes that they come from.
template <typename T>
struct Group;

template <>
struct Group<bf16> {
    using Codes = uint32_t;
    static __device__ __forceinline__ uint4 pack(const float (&w)[8]) {
        return make_uint4(pack_bf16(w[0], w[1]), pack_bf16(w[2], w[3]), pack_bf16(w[4], w[5]), pack_bf16(w[6], w[7]));
    }
};

template <>
struct Group<f16> {
    using Codes = uint32_t;
    static __device__ __forceinline__ unsigned pair(float low, float high) {
        return from_float<f16>(low).bits | static_cast<unsigned>(from_float<f16>(high).bits) << 16;
    }
    static __device__ __forceinline__ uint4 pack(const float (&w)[8]) {
        return make_uint4(pair(w[0], w[1]), pair(w[2], w[3]), pair(w[4], w[5]), pair(w[6], w[7]));
    }
};

template <>
struct Group<float> {
    using Codes = uint16_t;
    static __device__ __forceinline__ uint4 pack(const float (&w)[4]) {
        return make_uint4(__float_as_uint(w[0]), __float_as_uint(w[1]), __float_as_uint(w[2]), __float_as_uint(w[3]));
    }
};

// The elements that a warp takes at a time; at most 32 blocks.
constexpr unsigned SPAN = 1024;

// One whole span of aligned codes and outputs.
template <typename T>
__device__ __forceinline__ void dequantize_span(const uint8_t* __restrict__ packed, const Scales& scales,
                                                const float* value_of, unsigned block_size_log2, uint64_t span,
                                                T* __restrict__ out) {
    using Codes = typename Group<T>::Codes;
    constexpr unsigned GROUP = 2 * sizeof(Codes);
    constexpr unsigned STEP = GROUP * WARP_LANES;
    const unsigned lane = threadIdx.x % WARP_LANES;

    const Codes* const lane_packed = reinterpret_cast<const Codes*>(packed + span / 2) + lane;
    Codes codes[SPAN / STEP];
#pragma unroll
    for (unsigned step = 0; step < SPAN / STEP; step++) {
        codes[step] = lane_packed[step * WARP_LANES];
    }

    // Lane i decodes the scale of the i-th block of the span; a block that is larger than the span is lane 0's.
    const unsigned block_start = lane << block_size_log2;
    const float lane_scale = block_start < SPAN ? scales.of_block((span + block_start) >> block_size_log2) : 0.0f;

    uint4* const lane_out = reinterpret_cast<uint4*>(out + span) + lane;
#pragma unroll
    for (unsigned step = 0; step < SPAN / STEP; step++) {
        const unsigned block = (step * STEP + lane * GROUP) >> block_size_log2;
        const float scale = __shfl_sync(ALL_LANES, lane_scale, block);
        float w[GROUP];
#pragma unroll
        for (unsigned k = 0; k < GROUP; k++) {
            const unsigned nibble = k ^ 1;
            w[k] = __fmul_rn(value_of[codes[step] >> (4 * nibble) & 15u], scale);
        }
        lane_out[step * WARP_LANES] = Group<T>::pack(w);
    }
}

// The elements from `first` on, up to a whole span and at any alignment, one at a time.
template <typename T>
__device__ __forceinline__ void dequantize_elements(const uint8_t* __restrict__ packed, const Scales& scales,
                                                    const float* value_of, unsigned block_size_log2, uint64_t first,
                                                    uint64_t n, T* __restrict__ out) {
    const uint64_t end = min(first + SPAN, n);
#pragma unroll 1
    for (uint64_t i = first + threadIdx.x % WARP_LANES; i < end; i += WARP_LANES) {
        const unsigned nibble = i % 2 == 0 ? 1 : 0;
        const float value = value_of[packed[i / 2] >> (4 * nibble) & 15u];
        out[i] = from_float<T>(__fmul_rn(value, scales.of_block(i >> block_size_log2)));
    }
}

template <typename T>
__device__ __forceinline__ void dequantize(const uint8_t* __restrict__ packed, const Scales& scales,
                                           const float* __restrict__ code, unsigned block_size_log2, uint64_t n,
                                           T* __restrict__ out) {
    // 16 neighbouring words lie in 16 banks: lanes with different codes never wait for each other.
    SHARED(float, value_of, 16);
    if (threadIdx.x < 16) {
        value_of[threadIdx.x] = code[threadIdx.x];
    }
    __syncthreads();

    const bool aligned = reinterpret_cast<uintptr_t>(packed) % sizeof(typename Group<T>::Codes) == 0 &&
                         reinterpret_cast<uintptr_t>(out) % sizeof(uint4) == 0;
    const unsigned warps = blockDim.x / WARP_LANES;
    const uint64_t stride = static_cast<uint64_t>(gridDim.x) * warps * SPAN;
    uint64_t span = (static_cast<uint64_t>(blockIdx.x) * warps + threadIdx.x / WARP_LANES) * SPAN;
    for (; span < n; span += stride) {
        if (aligned && n - span >= SPAN) {
            dequantize_span(packed, scales, value_of, block_size_log2, span, out);
        } else {
            dequantize_elements(packed, scales, value_of, block_size_log2, span, n, out);
        }
    }
}

// Between the codes of NF4, and between the magnitudes of FP4: NF4_THRESHOLDS and FP4_THRESHOLDS of src/quant/codes.rs.
__device__ __forceinline__ void write_lower_bounds(float* bounds, bool is_fp4) {
    constexpr unsigned NF4[16] = {0xff800000, 0xbf591cd8, 0xbf1c5270, 0xbeeb8480, 0xbeadea76, 0xbe703cec,
                                  0xbe0d38bc, 0xbd3a7871, 0x3d22faff, 0x3df64862, 0x3e5067e0, 0x3e9582d4,
                                  0x3ec753f9, 0x3f006d04, 0x3f248daf, 0x3f5c89da};
    constexpr unsigned FP4[8] = {0xff800000, 0x3b2aaab9, 0x3db00000, 0x3e555555,
                                 0x3e955555, 0x3ed55556, 0x3f155550, 0x3f555555};
#pragma unroll
    for (unsigned k = 0; k < 16; k++) {
        bounds[k] = __uint_as_float(is_fp4 ? FP4[k % 8] : NF4[k]);
    }
}

// The nearest FP4 code: the magnitude of rank k has the code in nibble k of the constant, and bit 3 is the sign.
__device__ __forceinline__ unsigned nearest_fp4_code(const float* lower_bounds, float value) {
    const unsigned rank = nearest_code<8>(lower_bounds, fabsf(value));
    return (0x32547610u >> (4 * rank) & 7u) | (value < 0.0f ? 8u : 0u);
}

template <typename T>
__device__ __forceinline__ void quantize(const T* __restrict__ w, uint64_t n, unsigned block_size_log2, bool is_fp4,
                                         uint8_t* __restrict__ packed, float* __restrict__ absmax,
                                         uint64_t* first_non_finite) {
    constexpr unsigned INFINITY_BITS = 0x7f800000u;
    // As in bitsandbytes, a block is divided by no less than this: zeros and subnormals take the code of 0.0.
    constexpr float MIN_DIVISOR = 1e-38f;

    SHARED(float, lower_bounds, 16);
    if (threadIdx.x == 0) {
        write_lower_bounds(lower_bounds, is_fp4);
    }
    __syncthreads();

    const unsigned lane = threadIdx.x % WARP_LANES;
    const unsigned warps = blockDim.x / WARP_LANES;
    const uint64_t blocks = (n + (1u << block_size_log2) - 1) >> block_size_log2;
    uint64_t block = static_cast<uint64_t>(blockIdx.x) * warps + threadIdx.x / WARP_LANES;
    for (; block < blocks; block += static_cast<uint64_t>(gridDim.x) * warps) {
        const uint64_t start = block << block_size_log2;
        const uint64_t end = min(start + (1u << block_size_log2), n);

        // By the bits, a NaN or an infinity is larger than every number.
        unsigned largest = 0;
        for (uint64_t i = start + lane; i < end; i += WARP_LANES) {
            const unsigned magnitude = __float_as_uint(fabsf(to_float(w[i])));
            largest = max(largest, magnitude);
            if (magnitude >= INFINITY_BITS) {
                atomicMin(reinterpret_cast<unsigned long long*>(first_non_finite), static_cast<unsigned long long>(i));
            }
        }
        for (unsigned distance = WARP_LANES / 2; distance > 0; distance /= 2) {
            largest = max(largest, __shfl_xor_sync(ALL_LANES, largest, distance));
        }
        if (lane == 0) {
            absmax[block] = __uint_as_float(largest);
        }

        const float reciprocal = __frcp_rn(fmaxf(__uint_as_float(largest), MIN_DIVISOR));
        for (uint64_t i = start + 2 * lane; i < end; i += 2 * WARP_LANES) {
            const float even = __fmul_rn(to_float(w[i]), reciprocal);
            const float odd = i + 1 < end ? __fmul_rn(to_float(w[i + 1]), reciprocal) : 0.0f;
            const unsigned high = is_fp4 ? nearest_fp4_code(lower_bounds, even) : nearest_code<16>(lower_bounds, even);
            const unsigned low = is_fp4 ? nearest_fp4_code(lower_bounds, odd) : nearest_code<16>(lower_bounds, odd);
            packed[i / 2] = static_cast<uint8_t>(high << 4 | low);
        }
    }
}

}  // namespace

KERNEL(256, nf4_dequantize_bf16)
(const uint8_t* packed, const uint8_t* codes, const float* absmax, const float* dynamic_map, const float* code, float offset,
 unsigned block_size_log2, unsigned nested_block_size, uint64_t n, bf16* out) {
    dequantize(packed, Scales{codes, absmax, dynamic_map, offset, nested_block_size}, code, block_size_log2, n, out);
}

KERNEL(256, nf4_dequantize_f16)
(const uint8_t* packed, const uint8_t* codes, const float* absmax, const float* dynamic_map, const float* code, float offset,
 unsigned block_size_log2, unsigned nested_block_size, uint64_t n, f16* out) {
    dequantize(packed, Scales{codes, absmax, dynamic_map, offset, nested_block_size}, code, block_size_log2, n, out);
}

KERNEL(256, nf4_dequantize_f32)
(const uint8_t* packed, const uint8_t* codes, const float* absmax, const float* dynamic_map, const float* code, float offset,
 unsigned block_size_log2, unsigned nested_block_size, uint64_t n, float* out) {
    dequantize(packed, Scales{codes, absmax, dynamic_map, offset, nested_block_size}, code, block_size_log2, n, out);
}

// Writes to first_non_finite the least index of a NaN or an infinity, if that is below what is there.
KERNEL(256, nf4_quantize_bf16)
(const bf16* w, uint64_t n, unsigned block_size_log2, unsigned is_fp4, uint8_t* packed, float* absmax,
 uint64_t* first_non_finite) {
    quantize(w, n, block_size_log2, is_fp4 != 0, packed, absmax, first_non_finite);
}

KERNEL(256, nf4_quantize_f16)
(const f16* w, uint64_t n, unsigned block_size_log2, unsigned is_fp4, uint8_t* packed, float* absmax,
 uint64_t* first_non_finite) {
    quantize(w, n, block_size_log2, is_fp4 != 0, packed, absmax, first_non_finite);
}

KERNEL(256, nf4_quantize_f32)
(const float* w, uint64_t n, unsigned block_size_log2, unsigned is_fp4, uint8_t* packed, float* absmax,
 uint64_t* first_non_finite) {
    quantize(w, n, block_size_log2, is_fp4 != 0, packed, absmax, first_non_finite);
}

// Thread t sums the scales t, t + 1024, ... in f64, and the partial sums are folded in halves, 32 at a time: the order of
// src/quant/double_quant.rs.
KERNEL(1024, nf4_absmax_mean)(const float* __restrict__ absmax, uint64_t m, float* offset) {
    double sum = 0.0;
    for (uint64_t i = threadIdx.x; i < m; i += 1024) {
        sum += static_cast<double>(absmax[i]);
    }
    sum = block_sum<1024>(sum);
    if (threadIdx.x == 0) {
        *offset = m == 0 ? 0.0f : static_cast<float>(sum / static_cast<double>(m));
    }
}

KERNEL(256, nf4_quantize_absmax)
(const float* __restrict__ absmax, uint64_t m, const float* __restrict__ offset, const float* __restrict__ lower_bounds,
 uint8_t* __restrict__ codes, float* __restrict__ nested_absmax) {
    SHARED(float, bounds, 256);
    bounds[threadIdx.x] = lower_bounds[threadIdx.x];
    __syncthreads();

    const uint64_t i = static_cast<uint64_t>(blockIdx.x) * 256 + threadIdx.x;
    const float z = i < m ? __fsub_rn(absmax[i], *offset) : 0.0f;
    const float largest = block_max<256>(fabsf(z));
    if (i < m) {
        // Where all scales equal the offset, 0 * inf is a NaN and takes code 0, as on the CPU.
        codes[i] = static_cast<uint8_t>(nearest_code<256>(bounds, __fmul_rn(z, __frcp_rn(largest))));
    }
    if (threadIdx.x == 0) {
        nested_absmax[blockIdx.x] = largest;
    }
}
