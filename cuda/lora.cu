// The products of adapters with their input x: [n, d], which is large beside everything else in them. Several adapters may
// read the same x, those of q_proj, k_proj and v_proj for one; each has a mask of its own, whose stream follows that of the
// one before.
//
//   lora_down    u_j = dropout_j(x) a_j^T        u: [n, adapters, r], a: [adapters, r, d]
//   lora_grad_a  d_a_j += du_j^T dropout_j(x)    d_a: [adapters, r, d] in f32, du: [n, adapters, r]
//   lora_up      dx += sum over j of mask_j keep_scale (du_j a_j)
//
// dropout_j(x) = mask_j keep_scale x, with the mask of dropout.cuh for element row d + col, the same in all three. keep_scale
// is multiplied in f32, with the sums. A threshold of 0 keeps all.
//
// Grids, with a block for 64 ranks of an adapter (the others are for the next blocks, which find x in the cache):
//   lora_down    (ceil(n / 64) adapters ceil(r / 64), splits): 64 rows a block, and its share of the d columns
//   lora_grad_a  (ceil(d / 128) adapters ceil(r / 64), splits): 128 columns a block, and its share of the n rows
//   lora_up      (ceil(d / 128), ceil(n / 64)): 128 columns and 64 rows a block, all ranks of all adapters
// One split writes its result. More than one, for what would not fill a GPU, write theirs to partial: [splits, ..] of the
// shape of the result in f32, and lora_down_sum or lora_grad_a_sum adds them in order (any grid).
//
// Bytes an element of x: 2 for lora_down and lora_grad_a, 4 for lora_up; the small matrices come from the cache. A lane
// moves eight elements of x at a time, and masks them in registers.
//
// Source: arXiv:2106.09685.

#include "bf16_vector.cuh"
#include "dropout.cuh"
#include "matrix.cuh"
#include "tensor_core.cuh"

namespace {

constexpr unsigned RANKS = 64;

__device__ __forceinline__ unsigned div_up(unsigned a, unsigned b) { return a / b + (a % b != 0); }

// The share of `steps` that split blockIdx.y of gridDim.y has.
struct Steps {
    unsigned begin, end;

    static __device__ __forceinline__ Steps of_split(unsigned steps) {
        const uint64_t all = steps;
        return {static_cast<unsigned>(all * blockIdx.y / gridDim.y),
                static_cast<unsigned>(all * (blockIdx.y + 1) / gridDim.y)};
    }
};

// The adapter that block `block` along the ranks of all adapters is for, and its first rank there.
struct RankBlock {
    unsigned adapter, first_rank, others;

    static __device__ __forceinline__ RankBlock of(unsigned block, unsigned adapters, unsigned r) {
        const unsigned of_one = div_up(r, RANKS);
        const unsigned of_all = adapters * of_one;
        return {block % of_all / of_one, block % of_one * RANKS, block / of_all};
    }
};

// Where a lane is in the fragments of tensor_core.cuh.
struct Lane {
    unsigned g, t;

    static __device__ __forceinline__ Lane current() {
        const unsigned lane = threadIdx.x % WARP_LANES;
        return {lane / 4, lane % 4};
    }
};

// The row that a lane names in a load of four matrices: number `row` of matrix 2 high + low.
struct MatrixRow {
    unsigned row, low, high;

    static __device__ __forceinline__ MatrixRow of_lane() {
        const unsigned lane = threadIdx.x % WARP_LANES;
        return {lane % 8, lane / 8 % 2, lane / 16};
    }
};

// A result of which each split makes a part: the only split puts it in its place, several put theirs into
// partial: [splits, count].
template <typename T>
struct SplitResult {
    T* __restrict__ result;
    float* __restrict__ partial;
    uint64_t count;

    __device__ __forceinline__ void put(uint64_t place, float sum) const {
        if (gridDim.y == 1) {
            finish(result + place, sum);
        } else {
            partial[blockIdx.y * count + place] = sum;
        }
    }

    // Puts the sums of the splits, in their order, in their places.
    __device__ __forceinline__ void add_splits(unsigned splits) const {
        const uint64_t threads = static_cast<uint64_t>(gridDim.x) * blockDim.x;
        for (uint64_t i = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += threads) {
            float sum = 0.0f;
            for (unsigned split = 0; split < splits; split++) {
                sum += partial[split * count + i];
            }
            finish(result + i, sum);
        }
    }

