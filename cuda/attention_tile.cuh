// What the kernels of attention share: tiles of rows in shared memory, products of them by warps, the mask and the cap.
//
// A tile holds rows of one head, E columns of bf16 each, in 16-byte chunks. Chunk c of a row lies at place c ^ swizzle(row),
// so that the eight rows of a matrix load are in eight different groups of banks without padding.
//
// A warp works on 16 M rows. Its lane holds of a product the elements that tensor_core.cuh lists for D, as
// d[m][n][i]: row 16 m + lane / 4 + i / 2 * 8, column 8 n + lane % 4 * 2 + i % 2.
#pragma once

#include "tensor_core.cuh"

// The rows of q and of k that meet, all of one segment: in a tile of queries `queries` rows from `query_row` and all keys, the
// first query at `position` among them; in a tile of keys `keys` rows from `key_row`, the first key at `position`, and all
// queries.
struct AttentionTile {
    unsigned query_row, queries, key_row, keys, position;
};

namespace {

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

constexpr int CHUNK = 8;

// What every kernel is told about the heads.
struct Heads {
    unsigned num_heads, num_kv_heads, head_dim;
    float scale;
    unsigned window;
    float soft_cap;

    __device__ __forceinline__ unsigned group() const { return num_heads / num_kv_heads; }

    // How many positions a query sees, its own included.
    __device__ __forceinline__ int reach() const {
        constexpr unsigned UNLIMITED = 1u << 30;
        return static_cast<int>(window == 0 ? UNLIMITED : min(window, UNLIMITED));
    }

    // What turns scores (capped ones, if there is a cap) into exponents of 2.
    __device__ __forceinline__ float exponent_scale() const { return soft_cap > 0.0f ? LOG2_E : scale * LOG2_E; }
};

// 2^x, within 2 units in the last place; denormal results are 0.
__device__ __forceinline__ float exp2_approximate(float x) {
#ifdef __CUDACC__
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#else
    return exp2f(x);
#endif
}

// A number that is the same in all lanes. By the shuffle the compiler sees that it is: branches on it do not part the lanes,
// and it takes a register of the warp instead of one of each lane.
__device__ __forceinline__ unsigned uniform(unsigned value) { return __shfl_sync(ALL_LANES, value, 0); }

__device__ __forceinline__ int warp_index() { return static_cast<int>(uniform(threadIdx.x / WARP_LANES)); }

__device__ __forceinline__ AttentionTile tile_of_block(const AttentionTile* tiles) {
    const AttentionTile& tile = tiles[blockIdx.x];
    return {uniform(tile.query_row), uniform(tile.queries), uniform(tile.key_row), uniform(tile.keys),
            uniform(tile.position)};
}

// Consecutive rows of one head in a tensor [rows, heads * head_dim].
template <typename T>
struct HeadRows {
    T* first;
    unsigned stride;

    __device__ __forceinline__ HeadRows(T* tensor, uint64_t row, unsigned head, unsigned heads, unsigned head_dim)
        : first(tensor + (row * heads + head) * head_dim), stride(heads * head_dim) {}

    __device__ __forceinline__ T* row(int index) const { return first + static_cast<int64_t>(index) * stride; }
};

// Whether rows of a head consist of whole aligned chunks in each of the tensors.
template <typename... T>
__device__ __forceinline__ bool in_chunks(unsigned head_dim, const T*... tensors) {
    const uintptr_t addresses = (reinterpret_cast<uintptr_t>(tensors) | ...);
    return head_dim % CHUNK == 0 && addresses % 16 == 0;
}

template <int E>
struct TileLayout {
    static_assert(E % 16 == 0, "matrix products take 16 columns at a time");
    static constexpr int CHUNKS = E / CHUNK;
    // Chunks that trade places: the largest power of two in a row, up to the eight that fill all banks.
    static constexpr int PERIOD = CHUNKS % 8 == 0 ? 8 : CHUNKS % 4 == 0 ? 4 : 2;

