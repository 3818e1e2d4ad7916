// The adapter's products with its input x: [n, d], which is large beside everything else in them.
//
//   lora_down    u = dropout(x) a^T              u: [n, r], a: [r, d]
//   lora_grad_a  d_a += du^T dropout(x)          d_a: [r, d] in f32, du: [n, r]
//   lora_up      dx += mask keep_scale (du a)
//
// dropout(x) = mask keep_scale x. Element e = row d + col is kept where its 16 random bits are at least `threshold`: with one
// Philox call for eight elements, counter (e / 8, stream) and element e % 8 in the low half of word 0, its high half, the low
// half of word 1, and so on. The three kernels make the same mask again; nothing is stored. The products are scaled in f32.
//
// Grids, with a block for 64 ranks (more ranks are for the next block, which finds x in the cache):
//   lora_down    (ceil(n / 64) ceil(r / 64), splits): 64 rows a block, and its share of the d columns
//   lora_grad_a  (ceil(d / 128) ceil(r / 64), splits): 128 columns a block, and its share of the n rows
//   lora_up      (ceil(d / 128), ceil(n / 64)): 128 columns and 64 rows a block, all ranks
// One split writes its result. More than one, for what would not fill a GPU, write theirs to partial: [splits, n, r] or
// [splits, r, d] in f32, and lora_down_sum or lora_grad_a_sum adds them in order (any grid).
//
// Bytes an element of x: 2 for lora_down and lora_grad_a, 4 for lora_up; the small matrices come from the cache. In all three
// a lane moves eight elements of x at a time, and applies their mask in registers.
//
// Source: arXiv:2106.09685; Philox: Salmon et al. 2011.

#include "bf16_vector.cuh"
#include "philox.cuh"
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
            const uint4 words = numbers<5>(first);
            return make_uint4(mask_of(words.x), mask_of(words.y), mask_of(words.z), mask_of(words.w));
        }
        // A row that starts in the middle of a call's eight: rare, so short rather than fast.
        unsigned kept = 0;
#pragma unroll 1
        for (unsigned j = 0; j < 8; j++) {
            const uint4 words = numbers<1>(first + j);
            const unsigned place = static_cast<unsigned>((first + j) % 8);
            const unsigned pair = place < 4 ? (place < 2 ? words.x : words.y) : (place < 6 ? words.z : words.w);
            kept |= ((pair >> 16 * (place % 2) & 0xffffu) >= threshold ? 1u : 0u) << j;
        }
        return make_uint4(mask_of_bits(kept), mask_of_bits(kept >> 2), mask_of_bits(kept >> 4), mask_of_bits(kept >> 6));
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

// A row-major matrix in global memory, read eight elements of a row at a time. Past its edges it is zero.
struct Matrix {
    const bf16* __restrict__ data;
    unsigned rows, cols;
    bool vectorized;

    __device__ __forceinline__ Matrix(const bf16* data, unsigned rows, unsigned cols)
        : data(data), rows(rows), cols(cols), vectorized(cols % 8 == 0 && are_aligned(data)) {}

    __device__ __forceinline__ uint64_t index(unsigned row, unsigned col) const {
        return static_cast<uint64_t>(row) * cols + col;
    }

    __device__ __forceinline__ uint4 load(unsigned row, unsigned col) const {
        if (vectorized) {
            uint4 eight = {};
            if (row < rows && col < cols) {
                eight = *reinterpret_cast<const uint4*>(data + index(row, col));
            }
            return eight;
        }
        uint4 eight = {};
#pragma unroll 1
        for (unsigned i = 0; i < 8; i += 2) {
            eight = make_uint4(eight.y, eight.z, eight.w, element(row, col + i) | element(row, col + i + 1) << 16);
        }
        return eight;
    }

    // Shared memory has the elements after copy_async_wait and a barrier.
    __device__ __forceinline__ void copy_async(bf16* shared, unsigned row, unsigned col) const {
        if (vectorized) {
            const bool valid = row < rows && col < cols;
            copy_async_16(shared, valid ? data + index(row, col) : data, valid);
        } else {
            *reinterpret_cast<uint4*>(shared) = load(row, col);
        }
    }