 private:
    static __device__ __forceinline__ void finish(bf16* place, float sum) { *place = from_float<bf16>(sum); }
    static __device__ __forceinline__ void finish(float* place, float sum) { *place += sum; }
};

// sums += x^T du for 32 columns of x, from `x` on, and every RANK_WARPS-th 16 ranks of du. Both lie in shared memory.
//
// sums: [16 columns each][16 ranks each][8 ranks each][as tensor_core.cuh says].
template <unsigned ROWS, unsigned RANK_WARPS>
__device__ __forceinline__ void multiply_transposed(const bf16* x, unsigned x_stride, const bf16* du, unsigned du_stride,
                                                    unsigned rank_warp, unsigned ranks,
                                                    float (&sums)[2][RANKS / 16 / RANK_WARPS][2][4]) {
    const MatrixRow named = MatrixRow::of_lane();
#pragma unroll
    for (unsigned k = 0; k < ROWS; k += 16) {
        unsigned x_columns[2][4];
#pragma unroll
        for (unsigned m = 0; m < 2; m++) {
            const bf16* const row = x + (k + named.high * 8 + named.row) * x_stride;
            load_matrix_x4_transposed(x_columns[m], row + 16 * m + named.low * 8);
        }
#pragma unroll
        for (unsigned j = 0; j < RANKS / 16 / RANK_WARPS; j++) {
            const unsigned rank = (j * RANK_WARPS + rank_warp) * 16;
            if (rank < ranks) {
                unsigned b[4];
                load_matrix_x4_transposed(b, du + (k + named.low * 8 + named.row) * du_stride + rank + named.high * 8);
#pragma unroll
                for (unsigned m = 0; m < 2; m++) {
                    mma_m16n8k16(sums[m][j][0], x_columns[m], {b[0], b[1]});
                    mma_m16n8k16(sums[m][j][1], x_columns[m], {b[2], b[3]});
                }
            }
        }
    }
}

// sums += du a for rows of du, from `du` on, and 32 columns of a, from `a` on. Both lie in shared memory.
//
// sums: [16 rows each][8 columns each][as tensor_core.cuh says].
template <unsigned ROW_TILES>
__device__ __forceinline__ void multiply(const bf16* du, unsigned du_stride, const bf16* a, unsigned a_stride,
                                         unsigned ranks, float (&sums)[ROW_TILES][4][4]) {
    const MatrixRow named = MatrixRow::of_lane();
#pragma unroll 1
    for (unsigned k = 0; k < ranks; k += 16) {
        unsigned b[2][4];
#pragma unroll
        for (unsigned j = 0; j < 2; j++) {
            load_matrix_x4_transposed(b[j], a + (k + named.low * 8 + named.row) * a_stride + 16 * j + named.high * 8);
        }
#pragma unroll
        for (unsigned m = 0; m < ROW_TILES; m++) {
            unsigned du_rows[4];
            load_matrix_x4(du_rows, du + (16 * m + named.low * 8 + named.row) * du_stride + k + named.high * 8);
#pragma unroll
            for (unsigned j = 0; j < 4; j++) {
                mma_m16n8k16(sums[m][j], du_rows, {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]});
            }
        }
    }
}

// Adds the sums of the SLICES groups of a block's warps, slice 0 getting the result. `exchange` has room for one slice.
template <unsigned SLICES, unsigned TILES>
__device__ __forceinline__ void add_slices(unsigned slice, unsigned warp_in_slice, float (&sums)[TILES][4],
                                           float4* exchange) {
    float4* const lane_place = exchange + warp_in_slice * TILES * WARP_LANES + threadIdx.x % WARP_LANES;
    for (unsigned from = 1; from < SLICES; from++) {
        __syncthreads();
        if (slice == from) {
#pragma unroll
            for (unsigned tile = 0; tile < TILES; tile++) {
                lane_place[tile * WARP_LANES] = make_float4(sums[tile][0], sums[tile][1], sums[tile][2], sums[tile][3]);
            }
        }
        __syncthreads();
        if (slice == 0) {
#pragma unroll
            for (unsigned tile = 0; tile < TILES; tile++) {
                const float4 more = lane_place[tile * WARP_LANES];
                sums[tile][0] += more.x;
                sums[tile][1] += more.y;
                sums[tile][2] += more.z;
                sums[tile][3] += more.w;
            }
        }
    }
}

}  // namespace

