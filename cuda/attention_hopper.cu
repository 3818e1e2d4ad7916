// The attention of attention.cu for heads of 128 columns with the products of warpgroups, which sm_90 has alone: nothing else runs
// its tensor cores at more than two thirds of their rate. Formulas and tiles are those of that file, and so are parameters, but for
// the cap on scores, which there is none of here. Source: arXiv:2407.08608, without its pairs of warpgroups that take turns.
//
//              threads | rows of a tile | of the other side | shared bytes
//     forward      256 |    128 queries |          128 keys |       164864
//     backward_q   256 |    128 queries |           64 keys |       148480
//     backward_kv  256 |       128 keys |        64 queries |       166400
//
// A warpgroup takes 64 rows of the tile; while one computes weights, the products of the other run. A block is alone on its
// multiprocessor. Tiles in shared memory are two panels of 64 columns (warpgroup.cuh).

#include "attention_backward.cuh"
#include "attention_forward.cuh"
#include "warpgroup.cuh"

namespace {

constexpr int E = 128;
constexpr int THREADS = 256, WARPGROUP_ROWS = 64;
constexpr int ROWS = THREADS / 128 * WARPGROUP_ROWS;
constexpr int PANEL_ALIGNMENT = 1024;

// A tile of N rows.
template <int N>
struct Panels {
    static constexpr int ELEMENTS = N * E, BYTES = N * PANEL_ROW_BYTES;

    bf16* first;

    // Starts to load the rows from `start` on, zeros from row `end` on.
    __device__ __forceinline__ void load(const HeadRows<const bf16>& from, int start, int end) const {
        constexpr int CHUNKS = E / CHUNK, ROW_STEP = THREADS / CHUNKS;
        static_assert(ROW_STEP % 8 == 0 && N % ROW_STEP == 0, "a thread's chunks are at one place of their rows");
        const int chunk = static_cast<int>(threadIdx.x) % CHUNKS, row = static_cast<int>(threadIdx.x) / CHUNKS;
        const int place = (chunk % 8 ^ row % 8) * CHUNK;
        bf16* const to = first + chunk / 8 * (N * PANEL_COLUMNS) + row * PANEL_COLUMNS + place;
        const bf16* source = from.row(start + row) + chunk * CHUNK;
#pragma unroll
        for (int i = 0; i < N / ROW_STEP; i++) {
            copy_async_16(to + i * (ROW_STEP * PANEL_COLUMNS), source, start + row + i * ROW_STEP < end);
            source += static_cast<uint64_t>(ROW_STEP) * from.stride;
        }
    }

    __device__ __forceinline__ SharedFactor factor() const { return shared_factor(first, BYTES); }
};

// Starts d = A B^T over all columns, for 64 rows A of a tile of LEFT and the rows B of one of RIGHT, which are 8 N.
template <int LEFT, int RIGHT, int N>
__device__ __forceinline__ void start_scores(float (&d)[1][N][4], SharedFactor a, SharedFactor b) {
    static_assert(8 * N <= RIGHT, "as many columns as there are rows");
    start_product(d[0], a, b);
#pragma unroll
    for (int step = 1; step < E / 16; step++) {
        const int panel = step / 4, within = step % 4 * 32;
        add_product(d[0], a.after(panel * Panels<LEFT>::BYTES + within), b.after(panel * Panels<RIGHT>::BYTES + within));
    }
}

// Starts d += A B, for A in registers and the first 16 STEPS rows of a tile.
template <int STEPS>
__device__ __forceinline__ void start_sum(float (&d)[1][E / 8][4], const Fragments<1, STEPS>& a, SharedFactor b) {
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        add_product_of_rows(d[0], a.of[0][step], b.after(step * 16 * PANEL_ROW_BYTES));
    }
}

// The start of the shared memory of the launch, as panels need it.
__device__ __forceinline__ bf16* aligned_shared() {
    SHARED_DYNAMIC(bf16, shared);
    const uintptr_t address = reinterpret_cast<uintptr_t>(shared);
    return shared + (PANEL_ALIGNMENT - address % PANEL_ALIGNMENT) % PANEL_ALIGNMENT / sizeof(bf16);
}

constexpr int shared_bytes(int rows_of_tiles, int floats) {
    return PANEL_ALIGNMENT + rows_of_tiles * E * static_cast<int>(sizeof(bf16)) + floats * static_cast<int>(sizeof(float));
}

__device__ __forceinline__ int warpgroup_row() { return warp_index() / 4 * WARPGROUP_ROWS; }