 private:
    __device__ __forceinline__ unsigned element(unsigned row, unsigned col) const {
        return row < rows && col < cols ? data[index(row, col)].bits : 0u;
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

// sum[i] = the splits' partial results for i, added in order.
__device__ __forceinline__ float sum_of_splits(const float* __restrict__ partial, unsigned splits, uint64_t count, uint64_t i) {
    float sum = 0.0f;
    for (unsigned split = 0; split < splits; split++) {
        sum += partial[split * count + i];
    }
    return sum;
}

}  // namespace

// A warp multiplies 16 rows of x with all ranks over a slice of the columns: of each 128 columns, every fourth warp has 32.
//
// A lane loads the elements 8t .. 8t + 7 of the rows g and g + 8 of its slice, and takes its four words of a row as those of two
// A fragments. So the columns are multiplied in another order than they lie, in x and in `a` alike, and x never passes through
// shared memory. The slices are added up at the end.
KERNEL(512, lora_down_bf16)
(const bf16* __restrict__ x, const bf16* __restrict__ a, unsigned n, unsigned d, unsigned r, bf16* __restrict__ u,
 float* __restrict__ partial, unsigned key0, unsigned key1, unsigned stream0, unsigned stream1, unsigned threshold,
 float keep_scale) {
    constexpr unsigned ROWS = 64;
    constexpr unsigned ROW_WARPS = ROWS / 16;
    constexpr unsigned SLICES = 4;
    constexpr unsigned SLICE_COLS = 32;
    constexpr unsigned STEP_COLS = SLICES * SLICE_COLS;
    constexpr unsigned RANK_TILES = RANKS / 8;
    // Steps of x that are on their way from memory.
    constexpr unsigned AHEAD = 3;

    // [2][SLICES][RANKS][SLICE_COLS]: the columns of `a` of this step and of the next.
    constexpr unsigned SLICE_ELEMENTS = RANKS * SLICE_COLS;
    SHARED(bf16, a_tiles, 2 * SLICES * SLICE_ELEMENTS);

    const Dropout dropout = {{key0, key1}, {stream0, stream1}, threshold, keep_scale};
    const Matrix x_matrix(x, n, d);
    const Matrix a_matrix(a, r, d);
    const Lane lane = Lane::current();
    const unsigned warp = threadIdx.x / WARP_LANES;
    const unsigned row_warp = warp % ROW_WARPS;
    const unsigned slice = warp / ROW_WARPS;
    const unsigned rank_blocks = div_up(r, RANKS);
    const unsigned first_rank = blockIdx.x % rank_blocks * RANKS;
    const unsigned rank_tiles = div_up(min(r - first_rank, RANKS), 8);
    const unsigned row = blockIdx.x / rank_blocks * ROWS + row_warp * 16 + lane.g;
    const Steps steps = Steps::of_split(div_up(d, STEP_COLS));

    const auto slice_col = [=](unsigned step) { return step * STEP_COLS + slice * SLICE_COLS; };
    const auto load_x = [=](unsigned step, unsigned half) {
        return step < steps.end ? x_matrix.load(row + 8 * half, slice_col(step) + 8 * lane.t) : make_uint4(0, 0, 0, 0);
    };
    const auto a_tile = [&](unsigned step) { return a_tiles + (step % 2 * SLICES + slice) * SLICE_ELEMENTS; };
    const auto start_a = [&](unsigned step) {
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
            if (step + 1 < steps.end) {
                start_a(step + 1);
            }
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

    float4* const slice_sums = reinterpret_cast<float4*>(a_tiles) + row_warp * RANK_TILES * WARP_LANES + threadIdx.x % WARP_LANES;
    for (unsigned s = 1; s < SLICES; s++) {
        __syncthreads();
        if (slice == s) {
#pragma unroll
            for (unsigned tile = 0; tile < RANK_TILES; tile++) {
                slice_sums[tile * WARP_LANES] = make_float4(sums[tile][0], sums[tile][1], sums[tile][2], sums[tile][3]);
            }
        }
        __syncthreads();
        if (slice == 0) {
#pragma unroll
            for (unsigned tile = 0; tile < RANK_TILES; tile++) {
                const float4 other = slice_sums[tile * WARP_LANES];
                sums[tile][0] += other.x;
                sums[tile][1] += other.y;
                sums[tile][2] += other.z;
                sums[tile][3] += other.w;
            }
        }
    }
    if (slice != 0) {
        return;
    }
#pragma unroll
    for (unsigned tile = 0; tile < RANK_TILES; tile++) {
#pragma unroll
        for (unsigned i = 0; i < 4; i++) {
            const unsigned u_row = row + i / 2 * 8;
            const unsigned rank = first_rank + 8 * tile + 2 * lane.t + i % 2;
            if (u_row < n && rank < r) {
                const float sum = keep_scale * sums[tile][i];
                const uint64_t place = static_cast<uint64_t>(u_row) * r + rank;
                if (gridDim.y == 1) {
                    u[place] = from_float<bf16>(sum);
                } else {
                    partial[static_cast<uint64_t>(blockIdx.y) * n * r + place] = sum;
                }
            }
        }
    }
}

KERNEL(256, lora_down_sum_bf16)(const float* __restrict__ partial, unsigned splits, uint64_t count, bf16* __restrict__ u) {
    const uint64_t threads = static_cast<uint64_t>(gridDim.x) * blockDim.x;
    for (uint64_t i = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += threads) {
        u[i] = from_float<bf16>(sum_of_splits(partial, splits, count, i));
    }
}

// The columns of x are the rows of the product, x^T du. A thread brings two times eight elements of x a step through its
// registers, where they are masked, to shared memory; from there a warp takes 32 columns, with every other 16 ranks.
KERNEL(256, lora_grad_a_bf16)
(const bf16* __restrict__ x, const bf16* __restrict__ du, unsigned n, unsigned d, unsigned r, float* __restrict__ d_a,
 float* __restrict__ partial, unsigned key0, unsigned key1, unsigned stream0, unsigned stream1, unsigned threshold,
 float keep_scale) {
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

    const Dropout dropout = {{key0, key1}, {stream0, stream1}, threshold, keep_scale};
    const Matrix x_matrix(x, n, d);
    const Matrix du_matrix(du, n, r);
    const Lane lane = Lane::current();
    const unsigned warp = threadIdx.x / WARP_LANES;
    const unsigned warp_col = warp % COL_WARPS * 32;
    const unsigned rank_warp = warp / COL_WARPS;
    const unsigned rank_blocks = div_up(r, RANKS);
    const unsigned first_rank = blockIdx.x % rank_blocks * RANKS;
    const unsigned ranks = min(r - first_rank, RANKS);
    const unsigned first_col = blockIdx.x / rank_blocks * COLS;
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
        const unsigned du_row = threadIdx.x / (RANKS / 8);
        const unsigned rank = threadIdx.x % (RANKS / 8) * 8;
        du_matrix.copy_async(du_tile(step) + du_row * DU_STRIDE + rank, step * STEP_ROWS + du_row, first_rank + rank);
        copy_async_commit();
    };

    // [16 columns][16 ranks][8 ranks][..]
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
            if (step + 1 < steps.end) {
                start_du(step + 1);
            }
            // Matrix and row of it that this lane names in a matrix load.
            const unsigned matrix = threadIdx.x % WARP_LANES / 8;
            const unsigned matrix_row = threadIdx.x % 8;
#pragma unroll
            for (unsigned k = 0; k < STEP_ROWS; k += 16) {
                unsigned x_columns[2][4];
#pragma unroll
                for (unsigned m = 0; m < 2; m++) {
                    const unsigned col = warp_col + 16 * m + matrix % 2 * 8;
                    load_matrix_x4_transposed(x_columns[m], x_tile(step) + (k + matrix / 2 * 8 + matrix_row) * X_STRIDE + col);
                }
#pragma unroll
                for (unsigned j = 0; j < RANKS / 16 / RANK_WARPS; j++) {
                    const unsigned rank = (j * RANK_WARPS + rank_warp) * 16;
                    if (rank < ranks) {
                        unsigned b[4];
                        load_matrix_x4_transposed(
                            b, du_tile(step) + (k + matrix % 2 * 8 + matrix_row) * DU_STRIDE + rank + matrix / 2 * 8);
#pragma unroll
                        for (unsigned m = 0; m < 2; m++) {
                            mma_m16n8k16(sums[m][j][0], x_columns[m], {b[0], b[1]});
                            mma_m16n8k16(sums[m][j][1], x_columns[m], {b[2], b[3]});
                        }
                    }
                }
            }
        }
    }

