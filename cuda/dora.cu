// DoRA: the rows of a merged weight W + s B A, scaled to trained magnitudes.
//
//   dora_scales          norm = sqrt(squares + sum_r b_r (2 s p_r + s^2 (b G)_r)): the norm of a row of W + s B A, with that of
//                        W squared, p = A W^T: [r, d] and G = A A^T: [r, r]; scales: [2, d] = (magnitude / norm, 1 / norm)
//   dora_scale           y = scale y + base + bias
//   dora_scale_backward  d_magnitude += sum over rows of dy h, / norm; then h = scale dy
//   dora_split           kept = mask keep_scale x, dropped = x - kept, with the mask of dropout.cuh
//   dora_join            dx = mask keep_scale d_kept + (1 - mask keep_scale) d_dropped, or the same added to dx; dx may be d_kept
//
// Grids: dora_scales has a warp for each of the d rows, ceil(d / 8) blocks. A block of dora_scale_backward takes 256 columns and
// its share of the rows: (ceil(d / 256), splits); more than one split write their sums to partial: [splits, d], and
// dora_scale_backward_sum adds them in order. The others take any grid.
//
// Bytes an element: dora_scale 4, or 6 with a base; dora_scale_backward 6; dora_split 6; dora_join 6, or 8 where it adds.
//
// Source: arXiv:2402.09353, with the norm constant in backward as in its section 4.3.

#include "bf16_vector.cuh"
#include "dropout.cuh"

namespace {

constexpr unsigned THREADS = 256;
constexpr unsigned WARPS = THREADS / WARP_LANES;

// The f32 whose halves the optimizer keeps apart.
__device__ __forceinline__ float join_master(bf16 high, int16_t low) {
    return __uint_as_float((static_cast<unsigned>(high.bits) << 16) + static_cast<unsigned>(static_cast<int>(low)));
}

// What the elements of a vector from `first` on are multiplied by where dropout keeps them, and 0 where it does not.
template <unsigned WIDTH>
__device__ __forceinline__ void keep_factors(const Dropout& dropout, uint64_t first, float (&factors)[WIDTH]) {
    const uint4 mask = dropout.mask(first);
    const unsigned words[4] = {mask.x, mask.y, mask.z, mask.w};
#pragma unroll
    for (unsigned e = 0; e < WIDTH; e++) {
        factors[e] = words[e / 2] >> 16 * (e % 2) & 1 ? dropout.keep_scale : 0.0f;
    }
}

// A thread's eight columns of a row from `col` on, zeros beyond the row's end.
struct Columns {
    unsigned col, d;
    bool vectorized;

    __device__ __forceinline__ void load(const bf16* row, float (&values)[8]) const {
        if (vectorized && col < d) {
            Bf16Vector<8>::load(row + col).widen(values);
            return;
        }
#pragma unroll
        for (unsigned e = 0; e < 8; e++) {
            values[e] = col + e < d ? to_float(row[col + e]) : 0.0f;
        }
    }

    __device__ __forceinline__ void store(const float (&values)[8], bf16* row) const {
        if (vectorized && col < d) {
            Bf16Vector<8>::round(values).store(row + col);
            return;
        }
#pragma unroll
        for (unsigned e = 0; e < 8; e++) {
            if (col + e < d) {
                row[col + e] = from_float<bf16>(values[e]);
            }
        }
    }
};

}  // namespace

KERNEL(256, dora_scales_f32)
(const bf16* __restrict__ b, const float* __restrict__ p, const float* __restrict__ gram,
 const float* __restrict__ squares, const bf16* __restrict__ magnitude, const int16_t* __restrict__ magnitude_low, unsigned d,
 unsigned r, float scaling, float* __restrict__ scales) {
    const unsigned row = blockIdx.x * WARPS + threadIdx.x / WARP_LANES;
    if (row >= d) {
        return;
    }
    const bf16* const b_row = b + static_cast<uint64_t>(row) * r;
    float sum = 0.0f;
    for (unsigned i = threadIdx.x % WARP_LANES; i < r; i += WARP_LANES) {
        float product = 0.0f;
        for (unsigned j = 0; j < r; j++) {
            product += gram[static_cast<uint64_t>(j) * r + i] * to_float(b_row[j]);
        }
        sum += to_float(b_row[i]) * scaling * (2.0f * p[static_cast<uint64_t>(i) * d + row] + scaling * product);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % WARP_LANES == 0) {
        const float norm = sqrtf(fmaxf(squares[row] + sum, 0.0f));
        scales[row] = join_master(magnitude[row], magnitude_low[row]) / norm;
        scales[d + row] = 1.0f / norm;
    }
}

KERNEL(256, dora_scale_bf16)
(bf16* y, const float* __restrict__ scales, const bf16* __restrict__ base, const float* __restrict__ bias, unsigned rows,
 unsigned d) {
    const bool aligned = d % 8 == 0 && are_aligned(y, scales, base, bias);
    for_each_vector(static_cast<uint64_t>(rows) * d, aligned, [=](auto kind, uint64_t i) {
        using Vector = decltype(kind);
        float values[Vector::WIDTH];
        float more[Vector::WIDTH];
        Vector::load(y + i).widen(values);
        load_floats(scales + i % d, more);
#pragma unroll
        for (unsigned e = 0; e < Vector::WIDTH; e++) {
            values[e] *= more[e];
        }
        if (base != nullptr) {
            Vector::load(base + i).widen(more);
#pragma unroll
            for (unsigned e = 0; e < Vector::WIDTH; e++) {
                values[e] += more[e];
            }
        }
        if (bias != nullptr) {
            load_floats(bias + i % d, more);
#pragma unroll
            for (unsigned e = 0; e < Vector::WIDTH; e++) {
                values[e] += more[e];
            }
        }
        Vector::round(values).store(y + i);
    });
}