struct HopperForward {
    static constexpr int KEYS = 128;
    static constexpr int SHARED_BYTES = shared_bytes(ROWS + 4 * KEYS, 0);

    // While the weights of a tile and its values are multiplied, the scores of the next keys are computed and weighed.
    static __device__ __forceinline__ void run(const bf16* q, const bf16* k, const bf16* v, const AttentionTile& tile,
                                               const Heads& heads, bf16* out, float* lse) {
        bf16* const shared = aligned_shared();
        const Panels<ROWS> query_tile{shared};
        const auto key_tile = [&](int i) { return Panels<KEYS>{shared + ROWS * E + i % 2 * Panels<KEYS>::ELEMENTS}; };
        const auto value_tile = [&](int i) { return Panels<KEYS>{key_tile(i).first + 2 * Panels<KEYS>::ELEMENTS}; };

        const unsigned head = blockIdx.y, kv_head = head / heads.group();
        const HeadRows<const bf16> keys(k, tile.key_row, kv_head, heads.num_kv_heads, E);
        const HeadRows<const bf16> values(v, tile.key_row, kv_head, heads.num_kv_heads, E);
        const Band band{heads.reach()};
        const int position = static_cast<int>(tile.position), queries = static_cast<int>(tile.queries);
        const int end_key = position + queries;
        const int start_key = max(position - band.reach + 1, 0);
        query_tile.load(HeadRows<const bf16>(q, tile.query_row, head, heads.num_heads, E), 0, queries);
        key_tile(0).load(keys, start_key, end_key);
        copy_async_commit();
        value_tile(0).load(values, start_key, end_key);
        key_tile(1).load(keys, start_key + KEYS, end_key);
        copy_async_commit();

        const int warp_row = warp_index() * 16;
        const int first_query = position + warp_row, last_query = first_query + 15;
        const float exponent_scale = heads.exponent_scale();
        const SharedFactor query_rows = query_tile.factor().after(warpgroup_row() * PANEL_ROW_BYTES);
        OnlineSoftmax<1> softmax;
        float sum[1][E / 8][4] = {};
        float scores[1][KEYS / 8][4];
        Fragments<1, KEYS / 16> weights;
        float correction[1][2];
        const auto weigh = [&](int key) {
            if (!band.covers(first_query, last_query, key, KEYS)) {
                band.mask_keys(scores, first_query, key);
            }
            softmax.weigh(scores, correction, exponent_scale);
        };
        copy_async_wait<1>();
        show_to_products();
        __syncthreads();
        begin_products();
        start_scores<ROWS, KEYS>(scores, query_rows, key_tile(0).factor());
        commit_products();
        wait_for_products<0>();
        hold_in_place(scores[0]);
        weigh(start_key);
        weights.round(scores);
        int i = 0;
        for (int key = start_key + KEYS; key < end_key; key += KEYS, i++) {
            copy_async_wait<0>();
            show_to_products();
            __syncthreads();  // the values of this tile and the next keys are there, and nobody reads those before
            value_tile(i + 1).load(values, key, end_key);
            key_tile(i).load(keys, key + KEYS, end_key);
            copy_async_commit();
            hold_in_place(sum[0]);
            begin_products();
            start_scores<ROWS, KEYS>(scores, query_rows, key_tile(i + 1).factor());
            commit_products();
            start_sum(sum, weights, value_tile(i).factor());
            commit_products();
            wait_for_products<1>();
            hold_in_place(scores[0]);
            weigh(key);
            wait_for_products<0>();
            hold_in_place(sum[0]);
            softmax.rescale(sum, correction);
            weights.round(scores);
        }
        copy_async_wait<0>();
        show_to_products();
        __syncthreads();  // the values of the last tile are there
        hold_in_place(sum[0]);
        begin_products();
        start_sum(sum, weights, value_tile(i).factor());
        commit_products();
        wait_for_products<0>();
        hold_in_place(sum[0]);
        softmax.finish();
        // The last to read the queries was the product before the last barrier.
        const HeadRows<bf16> to(out, tile.query_row, head, heads.num_heads, E);
        const auto inverse_total = [&](int m, int half) { return 1.0f / softmax.total[m][half]; };
        store_rows<E, 1>(sum, inverse_total, shared + warp_row * E, to, warp_row, queries, E, true);
        store_lse(softmax, warp_row, queries, lse + static_cast<uint64_t>(tile.query_row) * heads.num_heads + head,
                  heads.num_heads);
    }
};