#pragma unroll
    for (unsigned m = 0; m < 2; m++) {
#pragma unroll
        for (unsigned j = 0; j < RANKS / 16 / RANK_WARPS; j++) {
#pragma unroll
            for (unsigned i = 0; i < 8; i++) {
                const unsigned col = first_col + warp_col + 16 * m + lane.g + i % 4 / 2 * 8;
                const unsigned rank = first_rank + (j * RANK_WARPS + rank_warp) * 16 + i / 4 * 8 + 2 * lane.t + i % 2;
                if (col < d && rank < r) {
                    const float sum = keep_scale * sums[m][j][i / 4][i % 4];
                    const uint64_t place = static_cast<uint64_t>(rank) * d + col;
                    if (gridDim.y == 1) {
                        d_a[place] += sum;
                    } else {
                        partial[static_cast<uint64_t>(blockIdx.y) * r * d + place] = sum;
                    }
                }
            }
        }
    }
}

KERNEL(256, lora_grad_a_sum_f32)
(const float* __restrict__ partial, unsigned splits, uint64_t count, float* __restrict__ d_a) {
    const uint64_t threads = static_cast<uint64_t>(gridDim.x) * blockDim.x;
    for (uint64_t i = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += threads) {
        d_a[i] += sum_of_splits(partial, splits, count, i);
    }
}

