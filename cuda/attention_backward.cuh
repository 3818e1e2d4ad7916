// The backward pass of attention without atomics: a kernel for dQ and one for dK and dV, each of which computes the scores
// again (arXiv:2307.08691, algorithm 2, split so that every gradient is summed by one block in a fixed order).
#pragma once

#include "attention_tile.cuh"

namespace {

// What forward was given and gave, and the gradient of its result.
struct BackwardInputs {
    const bf16 *q, *k, *v, *d_out;
    const float *lse, *delta;
};

// lse and delta of one head. A row from `end` on gets those that make all its weights and gradients 0.
struct RowNumbers {
    const float *lse, *delta;
    uint64_t stride;

    __device__ __forceinline__ RowNumbers(const BackwardInputs& in, uint64_t row, unsigned head, unsigned heads)
        : lse(in.lse + row * heads + head), delta(in.delta + row * heads + head), stride(heads) {}

    // The log-sum-exp in powers of 2.
    __device__ __forceinline__ float log2_total(int row, int end) const {
        return row < end ? lse[row * static_cast<int64_t>(stride)] * LOG2_E : INFINITY;
    }

    __device__ __forceinline__ float row_delta(int row, int end) const {
        return row < end ? delta[row * static_cast<int64_t>(stride)] : 0.0f;
    }

    // What the thread brings of the ROWS rows from `first` on: the first ROWS threads the totals, the others deltas.
    template <int ROWS>
    __device__ __forceinline__ float of_thread(int first, int end) const {
        const int row = first + static_cast<int>(threadIdx.x) % ROWS;
        return threadIdx.x < ROWS ? log2_total(row, end) : row_delta(row, end);
    }
};

// dQ: a block takes QUERIES rows of one head and walks through the keys, a warp takes QUERIES / WARPS of them. The next keys
// and values arrive while these are used. Of the rows of Q and dO, HELD blocks of 16 columns stay in registers.
template <int E, int QUERIES, int KEYS, int HELD>
struct BackwardQ {
    static constexpr int WARPS = 4, THREADS = WARPS * WARP_LANES;
    static constexpr int WARP_ROWS = QUERIES / WARPS, M = WARP_ROWS / 16, N = KEYS / 8;
    static constexpr int STAGE = 2 * KEYS * E;
    static constexpr int SHARED_BYTES = (2 * QUERIES * E + 2 * STAGE) * static_cast<int>(sizeof(bf16));

    static __device__ __forceinline__ void run(const BackwardInputs& in, const AttentionTile& tile, const Heads& heads,
                                               bf16* dq) {
        SHARED_DYNAMIC(bf16, shared);
        bf16* const query_tile = shared;
        bf16* const d_out_tile = query_tile + QUERIES * E;
        bf16* const stages = d_out_tile + QUERIES * E;

        const unsigned head = blockIdx.y, kv_head = head / heads.group();
        const bool whole_chunks = in_chunks(heads.head_dim, in.q, in.k, in.v, in.d_out, dq);
        const HeadRows<const bf16> keys(in.k, tile.key_row, kv_head, heads.num_kv_heads, heads.head_dim);
        const HeadRows<const bf16> values(in.v, tile.key_row, kv_head, heads.num_kv_heads, heads.head_dim);

        const Band band{heads.reach()};
        const int position = static_cast<int>(tile.position), queries = static_cast<int>(tile.queries);
        const int end_key = position + queries;
        int key = max(position - band.reach + 1, 0);
        const auto load_stage = [&](int stage, int start) {
            bf16* const to = stages + stage * STAGE;
            load_tile<E, KEYS, THREADS>(to, keys, start, end_key, heads.head_dim, whole_chunks);
            load_tile<E, KEYS, THREADS>(to + KEYS * E, values, start, end_key, heads.head_dim, whole_chunks);
            copy_async_commit();
        };
        {
            const HeadRows<const bf16> rows(in.q, tile.query_row, head, heads.num_heads, heads.head_dim);
            const HeadRows<const bf16> d_rows(in.d_out, tile.query_row, head, heads.num_heads, heads.head_dim);
            load_tile<E, QUERIES, THREADS>(query_tile, rows, 0, queries, heads.head_dim, whole_chunks);
            load_tile<E, QUERIES, THREADS>(d_out_tile, d_rows, 0, queries, heads.head_dim, whole_chunks);
        }
        load_stage(0, key);

        const int warp_row = warp_index() * WARP_ROWS;
        const int first_query = position + warp_row, last_query = first_query + WARP_ROWS - 1;
        const RowNumbers numbers(in, tile.query_row, head, heads.num_heads);
        float log2_total[M][2], delta[M][2];
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int row = warp_row + 16 * m + 8 * half + lane_row();
                log2_total[m][half] = numbers.log2_total(row, queries);
                delta[m][half] = numbers.row_delta(row, queries);
            }
        }