// A warp multiplies 16 rows of x with all ranks over a slice of the columns: of each 128 columns, every fourth warp has 32.
//
// A lane loads the elements 8t .. 8t + 7 of the rows g and g + 8 of its slice, and takes its four words of a row as those of
// two A fragments. So the columns are multiplied in another order than they lie, in x and in `a` alike, and x never passes
// through shared memory. The slices are added up at the end.
KERNEL(512, lora_down_bf16)
(const bf16* __restrict__ x, const bf16* __restrict__ a, unsigned n, unsigned d, unsigned r, unsigned adapters,
 bf16* __restrict__ u, float* __restrict__ partial, unsigned key0, unsigned key1, unsigned stream0, unsigned stream1,
 unsigned threshold, float keep_scale) {
    constexpr unsigned ROWS = 64;
    constexpr unsigned ROW_WARPS = ROWS / 16;
    constexpr unsigned SLICES = 4;
    constexpr unsigned SLICE_COLS = 32;
    constexpr unsigned STEP_COLS = SLICES * SLICE_COLS;
    constexpr unsigned RANK_TILES = RANKS / 8;
    // Steps of x that are on their way from memory: 32 KB for the block. With three it spills (nvcc 13.0, sm_120).
    constexpr unsigned AHEAD = 2;

    // [2][SLICES][RANKS][SLICE_COLS]: the columns of `a` of this step and of the next.
    constexpr unsigned SLICE_ELEMENTS = RANKS * SLICE_COLS;
    SHARED(bf16, a_tiles, 2 * SLICES * SLICE_ELEMENTS);

    const RankBlock place = RankBlock::of(blockIdx.x, adapters, r);
    const Dropout dropout = {{key0, key1}, {stream0, stream1 + place.adapter}, threshold, keep_scale};
    const Matrix x_matrix(x, n, d);
    // With the ranks of all adapters: a row past this adapter's is multiplied, and its sums are left.
    const Matrix a_matrix(a, adapters * r, d);
    const unsigned first_rank = place.adapter * r + place.first_rank;
    const unsigned ranks = min(r - place.first_rank, RANKS);
    const Lane lane = Lane::current();
    const unsigned warp = threadIdx.x / WARP_LANES;
    const unsigned row_warp = warp % ROW_WARPS;
    const unsigned slice = warp / ROW_WARPS;
    const unsigned rank_tiles = div_up(ranks, 8);
    const unsigned row = place.others * ROWS + row_warp * 16 + lane.g;
    const Steps steps = Steps::of_split(div_up(d, STEP_COLS));

    const auto slice_col = [=](unsigned step) { return step * STEP_COLS + slice * SLICE_COLS; };
    const auto load_x = [=](unsigned step, unsigned half) {
        return step < steps.end ? x_matrix.load(row + 8 * half, slice_col(step) + 8 * lane.t) : make_uint4(0, 0, 0, 0);
    };
    const auto a_tile = [&](unsigned step) { return a_tiles + (step % 2 * SLICES + slice) * SLICE_ELEMENTS; };
    const auto start_a = [&](unsigned step) {
        if (step >= steps.end) {
            return;
        }
        const unsigned thread = row_warp * WARP_LANES + threadIdx.x % WARP_LANES;
        const unsigned col = thread % 4 * 8;
        for (unsigned rank = thread / 4; rank < 8 * rank_tiles; rank += ROW_WARPS * WARP_LANES / 4) {
            a_matrix.copy_async(a_tile(step) + rank * SLICE_COLS + col, first_rank + rank, slice_col(step) + col);
        }
        copy_async_commit();
    };

    float sums[RANK_TILES][4] = {};
    uint4 ahead[AHEAD][2];
#pragma unroll
    for (unsigned i = 0; i < AHEAD; i++) {
        ahead[i][0] = load_x(steps.begin + i, 0);
        ahead[i][1] = load_x(steps.begin + i, 1);
    }
    start_a(steps.begin);
    for (unsigned first = steps.begin; first < steps.end; first += AHEAD) {
#pragma unroll
        for (unsigned i = 0; i < AHEAD; i++) {
            const unsigned step = first + i;
            if (step >= steps.end) {
                break;
            }
            copy_async_wait<0>();
            __syncthreads();
            start_a(step + 1);
            const unsigned col = slice_col(step) + 8 * lane.t;
            const uint4 top = dropout.apply(ahead[i][0], x_matrix.index(row, col));
            const uint4 bottom = dropout.apply(ahead[i][1], x_matrix.index(row + 8, col));
            ahead[i][0] = load_x(step + AHEAD, 0);
            ahead[i][1] = load_x(step + AHEAD, 1);
            const bf16* const a_row = a_tile(step) + lane.g * SLICE_COLS + 8 * lane.t;
#pragma unroll
            for (unsigned tile = 0; tile < RANK_TILES; tile++) {
                if (tile < rank_tiles) {
                    const uint4 b = *reinterpret_cast<const uint4*>(a_row + 8 * tile * SLICE_COLS);
                    mma_m16n8k16(sums[tile], {top.x, bottom.x, top.y, bottom.y}, {b.x, b.y});
                    mma_m16n8k16(sums[tile], {top.z, bottom.z, top.w, bottom.w}, {b.z, b.w});
                }
            }
        }
    }

    add_slices<SLICES>(slice, row_warp, sums, reinterpret_cast<float4*>(a_tiles));
    if (slice != 0) {
        return;
    }
    const unsigned u_stride = adapters * r;
    const SplitResult<bf16> result = {u, partial, static_cast<uint64_t>(n) * u_stride};
#pragma unroll
    for (unsigned tile = 0; tile < RANK_TILES; tile++) {
#pragma unroll
        for (unsigned i = 0; i < 4; i++) {
            const unsigned u_row = row + i / 2 * 8;
            const unsigned rank = 8 * tile + 2 * lane.t + i % 2;
            if (u_row < n && rank < ranks) {
                result.put(static_cast<uint64_t>(u_row) * u_stride + first_rank + rank, keep_scale * sums[tile][i]);
            }
        }
    }
}