// A warp makes 32 rows and 32 columns of the product. In shared memory the columns of `a` lie so that a lane's results of four
// products, which are two neighbours each, are the eight that lie together in dx: pair q of 16 is put in place q % 4 * 4 + q / 4.
KERNEL(256, lora_up_bf16)
(const bf16* __restrict__ du, const bf16* __restrict__ a, unsigned n, unsigned d, unsigned r, bf16* __restrict__ dx,
 unsigned key0, unsigned key1, unsigned stream0, unsigned stream1, unsigned threshold, float keep_scale) {
    constexpr unsigned ROWS = 64;
    constexpr unsigned COLS = 128;
    constexpr unsigned COL_WARPS = 4;
    constexpr unsigned WARP_ROWS = 32;
    constexpr unsigned ROW_TILES = WARP_ROWS / 16;
    constexpr unsigned DU_STRIDE = RANKS + 8;
    constexpr unsigned A_STRIDE = COLS + 8;

    SHARED(bf16, du_tile, ROWS * DU_STRIDE);
    SHARED(bf16, a_tile, RANKS * A_STRIDE);

    const Dropout dropout = {{key0, key1}, {stream0, stream1}, threshold, keep_scale};
    const Matrix du_matrix(du, n, r);
    const Matrix a_matrix(a, r, d);
    const Matrix dx_matrix(dx, n, d);
    const Lane lane = Lane::current();
    const unsigned warp = threadIdx.x / WARP_LANES;
    const unsigned warp_col = warp % COL_WARPS * 32;
    const unsigned warp_row = warp / COL_WARPS * WARP_ROWS;
    const unsigned first_row = blockIdx.y * ROWS;
    const unsigned first_col = blockIdx.x * COLS;
    const unsigned matrix = threadIdx.x % WARP_LANES / 8;
    const unsigned matrix_row = threadIdx.x % 8;

    // What is in dx, [16 rows][8 rows]: on its way while the product is made.
    const unsigned row = first_row + warp_row + lane.g;
    const unsigned col = first_col + warp_col + 8 * lane.t;
    uint4 before[ROW_TILES][2];
#pragma unroll
    for (unsigned m = 0; m < ROW_TILES; m++) {
        before[m][0] = dx_matrix.load(row + 16 * m, col);
        before[m][1] = dx_matrix.load(row + 16 * m + 8, col);
    }

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
            unsigned* const pairs = reinterpret_cast<unsigned*>(a_tile + rank * A_STRIDE + tile_col / 32 * 32) + tile_col % 32 / 8;
            pairs[0] = eight.x;
            pairs[4] = eight.y;
            pairs[8] = eight.z;
            pairs[12] = eight.w;
        }
        copy_async_wait<0>();
        __syncthreads();
#pragma unroll 1
        for (unsigned k = 0; k < ranks; k += 16) {
            unsigned b[2][4];
#pragma unroll
            for (unsigned j = 0; j < 2; j++) {
                const unsigned place = warp_col + 16 * j + matrix / 2 * 8;
                load_matrix_x4_transposed(b[j], a_tile + (k + matrix % 2 * 8 + matrix_row) * A_STRIDE + place);
            }
#pragma unroll
            for (unsigned m = 0; m < ROW_TILES; m++) {
                unsigned du_rows[4];
                const unsigned tile_row = warp_row + 16 * m + matrix % 2 * 8 + matrix_row;
                load_matrix_x4(du_rows, du_tile + tile_row * DU_STRIDE + k + matrix / 2 * 8);
#pragma unroll
                for (unsigned j = 0; j < 4; j++) {
                    mma_m16n8k16(sums[m][j], du_rows, {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]});
                }
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
            const uint4 mask = dropout.mask(first);
            const unsigned kept[4] = {mask.x, mask.y, mask.z, mask.w};
            float values[8];
            Bf16Vector<8>{before[m][half]}.widen(values);
#pragma unroll
            for (unsigned j = 0; j < 4; j++) {
                values[2 * j] += kept[j] & 0x0000ffffu ? keep_scale * sums[m][j][2 * half] : 0.0f;
                values[2 * j + 1] += kept[j] & 0xffff0000u ? keep_scale * sums[m][j][2 * half + 1] : 0.0f;
            }
            if (dx_matrix.vectorized) {
                Bf16Vector<8>::round(values).store(dx + first);
            } else {
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