struct HopperBackwardQ {
    static constexpr int KEYS = 64, N = KEYS / 8;
    static constexpr int SHARED_BYTES = shared_bytes(2 * ROWS + 5 * KEYS, 0);

    // While the score gradients of a tile and its keys are multiplied, those of the next keys are computed.
    static __device__ __forceinline__ void run(const BackwardInputs& in, const AttentionTile& tile, const Heads& heads,
                                               bf16* dq) {
        bf16* const shared = aligned_shared();
        const Panels<ROWS> query_tile{shared}, d_out_tile{shared + ROWS * E};
        bf16* const others = shared + 2 * ROWS * E;
        const auto key_tile = [&](int i) { return Panels<KEYS>{others + i % 3 * Panels<KEYS>::ELEMENTS}; };
        const auto value_tile = [&](int i) { return Panels<KEYS>{others + (3 + i % 2) * Panels<KEYS>::ELEMENTS}; };

        const unsigned head = blockIdx.y, kv_head = head / heads.group();
        const HeadRows<const bf16> keys(in.k, tile.key_row, kv_head, heads.num_kv_heads, E);
        const HeadRows<const bf16> values(in.v, tile.key_row, kv_head, heads.num_kv_heads, E);
        const Band band{heads.reach()};
        const int position = static_cast<int>(tile.position), queries = static_cast<int>(tile.queries);
        const int end_key = position + queries;
        const int start_key = max(position - band.reach + 1, 0);
        const auto load_stage = [&](int i) {
            key_tile(i).load(keys, start_key + i * KEYS, end_key);
            value_tile(i).load(values, start_key + i * KEYS, end_key);
            copy_async_commit();
        };
        query_tile.load(HeadRows<const bf16>(in.q, tile.query_row, head, heads.num_heads, E), 0, queries);
        d_out_tile.load(HeadRows<const bf16>(in.d_out, tile.query_row, head, heads.num_heads, E), 0, queries);
        load_stage(0);
        load_stage(1);

        const int warp_row = warp_index() * 16;
        const int first_query = position + warp_row, last_query = first_query + 15;
        const RowNumbers numbers(in, tile.query_row, head, heads.num_heads);
        float log2_total[2], delta[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = warp_row + 8 * half + lane_row();
            log2_total[half] = numbers.log2_total(row, queries);
            delta[half] = numbers.row_delta(row, queries);
        }
        const float exponent_scale = heads.exponent_scale();
        const int of_warpgroup = warpgroup_row() * PANEL_ROW_BYTES;
        const SharedFactor query_rows = query_tile.factor().after(of_warpgroup);
        const SharedFactor d_out_rows = d_out_tile.factor().after(of_warpgroup);
        float sum[1][E / 8][4] = {};
        float weights[1][N][4], d_scores[1][N][4];
        Fragments<1, KEYS / 16> rounded;
        const auto start_stage = [&](int i) {
            start_scores<ROWS, KEYS>(weights, query_rows, key_tile(i).factor());
            start_scores<ROWS, KEYS>(d_scores, d_out_rows, value_tile(i).factor());
            commit_products();
        };
        const auto weigh = [&](int key) {
            hold_in_place(weights[0]);
            hold_in_place(d_scores[0]);
            if (!band.covers(first_query, last_query, key, KEYS)) {
                band.mask_keys(weights, first_query, key);
            }
            for_each<1, N>([&](int m, int n, int i) {
                const float weight = exp2_approximate(weights[m][n][i] * exponent_scale - log2_total[i / 2]);
                d_scores[m][n][i] = (d_scores[m][n][i] - delta[i / 2]) * weight;
            });
        };
        copy_async_wait<1>();
        show_to_products();
        __syncthreads();  // the first tile is there
        begin_products();
        start_stage(0);
        wait_for_products<0>();
        weigh(start_key);
        rounded.round(d_scores);
        int i = 0;
        for (int key = start_key + KEYS; key < end_key; key += KEYS, i++) {
            copy_async_wait<0>();
            show_to_products();
            __syncthreads();  // the next tile is there, and nobody reads the one before this one, or these values
            load_stage(i + 2);
            hold_in_place(sum[0]);
            begin_products();
            start_stage(i + 1);
            start_sum(sum, rounded, key_tile(i).factor());
            commit_products();
            wait_for_products<1>();
            weigh(key);
            wait_for_products<0>();
            hold_in_place(sum[0]);
            rounded.round(d_scores);
        }
        begin_products();
        start_sum(sum, rounded, key_tile(i).factor());
        commit_products();
        wait_for_products<0>();
        hold_in_place(sum[0]);
        copy_async_wait<0>();  // the tile behind the last one, of zeros
        __syncthreads();       // nobody reads the queries any more
        const HeadRows<bf16> to(dq, tile.query_row, head, heads.num_heads, E);
        const auto scale = [&](int, int) { return heads.scale; };
        store_rows<E, 1>(sum, scale, shared + warp_row * E, to, warp_row, queries, E, true);
    }
};