        const LaneOffsets<E> offsets;
        LeftRows<E, M, HELD> query_rows(query_tile + warp_row * E), d_out_rows(d_out_tile + warp_row * E);
        if (HELD > 0) {
            copy_async_wait<0>();
            __syncthreads();
            query_rows.hold(offsets);
            d_out_rows.hold(offsets);
        }
        float sum[M][E / 8][4] = {};
        for (int stage = 0; key < end_key; key += KEYS, stage ^= 1) {
            copy_async_wait<0>();
            __syncthreads();  // this stage is there, and no warp reads the other one any more
            if (key + KEYS < end_key) {
                load_stage(stage ^ 1, key + KEYS);
            }
            if (warp_row >= queries || !band.meets(first_query, last_query, key, KEYS)) {
                continue;
            }
            const bf16* const key_tile = stages + stage * STAGE;
            float weights[M][N][4], d_scores[M][N][4];
            multiply_rows(weights, query_rows, key_tile, offsets);
            multiply_rows(d_scores, d_out_rows, key_tile + KEYS * E, offsets);
            for_each<M, N>([&](int m, int n, int i) { d_scores[m][n][i] -= delta[m][i / 2]; });
            if (heads.soft_cap > 0.0f) {
                cap_scores(weights, heads);
                for_each<M, N>([&](int m, int n, int i) { d_scores[m][n][i] *= cap_derivative(weights[m][n][i], heads); });
            }
            if (!band.covers(first_query, last_query, key, KEYS)) {
                band.mask_keys(weights, first_query, key);
            }
            const float exponent_scale = heads.exponent_scale();
            for_each<M, N>([&](int m, int n, int i) {
                d_scores[m][n][i] *= exp2_approximate(weights[m][n][i] * exponent_scale - log2_total[m][i / 2]);
            });
            Fragments<M, KEYS / 16> rounded;
            rounded.round(d_scores);
            add_product(sum, rounded, key_tile, offsets);
        }
        const HeadRows<bf16> to(dq, tile.query_row, head, heads.num_heads, heads.head_dim);
        const auto scale = [&](int, int) { return heads.scale; };
        store_rows<E, M>(sum, scale, query_tile + warp_row * E, to, warp_row, queries, heads.head_dim, whole_chunks);
    }
};

// The queries that a tile of keys meets, QUERIES at a time: for each head of the group, from the first to the last that sees
// any of the keys.
template <int QUERIES>
struct QueryWalk {
    unsigned head;
    int query;
    const unsigned end_head;
    const int first_query, end_query;

    __device__ __forceinline__ QueryWalk(unsigned head, unsigned heads, int first_query, int end_query)
        : head(head), query(first_query), end_head(head + heads), first_query(first_query), end_query(end_query) {
        if (first_query >= end_query) {
            this->head = end_head;
        }
    }

    __device__ __forceinline__ bool is_done() const { return head == end_head; }

    __device__ __forceinline__ void advance() {
        query += QUERIES;
        if (query >= end_query) {
            query = first_query;
            head++;
        }
    }
};

// dK and dV: a block takes KEYS rows of a key/value head and walks through the queries of its group of heads. Two warps share
// WARP_ROWS keys and do the same two products each, with a query to a column:
//
//     the warp of dV:  S = K Q^T,    P = exp(S - lse),      dV += P dO
//     the warp of dK:  D = V dO^T,   dS = P (D - delta),    dK += dS Q
//
// P comes to the second warp as the bf16 fragments that the first one multiplies with; a fragment of a product is one of the
// next one's left factor, so nothing else passes through shared memory. The next queries arrive while these are used.
template <int E, int KEYS, int QUERIES, int HELD>
struct BackwardKv {
    static constexpr int WARPS = 4, THREADS = WARPS * WARP_LANES;
    static constexpr int WARP_ROWS = KEYS / (WARPS / 2), M = WARP_ROWS / 16, N = QUERIES / 8, STEPS = QUERIES / 16;
    static constexpr int STAGE = 2 * QUERIES * E;
    static constexpr int SHARED_ELEMENTS = 2 * KEYS * E + 2 * STAGE + KEYS * QUERIES;
    static constexpr int SHARED_BYTES =
        SHARED_ELEMENTS * static_cast<int>(sizeof(bf16)) + 4 * QUERIES * static_cast<int>(sizeof(float));
    static_assert(2 * QUERIES <= THREADS, "a thread brings one number of a row");

    using Shares = Fragments<M, STEPS>;