KERNEL(256, lora_down_sum_bf16)(float* __restrict__ partial, unsigned splits, uint64_t count, bf16* __restrict__ u) {
    SplitResult<bf16>{u, partial, count}.add_splits(splits);
}

// The columns of x are the rows of the product, x^T du. A thread brings two times eight elements of x a step through its
// registers, where they are masked, to shared memory; from there a warp takes 32 columns, with every other 16 ranks.
KERNEL(256, lora_grad_a_bf16)
(const bf16* __restrict__ x, const bf16* __restrict__ du, unsigned n, unsigned d, unsigned r, unsigned adapters,
 float* __restrict__ d_a, float* __restrict__ partial, unsigned key0, unsigned key1, unsigned stream0, unsigned stream1,
 unsigned threshold, float keep_scale) {
    constexpr unsigned COLS = 128;
    constexpr unsigned STEP_ROWS = 32;
    constexpr unsigned COL_WARPS = 4;
    constexpr unsigned RANK_WARPS = 2;
    // Eight elements more than there are, so that the rows of a matrix load are in different banks.
    constexpr unsigned X_STRIDE = COLS + 8;
    constexpr unsigned DU_STRIDE = RANKS + 8;
    constexpr unsigned AHEAD = 3;

    SHARED(bf16, x_tiles, 2 * STEP_ROWS * X_STRIDE);
    SHARED(bf16, du_tiles, 2 * STEP_ROWS * DU_STRIDE);

    const RankBlock place = RankBlock::of(blockIdx.x, adapters, r);
    const unsigned adapter = place.adapter;
    const unsigned first_rank = place.first_rank;
    const Dropout dropout = {{key0, key1}, {stream0, stream1 + adapter}, threshold, keep_scale};
    const Matrix x_matrix(x, n, d);
    const Matrix du_matrix(du + adapter * r, n, r, adapters * r);
    const Lane lane = Lane::current();
    const unsigned warp = threadIdx.x / WARP_LANES;
    const unsigned warp_col = warp % COL_WARPS * 32;
    const unsigned rank_warp = warp / COL_WARPS;
    const unsigned ranks = min(r - first_rank, RANKS);
    const unsigned first_col = place.others * COLS;
    const Steps steps = Steps::of_split(div_up(n, STEP_ROWS));

    // The eight elements of x that this thread brings: those from x_col on in the row x_row, and 16 rows below.
    const unsigned x_row = threadIdx.x / (COLS / 8);
    const unsigned x_col = threadIdx.x % (COLS / 8) * 8;
    const auto step_row = [=](unsigned step, unsigned half) { return step * STEP_ROWS + x_row + 16 * half; };
    const auto load_x = [=](unsigned step, unsigned half) {
        return step < steps.end ? x_matrix.load(step_row(step, half), first_col + x_col) : make_uint4(0, 0, 0, 0);
    };
    const auto x_tile = [&](unsigned step) { return x_tiles + step % 2 * STEP_ROWS * X_STRIDE; };
    const auto du_tile = [&](unsigned step) { return du_tiles + step % 2 * STEP_ROWS * DU_STRIDE; };
    const auto start_du = [&](unsigned step) {
        if (step >= steps.end) {
            return;
        }
        const unsigned du_row = threadIdx.x / (RANKS / 8);
        const unsigned rank = threadIdx.x % (RANKS / 8) * 8;
        du_matrix.copy_async(du_tile(step) + du_row * DU_STRIDE + rank, step * STEP_ROWS + du_row, first_rank + rank);
        copy_async_commit();
    };

    float sums[2][RANKS / 16 / RANK_WARPS][2][4] = {};
    uint4 ahead[AHEAD][2];
#pragma unroll
    for (unsigned i = 0; i < AHEAD; i++) {
        ahead[i][0] = load_x(steps.begin + i, 0);
        ahead[i][1] = load_x(steps.begin + i, 1);
    }
    start_du(steps.begin);
    for (unsigned first = steps.begin; first < steps.end; first += AHEAD) {
#pragma unroll
        for (unsigned i = 0; i < AHEAD; i++) {
            const unsigned step = first + i;
            if (step >= steps.end) {
                break;
            }
#pragma unroll
            for (unsigned half = 0; half < 2; half++) {
                const uint64_t element = x_matrix.index(step_row(step, half), first_col + x_col);
                bf16* const place = x_tile(step) + (x_row + 16 * half) * X_STRIDE + x_col;
                *reinterpret_cast<uint4*>(place) = dropout.apply(ahead[i][half], element);
                ahead[i][half] = load_x(step + AHEAD, half);
            }
            copy_async_wait<0>();
            __syncthreads();
            start_du(step + 1);
            multiply_transposed<STEP_ROWS, RANK_WARPS>(x_tile(step) + warp_col, X_STRIDE, du_tile(step), DU_STRIDE,
                                                       rank_warp, ranks, sums);
        }
    }

    const SplitResult<float> result = {d_a, partial, static_cast<uint64_t>(adapters) * r * d};
#pragma unroll
    for (unsigned m = 0; m < 2; m++) {
#pragma unroll
        for (unsigned j = 0; j < RANKS / 16 / RANK_WARPS; j++) {
#pragma unroll
            for (unsigned i = 0; i < 8; i++) {
                const unsigned col = first_col + warp_col + 16 * m + lane.g + i % 4 / 2 * 8;
                const unsigned rank = first_rank + (j * RANK_WARPS + rank_warp) * 16 + i / 4 * 8 + 2 * lane.t + i % 2;
                if (col < d && rank < r) {
                    const uint64_t row = static_cast<uint64_t>(adapter) * r + rank;
                    result.put(row * d + col, keep_scale * sums[m][j][i / 4][i % 4]);
                }
            }
        }
    }
}