struct HopperBackwardKv {
    static constexpr int QUERIES = 64, N = QUERIES / 8, STAGES = 3;
    static constexpr int NUMBERS = 2 * QUERIES;
    static constexpr int SHARED_BYTES = shared_bytes(2 * ROWS + STAGES * 2 * QUERIES, STAGES * NUMBERS);

    // Rows are keys and columns queries, so that weights and score gradients are left factors where they are. While they and
    // their queries are multiplied, those of the next queries are computed.
    static __device__ __forceinline__ void run(const BackwardInputs& in, const AttentionTile& tile, const Heads& heads,
                                               bf16* dk, bf16* dv) {
        bf16* const shared = aligned_shared();
        const Panels<ROWS> key_tile{shared}, value_tile{shared + ROWS * E};
        bf16* const stages = shared + 2 * ROWS * E;
        const auto query_tile = [&](int i) { return Panels<QUERIES>{stages + i % STAGES * (2 * Panels<QUERIES>::ELEMENTS)}; };
        const auto d_out_tile = [&](int i) { return Panels<QUERIES>{query_tile(i).first + Panels<QUERIES>::ELEMENTS}; };
        float* const row_numbers = reinterpret_cast<float*>(stages + STAGES * 2 * Panels<QUERIES>::ELEMENTS);

        const unsigned kv_head = blockIdx.y;
        const int position = static_cast<int>(tile.position), key_count = static_cast<int>(tile.keys);
        const int queries = static_cast<int>(tile.queries);
        const Band band{heads.reach()};
        const int end_query = min(queries, position + key_count - 1 + band.reach);
        QueryWalk<QUERIES> next(kv_head * heads.group(), heads.group(), position, end_query);
        QueryWalk<QUERIES> walk = next;

        // A thread brings the log-sum-exp or delta of one row: it asks for it early and puts it down late.
        float number = 0.0f;
        const auto load_stage = [&](int i) {
            if (!next.is_done()) {
                const HeadRows<const bf16> rows(in.q, tile.query_row, next.head, heads.num_heads, E);
                const HeadRows<const bf16> d_rows(in.d_out, tile.query_row, next.head, heads.num_heads, E);
                query_tile(i).load(rows, next.query, end_query);
                d_out_tile(i).load(d_rows, next.query, end_query);
                const RowNumbers numbers(in, tile.query_row, next.head, heads.num_heads);
                number = numbers.of_thread<QUERIES>(next.query, end_query);
                next.advance();
            }
            copy_async_commit();
        };
        const auto put_number = [&](int i) {
            if (threadIdx.x < NUMBERS) {
                row_numbers[i % STAGES * NUMBERS + threadIdx.x] = number;
            }
        };
        key_tile.load(HeadRows<const bf16>(in.k, tile.key_row, kv_head, heads.num_kv_heads, E), 0, key_count);
        value_tile.load(HeadRows<const bf16>(in.v, tile.key_row, kv_head, heads.num_kv_heads, E), 0, key_count);
        load_stage(0);
        put_number(0);
        load_stage(1);
        put_number(1);

        const int warp_row = warp_index() * 16;
        const int first_key = position + warp_row;
        const float exponent_scale = heads.exponent_scale();
        const int of_warpgroup = warpgroup_row() * PANEL_ROW_BYTES;
        const SharedFactor key_rows = key_tile.factor().after(of_warpgroup);
        const SharedFactor value_rows = value_tile.factor().after(of_warpgroup);
        float dk_sum[1][E / 8][4] = {}, dv_sum[1][E / 8][4] = {};
        float scores[1][N][4], d_weights[1][N][4];
        Fragments<1, QUERIES / 16> weights, d_scores;
        const auto start_stage = [&](int i) {
            start_scores<ROWS, QUERIES>(scores, key_rows, query_tile(i).factor());
            start_scores<ROWS, QUERIES>(d_weights, value_rows, d_out_tile(i).factor());
            commit_products();
        };
        const auto weigh = [&](int stage) {
            const float* const numbers = row_numbers + stage % STAGES * NUMBERS + lane_column();
            hold_in_place(scores[0]);
            hold_in_place(d_weights[0]);
            if (!band.covers(walk.query, walk.query + QUERIES - 1, first_key, 16)) {
                band.mask_queries(scores, first_key, walk.query);
            }
            for_each<1, N>([&](int m, int n, int i) {
                const float weight = exp2_approximate(scores[m][n][i] * exponent_scale - numbers[8 * n + i % 2]);
                scores[m][n][i] = weight;
                d_weights[m][n][i] = (d_weights[m][n][i] - numbers[QUERIES + 8 * n + i % 2]) * weight;
            });
        };
        const auto round = [&] {
            weights.round(scores);
            d_scores.round(d_weights);
        };
        const auto start_sums = [&](int i) {
            hold_in_place(dk_sum[0]);
            hold_in_place(dv_sum[0]);
            start_sum(dv_sum, weights, d_out_tile(i).factor());
            start_sum(dk_sum, d_scores, query_tile(i).factor());
            commit_products();
        };
        const auto finish_sums = [&] {
            wait_for_products<0>();
            hold_in_place(dk_sum[0]);
            hold_in_place(dv_sum[0]);
        };
        copy_async_wait<1>();
        show_to_products();
        __syncthreads();  // the first stage is there
        if (!walk.is_done()) {
            begin_products();
            start_stage(0);
            wait_for_products<0>();
            weigh(0);
            round();
            walk.advance();
            int i = 0;
            for (; !walk.is_done(); walk.advance(), i++) {
                copy_async_wait<0>();
                show_to_products();
                __syncthreads();  // the next stage is there, and nobody reads the one before this one
                load_stage(i + 2);
                begin_products();
                start_stage(i + 1);
                start_sums(i);
                wait_for_products<1>();
                weigh(i + 1);
                finish_sums();
                round();
                put_number(i + 2);
            }
            begin_products();
            start_sums(i);
            finish_sums();
        }
        __syncthreads();  // nobody reads the keys and values any more
        const HeadRows<bf16> to_k(dk, tile.key_row, kv_head, heads.num_kv_heads, E);
        const HeadRows<bf16> to_v(dv, tile.key_row, kv_head, heads.num_kv_heads, E);
        bf16* const staging = shared + warp_row * E;
        store_rows<E, 1>(dk_sum, [&](int, int) { return heads.scale; }, staging, to_k, warp_row, key_count, E, true);
        store_rows<E, 1>(dv_sum, [&](int, int) { return 1.0f; }, staging, to_v, warp_row, key_count, E, true);
    }
};

}  // namespace