    // Lanes exchange 16 bytes each, next to each other.
    static __device__ __forceinline__ uint4* exchange_place(bf16* exchange, int pair, int m, int step) {
        const int block = (pair * M + m) * STEPS + step;
        return reinterpret_cast<uint4*>(exchange) + block * WARP_LANES + threadIdx.x % WARP_LANES;
    }

    static __device__ __forceinline__ void give(const Shares& shares, bf16* exchange, int pair) {
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
            for (int step = 0; step < STEPS; step++) {
                const unsigned(&of)[4] = shares.of[m][step];
                *exchange_place(exchange, pair, m, step) = make_uint4(of[0], of[1], of[2], of[3]);
            }
        }
    }

    static __device__ __forceinline__ void take(float (&d_scores)[M][N][4], bf16* exchange, int pair) {
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
            for (int step = 0; step < STEPS; step++) {
                const uint4 given = *exchange_place(exchange, pair, m, step);
                const unsigned of[4] = {given.x, given.y, given.z, given.w};
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float* const pair_of = d_scores[m][2 * step + i / 2] + i % 2 * 2;
                    pair_of[0] *= low_bf16(of[i]);
                    pair_of[1] *= high_bf16(of[i]);
                }
            }
        }
    }

    static __device__ __forceinline__ void run(const BackwardInputs& in, const AttentionTile& tile, const Heads& heads,
                                               bf16* dk, bf16* dv) {
        SHARED_DYNAMIC(bf16, shared);
        bf16* const key_tile = shared;
        bf16* const value_tile = key_tile + KEYS * E;
        bf16* const stages = value_tile + KEYS * E;
        bf16* const exchange = stages + 2 * STAGE;
        float* const row_numbers = reinterpret_cast<float*>(exchange + KEYS * QUERIES);

        const unsigned kv_head = blockIdx.y;
        const bool whole_chunks = in_chunks(heads.head_dim, in.q, in.k, in.v, in.d_out, dk) && in_chunks(heads.head_dim, dv);
        const int position = static_cast<int>(tile.position), key_count = static_cast<int>(tile.keys);
        const int queries = static_cast<int>(tile.queries);
        const Band band{heads.reach()};
        const int end_query = min(queries, position + key_count - 1 + band.reach);
        QueryWalk<QUERIES> next(kv_head * heads.group(), heads.group(), position, end_query);
        QueryWalk<QUERIES> walk = next;

        // A thread brings the log-sum-exp or delta of one row: it asks for it early and puts it down late.
        float number = 0.0f;
        const auto load_stage = [&](int stage) {
            const HeadRows<const bf16> rows(in.q, tile.query_row, next.head, heads.num_heads, heads.head_dim);
            const HeadRows<const bf16> d_rows(in.d_out, tile.query_row, next.head, heads.num_heads, heads.head_dim);
            bf16* const to = stages + stage * STAGE;
            load_tile<E, QUERIES, THREADS>(to, rows, next.query, end_query, heads.head_dim, whole_chunks);
            load_tile<E, QUERIES, THREADS>(to + QUERIES * E, d_rows, next.query, end_query, heads.head_dim, whole_chunks);
            const RowNumbers numbers(in, tile.query_row, next.head, heads.num_heads);
            number = numbers.of_thread<QUERIES>(next.query, end_query);
            next.advance();
        };
        const auto put_number = [&](int stage) {
            if (threadIdx.x < 2 * QUERIES) {
                row_numbers[stage * 2 * QUERIES + threadIdx.x] = number;
            }
        };
        {
            const HeadRows<const bf16> keys(in.k, tile.key_row, kv_head, heads.num_kv_heads, heads.head_dim);
            const HeadRows<const bf16> values(in.v, tile.key_row, kv_head, heads.num_kv_heads, heads.head_dim);
            load_tile<E, KEYS, THREADS>(key_tile, keys, 0, key_count, heads.head_dim, whole_chunks);
            load_tile<E, KEYS, THREADS>(value_tile, values, 0, key_count, heads.head_dim, whole_chunks);
        }
        if (!next.is_done()) {
            load_stage(0);
            put_number(0);
        }
        copy_async_commit();
        copy_async_wait<0>();
        __syncthreads();

        const int warp = warp_index(), pair = warp / 2;
        const bool is_dv = warp % 2 == 0;
        const int warp_row = pair * WARP_ROWS;
        const int first_key = position + warp_row;
        const LaneOffsets<E> offsets;
        LeftRows<E, M, HELD> rows((is_dv ? key_tile : value_tile) + warp_row * E);
        rows.hold(offsets);
        float sum[M][E / 8][4] = {};
        for (int stage = 0; !walk.is_done(); walk.advance(), stage ^= 1) {
            copy_async_wait<0>();
            __syncthreads();  // this stage is there, and no warp reads the other one any more
            if (!next.is_done()) {
                load_stage(stage ^ 1);
            }
            copy_async_commit();

            const int last_query = walk.query + QUERIES - 1;
            const bool meets = warp_row < key_count && band.meets(walk.query, last_query, first_key, WARP_ROWS);
            const bf16* const query_tile = stages + stage * STAGE;
            const bf16* const d_out_tile = query_tile + QUERIES * E;
            const float* const numbers = row_numbers + (2 * stage + (is_dv ? 0 : 1)) * QUERIES + lane_column();
            float product[M][N][4];
            Fragments<M, STEPS> left;
            if (meets) {
                multiply_rows(product, rows, is_dv ? query_tile : d_out_tile, offsets);
                if (is_dv) {
                    if (heads.soft_cap > 0.0f) {
                        cap_scores(product, heads);
                    }
                    if (!band.covers(walk.query, last_query, first_key, WARP_ROWS)) {
                        band.mask_queries(product, first_key, walk.query);
                    }
                    weigh(product, numbers, heads, left, exchange, pair);
                } else {
                    for_each<M, N>([&](int m, int n, int i) { product[m][n][i] -= numbers[8 * n + i % 2]; });
                }
            }
            put_number(stage ^ 1);
            __syncthreads();  // the weights are there
            if (meets) {
                if (!is_dv) {
                    take(product, exchange, pair);
                    left.round(product);
                }
                add_product(sum, left, is_dv ? d_out_tile : query_tile, offsets);
            }
        }
        const HeadRows<bf16> to(is_dv ? dv : dk, tile.key_row, kv_head, heads.num_kv_heads, heads.head_dim);
        const float scale = is_dv ? 1.0f : heads.scale;
        bf16* const staging = (is_dv ? key_tile : value_tile) + warp_row * E;
        store_rows<E, M>(sum, [&](int, int) { return scale; }, staging, to, warp_row, key_count, heads.head_dim, whole_chunks);
    }

    // Turns scores into weights and shares them, under a cap times its derivative.
    static __device__ __forceinline__ void weigh(float (&scores)[M][N][4], const float* log2_totals, const Heads& heads,
                                                 Fragments<M, STEPS>& weights, bf16* exchange, int pair) {
        const float exponent_scale = heads.exponent_scale();
        const auto weight = [&](int m, int n, int i) {
            return exp2_approximate(scores[m][n][i] * exponent_scale - log2_totals[8 * n + i % 2]);
        };
        if (heads.soft_cap > 0.0f) {
            float shared_weights[M][N][4];
            for_each<M, N>([&](int m, int n, int i) {
                shared_weights[m][n][i] = weight(m, n, i) * cap_derivative(scores[m][n][i], heads);
            });
            weights.round(shared_weights);
            give(weights, exchange, pair);
        }
        for_each<M, N>([&](int m, int n, int i) { scores[m][n][i] = weight(m, n, i); });
        weights.round(scores);
        if (!(heads.soft_cap > 0.0f)) {
            give(weights, exchange, pair);
        }
    }
};