KERNEL(256, lora_grad_a_sum_f32)(float* __restrict__ partial, unsigned splits, uint64_t count, float* __restrict__ d_a) {
    SplitResult<float>{d_a, partial, count}.add_splits(splits);
}

// A warp makes 32 rows and 32 columns of the product. In shared memory the columns of `a` lie so that a lane's results of
// four matrix products, two neighbours each, are eight that lie together in dx: of 16 pairs, pair q is put in place
// q % 4 * 4 + q / 4.
KERNEL(256, lora_up_bf16)
(const bf16* __restrict__ du, const bf16* __restrict__ a, unsigned n, unsigned d, unsigned r, unsigned adapters,
 bf16* __restrict__ dx, unsigned key0, unsigned key1, unsigned stream0, unsigned stream1, unsigned threshold,
 float keep_scale) {
    constexpr unsigned ROWS = 64;
    constexpr unsigned COLS = 128;
    constexpr unsigned COL_WARPS = 4;
    constexpr unsigned WARP_ROWS = 32;
    constexpr unsigned ROW_TILES = WARP_ROWS / 16;
    constexpr unsigned DU_STRIDE = RANKS + 8;
    constexpr unsigned A_STRIDE = COLS + 8;

    SHARED(bf16, du_tile, ROWS * DU_STRIDE);
    SHARED(bf16, a_tile, RANKS * A_STRIDE);

    const Matrix dx_matrix(dx, n, d);
    const Lane lane = Lane::current();
    const unsigned warp = threadIdx.x / WARP_LANES;
    const unsigned warp_col = warp % COL_WARPS * 32;
    const unsigned warp_row = warp / COL_WARPS * WARP_ROWS;
    const unsigned first_row = blockIdx.y * ROWS;
    const unsigned first_col = blockIdx.x * COLS;

    // What is in dx, [16 rows][8 rows]: on its way while the first product is made, and then with those of the adapters added,
    // rounded after each.
    const unsigned row = first_row + warp_row + lane.g;
    const unsigned col = first_col + warp_col + 8 * lane.t;
    uint4 result[ROW_TILES][2];
#pragma unroll
    for (unsigned m = 0; m < ROW_TILES; m++) {
        result[m][0] = dx_matrix.load(row + 16 * m, col);
        result[m][1] = dx_matrix.load(row + 16 * m + 8, col);
    }

#pragma unroll 1
    for (unsigned adapter = 0; adapter < adapters; adapter++) {
        const Dropout dropout = {{key0, key1}, {stream0, stream1 + adapter}, threshold, keep_scale};
        const Matrix du_matrix(du + adapter * r, n, r, adapters * r);
        const Matrix a_matrix(a + static_cast<uint64_t>(adapter) * r * d, r, d);
        float sums[ROW_TILES][4][4] = {};
        for (unsigned first_rank = 0; first_rank < r; first_rank += RANKS) {
            const unsigned ranks = min(div_up(r - first_rank, 16) * 16, RANKS);
            __syncthreads();
#pragma unroll
            for (unsigned i = 0; i < ROWS * RANKS / 8; i += 256) {
                const unsigned tile_row = (i + threadIdx.x) / (RANKS / 8);
                const unsigned rank = threadIdx.x % (RANKS / 8) * 8;
                if (rank < ranks) {
                    du_matrix.copy_async(du_tile + tile_row * DU_STRIDE + rank, first_row + tile_row, first_rank + rank);
                }
            }
            copy_async_commit();
            for (unsigned rank = threadIdx.x / (COLS / 8); rank < ranks; rank += 256 / (COLS / 8)) {
                const unsigned tile_col = threadIdx.x % (COLS / 8) * 8;
                const uint4 eight = a_matrix.load(first_rank + rank, first_col + tile_col);
                bf16* const group = a_tile + rank * A_STRIDE + tile_col / 32 * 32;
                unsigned* const pairs = reinterpret_cast<unsigned*>(group) + tile_col % 32 / 8;
                pairs[0] = eight.x;
                pairs[4] = eight.y;
                pairs[8] = eight.z;
                pairs[12] = eight.w;
            }
            copy_async_wait<0>();
            __syncthreads();
            multiply(du_tile + warp_row * DU_STRIDE, DU_STRIDE, a_tile + warp_col, A_STRIDE, ranks, sums);
        }
#pragma unroll
        for (unsigned m = 0; m < ROW_TILES; m++) {
#pragma unroll
            for (unsigned half = 0; half < 2; half++) {
                const uint4 mask = dropout.mask(dx_matrix.index(row + 16 * m + 8 * half, col));
                const unsigned kept[4] = {mask.x, mask.y, mask.z, mask.w};
                float values[8];
                Bf16Vector<8>{result[m][half]}.widen(values);
#pragma unroll
                for (unsigned j = 0; j < 4; j++) {
                    values[2 * j] += kept[j] & 0x0000ffffu ? keep_scale * sums[m][j][2 * half] : 0.0f;
                    values[2 * j + 1] += kept[j] & 0xffff0000u ? keep_scale * sums[m][j][2 * half + 1] : 0.0f;
                }
                result[m][half] = Bf16Vector<8>::round(values).packed;
            }
        }
    }

#pragma unroll
    for (unsigned m = 0; m < ROW_TILES; m++) {
#pragma unroll
        for (unsigned half = 0; half < 2; half++) {
            const unsigned dx_row = row + 16 * m + 8 * half;
            if (dx_row >= n || col >= d) {
                continue;
            }
            const uint64_t first = dx_matrix.index(dx_row, col);
            if (dx_matrix.vectorized) {
                Bf16Vector<8>{result[m][half]}.store(dx + first);
            } else {
                float values[8];
                Bf16Vector<8>{result[m][half]}.widen(values);
#pragma unroll
                for (unsigned e = 0; e < 8; e++) {
                    if (col + e < d) {
                        dx[first + e] = from_float<bf16>(values[e]);
                    }
                }
            }
        }
    }
}