    static __device__ __forceinline__ int swizzle(int row) { return row / (8 / PERIOD) % PERIOD; }

    // Where a chunk of a row begins, in elements.
    static __device__ __forceinline__ int offset(int row, int chunk) { return row * E + (chunk ^ swizzle(row)) * CHUNK; }
};

// Loads rows that are not whole aligned chunks, element by element.
template <int E, int ROWS, int THREADS>
__device__ __forceinline__ void load_elements(bf16* tile, const HeadRows<const bf16>& from, int start, int end,
                                              int head_dim) {
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < ROWS * E; i += THREADS) {
        const int row = i / E, column = i % E;
        bf16* const to = tile + TileLayout<E>::offset(row, column / CHUNK) + column % CHUNK;
        *to = start + row < end && column < head_dim ? from.row(start + row)[column] : bf16{0};
    }
}

// Starts to load ROWS rows from row `start` on into a tile; zeros where there is no row (from row `end` on) or no column. The
// rows are there after copy_async_wait and a barrier.
template <int E, int ROWS, int THREADS>
__device__ __forceinline__ void load_tile(bf16* tile, const HeadRows<const bf16>& from, int start, int end,
                                          unsigned head_dim, bool whole_chunks) {
    using Layout = TileLayout<E>;
    if (!whole_chunks) {
        load_elements<E, ROWS, THREADS>(tile, from, start, end, static_cast<int>(head_dim));
        return;
    }
    // A thread takes every ROW_STEP-th row and every PERIOD-th chunk, whose swizzle is the same.
    constexpr int ROW_STEP = THREADS / Layout::PERIOD;
    static_assert(ROW_STEP % 8 == 0, "the swizzle repeats after 8 rows");
    const int first_row = static_cast<int>(threadIdx.x) / Layout::PERIOD;
    const int first_chunk = static_cast<int>(threadIdx.x) % Layout::PERIOD;
    bf16* const to = tile + Layout::offset(first_row, first_chunk);
    const bf16* source = from.row(start) + (first_row * from.stride + first_chunk * CHUNK);
    const int columns = static_cast<int>(head_dim) - first_chunk * CHUNK;
#pragma unroll
    for (int first = 0; first < ROWS; first += ROW_STEP) {
        const int row = first_row + first;
        if (ROWS % ROW_STEP != 0 && row >= ROWS) {
            break;
        }
        const bool is_row = start + row < end;
#pragma unroll
        for (int column = 0; column < E; column += Layout::PERIOD * CHUNK) {
            copy_async_16(to + first * E + column, source + column, is_row && column < columns);
        }
        source += static_cast<uint64_t>(ROW_STEP) * from.stride;
    }
}

// Where a lane finds its row of a 16 x 16 block of any tile for a matrix load: of the left factor, of the right one as it is
// (see add_product) and of the right one transposed (see add_product_of_rows).
template <int E>
struct LaneOffsets {
    using Layout = TileLayout<E>;
    static constexpr int COUNT = Layout::PERIOD / 2;
    int of_block[COUNT];

    __device__ __forceinline__ LaneOffsets() {
        const int lane = static_cast<int>(threadIdx.x % WARP_LANES);
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            of_block[i] = Layout::offset(lane % 16, 2 * i + lane / 16);
        }
    }

    // In elements, for the block at row 16 row_block and column 16 column_block; both are known at compile time.
    __device__ __forceinline__ int at(int row_block, int column_block) const {
        return of_block[column_block % COUNT] + row_block * 16 * E + column_block / COUNT * (COUNT * 16);
    }
};

// The left factor of a product: 16 M rows of a tile. The first HELD blocks of 16 columns stay in registers once `hold` has
// been called, the others are loaded when they are needed.
template <int E, int M, int HELD>
struct LeftRows {
    const bf16* tile;
    unsigned held[M][HELD == 0 ? 1 : HELD][4];

    __device__ __forceinline__ explicit LeftRows(const bf16* rows) : tile(rows) {}