static_assert(HopperForward::SHARED_BYTES == 164864 && HopperBackwardQ::SHARED_BYTES == 148480 &&
                  HopperBackwardKv::SHARED_BYTES == 166400,
              "as the table says");

KERNEL(256, attention_forward_bf16_128_hopper)
(const bf16* q, const bf16* k, const bf16* v, const AttentionTile* tiles, unsigned num_heads, unsigned num_kv_heads,
 unsigned head_dim, float scale, unsigned window, bf16* out, float* lse) {
    const Heads heads{num_heads, num_kv_heads, head_dim, scale, window, 0.0f};
    HopperForward::run(q, k, v, tile_of_block(tiles), heads, out, lse);
}

KERNEL(256, attention_backward_q_bf16_128_hopper)
(const bf16* q, const bf16* k, const bf16* v, const bf16* d_out, const float* lse, const float* delta,
 const AttentionTile* tiles, unsigned num_heads, unsigned num_kv_heads, unsigned head_dim, float scale, unsigned window,
 bf16* dq) {
    const Heads heads{num_heads, num_kv_heads, head_dim, scale, window, 0.0f};
    HopperBackwardQ::run({q, k, v, d_out, lse, delta}, tile_of_block(tiles), heads, dq);
}

KERNEL(256, attention_backward_kv_bf16_128_hopper)
(const bf16* q, const bf16* k, const bf16* v, const bf16* d_out, const float* lse, const float* delta,
 const AttentionTile* tiles, unsigned num_heads, unsigned num_kv_heads, unsigned head_dim, float scale, unsigned window,
 bf16* dk, bf16* dv) {
    const Heads heads{num_heads, num_kv_heads, head_dim, scale, window, 0.0f};
    HopperBackwardKv::run({q, k, v, d_out, lse, delta}, tile_of_block(tiles), heads, dk, dv);
}