// delta = rowsum(dO O): a warp takes one row of one head.
__device__ __forceinline__ void backward_delta(const bf16* d_out, const bf16* out, uint64_t rows_of_heads, unsigned head_dim,
                                               float* delta) {
    const uint64_t row = static_cast<uint64_t>(blockIdx.x) * (blockDim.x / WARP_LANES) + threadIdx.x / WARP_LANES;
    if (row >= rows_of_heads) {
        return;
    }
    const unsigned lane = threadIdx.x % WARP_LANES;
    const bf16* const d_row = d_out + row * head_dim;
    const bf16* const o_row = out + row * head_dim;
    const uintptr_t addresses = reinterpret_cast<uintptr_t>(d_out) | reinterpret_cast<uintptr_t>(out);
    float sum = 0.0f;
    if (head_dim % 4 == 0 && addresses % sizeof(uint2) == 0) {
        for (unsigned column = 4 * lane; column < head_dim; column += 4 * WARP_LANES) {
            const uint2 d = *reinterpret_cast<const uint2*>(d_row + column);
            const uint2 o = *reinterpret_cast<const uint2*>(o_row + column);
            sum += low_bf16(d.x) * low_bf16(o.x) + high_bf16(d.x) * high_bf16(o.x);
            sum += low_bf16(d.y) * low_bf16(o.y) + high_bf16(d.y) * high_bf16(o.y);
        }
    } else {
        for (unsigned column = lane; column < head_dim; column += WARP_LANES) {
            sum += to_float(d_row[column]) * to_float(o_row[column]);
        }
    }
    sum = warp_sum(sum);
    if (lane == 0) {
        delta[row] = sum;
    }
}

}  // namespace