    __device__ __forceinline__ void hold(const LaneOffsets<E>& offsets) {
#pragma unroll
        for (int step = 0; step < HELD; step++) {
#pragma unroll
            for (int m = 0; m < M; m++) {
                load_matrix_x4(held[m][step], tile + offsets.at(m, step));
            }
        }
    }

    __device__ __forceinline__ void load(unsigned (&a)[M][4], int step, const LaneOffsets<E>& offsets) const {
#pragma unroll
        for (int m = 0; m < M; m++) {
            if (step < HELD) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    a[m][i] = held[m][step][i];
                }
            } else {
                load_matrix_x4(a[m], tile + offsets.at(m, step));
            }
        }
    }
};

// The warp's d = A B^T, with B = the first 8 N rows of a tile.
template <int E, int M, int N, int HELD>
__device__ __forceinline__ void multiply_rows(float (&d)[M][N][4], const LeftRows<E, M, HELD>& left, const bf16* right,
                                              const LaneOffsets<E>& offsets) {
    static_assert(N % 2 == 0, "a matrix load brings 16 rows");
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int n = 0; n < N; n++) {
            d[m][n][0] = d[m][n][1] = d[m][n][2] = d[m][n][3] = 0.0f;
        }
    }
#pragma unroll
    for (int step = 0; step < E / 16; step++) {
        unsigned a[M][4];
        left.load(a, step, offsets);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            unsigned b[4];
            load_matrix_x4(b, right + offsets.at(n / 2, step));
            const unsigned low[2] = {b[0], b[2]}, high[2] = {b[1], b[3]};
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_m16n8k16(d[m][n], a[m], low);
                mma_m16n8k16(d[m][n + 1], a[m], high);
            }
        }
    }
}

// A product in bf16, as the left factor of the next one.
template <int M, int STEPS>
struct Fragments {
    unsigned of[M][STEPS][4];

    __device__ __forceinline__ void round(const float (&d)[M][2 * STEPS][4]) {
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
            for (int step = 0; step < STEPS; step++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float* const from = d[m][2 * step + i / 2] + i % 2 * 2;
                    of[m][step][i] = pack_bf16(from[0], from[1]);
                }
            }
        }
    }
};

// The warp's d += A B, with B = the first 16 STEPS rows of a tile.
template <int E, int M, int STEPS>
__device__ __forceinline__ void add_product(float (&d)[M][E / 8][4], const Fragments<M, STEPS>& left, const bf16* right,
                                            const LaneOffsets<E>& offsets) {
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
#pragma unroll
        for (int n = 0; n < E / 8; n += 2) {
            unsigned b[4];
            load_matrix_x4_transposed(b, right + offsets.at(step, n / 2));
            const unsigned low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_m16n8k16(d[m][n], left.of[m][step], low);
                mma_m16n8k16(d[m][n + 1], left.of[m][step], high);
            }
        }
    }
}

// Calls visit(m, n, i) for each element d[m][n][i] of a product; all three are known at compile time.
template <int M, int N, typename Visit>
__device__ __forceinline__ void for_each(const Visit& visit) {
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int n = 0; n < N; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                visit(m, n, i);
            }
        }
    }
}

__device__ __forceinline__ int lane_row() { return static_cast<int>(threadIdx.x % WARP_LANES) / 4; }

__device__ __forceinline__ int lane_column() { return static_cast<int>(threadIdx.x % WARP_LANES) % 4 * 2; }

// scores = cap tanh(scale scores / cap)
template <int M, int N>
__device__ __forceinline__ void cap_scores(float (&scores)[M][N][4], const Heads& heads) {
    const float factor = __fdividef(2.0f * LOG2_E * heads.scale, heads.soft_cap);
    for_each<M, N>([&](int m, int n, int i) {
        const float e = exp2_approximate(fminf(scores[m][n][i] * factor, 64.0f));
        scores[m][n][i] = heads.soft_cap * (1.0f - __fdividef(2.0f, 1.0f + e));
    });
}