KERNEL(256, dora_scale_backward_bf16)
(const bf16* __restrict__ dy, bf16* h, const float* __restrict__ scales, unsigned rows, unsigned d,
 float* __restrict__ d_magnitude, float* __restrict__ partial) {
    constexpr unsigned COLS = WARP_LANES * 8;
    SHARED(float, sums_of_warp, WARPS * COLS);

    const unsigned lane = threadIdx.x % WARP_LANES;
    const unsigned warp = threadIdx.x / WARP_LANES;
    const unsigned first_col = blockIdx.x * COLS;
    const Columns columns = {first_col + 8 * lane, d, d % 8 == 0 && are_aligned(dy, h)};
    const unsigned begin = static_cast<unsigned>(static_cast<uint64_t>(rows) * blockIdx.y / gridDim.y);
    const unsigned end = static_cast<unsigned>(static_cast<uint64_t>(rows) * (blockIdx.y + 1) / gridDim.y);
    float scale[8];
    float sums[8];
#pragma unroll
    for (unsigned e = 0; e < 8; e++) {
        scale[e] = columns.col + e < d ? scales[columns.col + e] : 0.0f;
        sums[e] = 0.0f;
    }
    for (unsigned row = begin + warp; row < end; row += WARPS) {
        const uint64_t start = static_cast<uint64_t>(row) * d;
        float dy_values[8];
        float values[8];
        columns.load(dy + start, dy_values);
        columns.load(h + start, values);
#pragma unroll
        for (unsigned e = 0; e < 8; e++) {
            sums[e] += dy_values[e] * values[e];
            values[e] = scale[e] * dy_values[e];
        }
        columns.store(values, h + start);
    }
#pragma unroll
    for (unsigned e = 0; e < 8; e++) {
        sums_of_warp[warp * COLS + 8 * lane + e] = sums[e];
    }
    __syncthreads();
    const unsigned col = first_col + threadIdx.x;
    if (col >= d) {
        return;
    }
    float sum = 0.0f;
    for (unsigned w = 0; w < WARPS; w++) {
        sum += sums_of_warp[w * COLS + threadIdx.x];
    }
    if (gridDim.y == 1) {
        d_magnitude[col] += scales[d + col] * sum;
    } else {
        partial[static_cast<uint64_t>(blockIdx.y) * d + col] = sum;
    }
}

KERNEL(256, dora_scale_backward_sum_f32)
(const float* __restrict__ partial, unsigned splits, const float* __restrict__ scales, unsigned d,
 float* __restrict__ d_magnitude) {
    for (unsigned col = blockIdx.x * THREADS + threadIdx.x; col < d; col += gridDim.x * THREADS) {
        float sum = 0.0f;
        for (unsigned split = 0; split < splits; split++) {
            sum += partial[static_cast<uint64_t>(split) * d + col];
        }
        d_magnitude[col] += scales[d + col] * sum;
    }
}

KERNEL(256, dora_split_bf16)
(const bf16* __restrict__ x, uint64_t count, bf16* __restrict__ kept, bf16* __restrict__ dropped, unsigned key0, unsigned key1,
 unsigned stream0, unsigned stream1, unsigned threshold, float keep_scale) {
    const Dropout dropout = {{key0, key1}, {stream0, stream1}, threshold, keep_scale};
    for_each_vector(count, are_aligned(x, kept, dropped), [=](auto kind, uint64_t i) {
        using Vector = decltype(kind);
        float values[Vector::WIDTH];
        float factors[Vector::WIDTH];
        Vector::load(x + i).widen(values);
        keep_factors(dropout, i, factors);
        float rest[Vector::WIDTH];
#pragma unroll
        for (unsigned e = 0; e < Vector::WIDTH; e++) {
            rest[e] = values[e] - factors[e] * values[e];
            values[e] *= factors[e];
        }
        Vector::round(values).store(kept + i);
        if (dropped != nullptr) {
            Vector::round(rest).store(dropped + i);
        }
    });
}

KERNEL(256, dora_join_bf16)
(const bf16* d_kept, const bf16* __restrict__ d_dropped, uint64_t count, unsigned adds, bf16* dx, unsigned key0, unsigned key1, unsigned stream0, unsigned stream1, unsigned threshold, float keep_scale) {
    const Dropout dropout = {{key0, key1}, {stream0, stream1}, threshold, keep_scale};
    for_each_vector(count, are_aligned(d_kept, d_dropped, dx), [=](auto kind, uint64_t i) {
        using Vector = decltype(kind);
        float kept[Vector::WIDTH];
        float dropped[Vector::WIDTH];
        float factors[Vector::WIDTH];
        float sum[Vector::WIDTH] = {};
        Vector::load(d_kept + i).widen(kept);
        Vector::load(d_dropped + i).widen(dropped);
        keep_factors(dropout, i, factors);
        if (adds) {
            Vector::load(dx + i).widen(sum);
        }
#pragma unroll
        for (unsigned e = 0; e < Vector::WIDTH; e++) {
            sum[e] += factors[e] * kept[e] + (dropped[e] - factors[e] * dropped[e]);
        }
        Vector::round(sum).store(dx + i);
    });
}