// The derivative of the cap where it gave `capped`; 0 where that is the -infinity of the mask.
__device__ __forceinline__ float cap_derivative(float capped, const Heads& heads) {
    const float tanh = fmaxf(__fdividef(capped, heads.soft_cap), -1.0f);
    return 1.0f - tanh * tanh;
}

// Which queries see which keys: the query at position p sees the keys at p - reach + 1 to p.
struct Band {
    int reach;

    // Whether any of the queries first_query..=last_query sees any of the `keys` keys from first_key on.
    __device__ __forceinline__ bool meets(int first_query, int last_query, int first_key, int keys) const {
        return first_key <= last_query && first_key + keys - 1 > first_query - reach;
    }

    // Whether each of those queries sees each of those keys.
    __device__ __forceinline__ bool covers(int first_query, int last_query, int first_key, int keys) const {
        return first_key + keys - 1 <= first_query && first_key > last_query - reach;
    }

    // Sets scores that are not seen to -infinity; the warp's rows are queries from `query` on, its columns keys from `key` on.
    template <int M, int N>
    __device__ __forceinline__ void mask_keys(float (&scores)[M][N][4], int query, int key) const {
        const int distance = query + lane_row() - key - lane_column();
        for_each<M, N>([&](int m, int n, int i) {
            hide_unless_seen(scores[m][n][i], distance + (16 * m + i / 2 * 8 - 8 * n - i % 2));
        });
    }

    // The same with rows that are keys and columns that are queries.
    template <int M, int N>
    __device__ __forceinline__ void mask_queries(float (&scores)[M][N][4], int key, int query) const {
        const int distance = query + lane_column() - key - lane_row();
        for_each<M, N>([&](int m, int n, int i) {
            hide_unless_seen(scores[m][n][i], distance + (8 * n + i % 2 - 16 * m - i / 2 * 8));
        });
    }

 private:
    // A query sees the keys that are 0 to reach - 1 positions before it.
    __device__ __forceinline__ void hide_unless_seen(float& score, int positions_before) const {
        score = static_cast<unsigned>(positions_before) < static_cast<unsigned>(reach) ? score : -INFINITY;
    }
};

// Stores the warp's rows of `d`, times factor(m, row_half), as rows start.. of `to` that are before `end`. They go through the
// warp's own 16 M rows of a tile that nobody reads any more, so that a lane stores 16 bytes at a time.
template <int E, int M, typename Factor>
__device__ __forceinline__ void store_rows(const float (&d)[M][E / 8][4], const Factor& factor, bf16* staging,
                                           const HeadRows<bf16>& to, int start, int end, unsigned head_dim,
                                           bool whole_chunks) {
    using Layout = TileLayout<E>;
    __syncwarp();  // all lanes have read the tile
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float scale = factor(m, half);
#pragma unroll
            for (int n = 0; n < E / 8; n++) {
                const float* const from = d[m][n] + 2 * half;
                bf16* const pair = staging + Layout::offset(16 * m + 8 * half + lane_row(), n) + lane_column();
                *reinterpret_cast<unsigned*>(pair) = pack_bf16(from[0] * scale, from[1] * scale);
            }
        }
    }
    __syncwarp();
    for (int i = static_cast<int>(threadIdx.x % WARP_LANES); i < 16 * M * Layout::CHUNKS; i += WARP_LANES) {
        const int row = i / Layout::CHUNKS, chunk = i % Layout::CHUNKS;
        const int columns = static_cast<int>(head_dim) - chunk * CHUNK;
        if (start + row >= end || columns <= 0) {
            continue;
        }
        const bf16* const from = staging + Layout::offset(row, chunk);
        bf16* const destination = to.row(start + row) + chunk * CHUNK;
        if (whole_chunks) {
            *reinterpret_cast<uint4*>(destination) = *reinterpret_cast<const uint4*>(from);
        } else {
            for (int j = 0; j < min(columns, CHUNK); j++) {
                destination[j] = from[j];
            }
        }
    }
}

}  // namespace
