// The forward pass of attention: softmax while the keys go by (arXiv:2307.08691, algorithm 1).
#pragma once

#include "attention_tile.cuh"

namespace {

// The running softmax of the warp's rows, in exponents of 2: the highest score so far, and the sum of exp2(score - highest).
template <int M>
struct OnlineSoftmax {
    // Lower than any score but the -infinity of the mask, so that a row that has seen no key yet gives all weights 0.
    static constexpr float LOWEST = -1e30f;

    float highest[M][2], total[M][2];

    __device__ __forceinline__ OnlineSoftmax() {
#pragma unroll
        for (int m = 0; m < M; m++) {
            highest[m][0] = highest[m][1] = LOWEST;
            total[m][0] = total[m][1] = 0.0f;
        }
    }

    // Turns scores into weights relative to the highest score so far, and says what brings what was summed with the weights
    // before to the same reference.
    template <int N>
    __device__ __forceinline__ void weigh(float (&scores)[M][N][4], float (&correction)[M][2], float exponent_scale) {
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float before = highest[m][half];
                const float now = fmaxf(before, highest_of_row(scores[m], half) * exponent_scale);
                correction[m][half] = exp2_approximate(before - now);
                highest[m][half] = now;
                total[m][half] *= correction[m][half];
            }
        }
        for_each<M, N>([&](int m, int n, int i) {
            float& weight = scores[m][n][i];
            weight = exp2_approximate(weight * exponent_scale - highest[m][i / 2]);
            total[m][i / 2] += weight;
        });
    }

    template <int COLUMNS>
    static __device__ __forceinline__ void rescale(float (&out)[M][COLUMNS][4], const float (&correction)[M][2]) {
        for_each<M, COLUMNS>([&](int m, int n, int i) { out[m][n][i] *= correction[m][i / 2]; });
    }

    // Sums up over the four lanes of each row; the last thing to be done.
    __device__ __forceinline__ void finish() {
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                total[m][half] += __shfl_xor_sync(ALL_LANES, total[m][half], 1);
                total[m][half] += __shfl_xor_sync(ALL_LANES, total[m][half], 2);
            }
        }
    }

 private:
    template <int N>
    static __device__ __forceinline__ float highest_of_row(const float (&scores)[N][4], int half) {
        float highest = fmaxf(scores[0][2 * half], scores[0][2 * half + 1]);
#pragma unroll
        for (int n = 1; n < N; n++) {
            highest = fmaxf(highest, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
        }
        highest = fmaxf(highest, __shfl_xor_sync(ALL_LANES, highest, 1));
        return fmaxf(highest, __shfl_xor_sync(ALL_LANES, highest, 2));
    }
};

// The logarithm of the total of each row, for the rows of a warp that are before `queries`.
template <int M>
__device__ __forceinline__ void store_lse(const OnlineSoftmax<M>& softmax, int warp_row, int queries, float* lse,
                                          unsigned stride) {
    if (lane_column() != 0) {
        return;
    }
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = warp_row + 16 * m + 8 * half + lane_row();
            if (row < queries) {
                const float log2_total = softmax.highest[m][half] + log2f(softmax.total[m][half]);
                lse[row * static_cast<uint64_t>(stride)] = log2_total * LN_2;
            }
        }
    }
}

// A block takes QUERIES rows of one head, a warp QUERIES / WARPS of them. While the scores of a tile are computed its values
// arrive, and while they are weighed and summed the next keys do.
template <int E, int QUERIES, int KEYS>
struct Forward {
    static constexpr int WARPS = 4, THREADS = WARPS * WARP_LANES;
    static constexpr int WARP_ROWS = QUERIES / WARPS, M = WARP_ROWS / 16;
    static constexpr int SHARED_BYTES = (QUERIES + 2 * KEYS) * E * static_cast<int>(sizeof(bf16));

    static __device__ __forceinline__ void run(const bf16* q, const bf16* k, const bf16* v, const AttentionTile& tile,
                                               const Heads& heads, bf16* out, float* lse) {
        SHARED_DYNAMIC(bf16, shared);
        bf16* const query_tile = shared;
        bf16* const key_tile = query_tile + QUERIES * E;
        bf16* const value_tile = key_tile + KEYS * E;

        const unsigned head = blockIdx.y, kv_head = head / heads.group();
        const bool whole_chunks = in_chunks(heads.head_dim, q, k, v, out);
        const HeadRows<const bf16> keys(k, tile.key_row, kv_head, heads.num_kv_heads, heads.head_dim);
        const HeadRows<const bf16> values(v, tile.key_row, kv_head, heads.num_kv_heads, heads.head_dim);

        const Band band{heads.reach()};
        const int position = static_cast<int>(tile.position), queries = static_cast<int>(tile.queries);
        const int end_key = position + queries;
        int key = max(position - band.reach + 1, 0);
        {
            const HeadRows<const bf16> rows(q, tile.query_row, head, heads.num_heads, heads.head_dim);
            load_tile<E, QUERIES, THREADS>(query_tile, rows, 0, queries, heads.head_dim, whole_chunks);
        }
        load_tile<E, KEYS, THREADS>(key_tile, keys, key, end_key, heads.head_dim, whole_chunks);
        copy_async_commit();

        const int warp_row = warp_index() * WARP_ROWS;
        // A warp without queries meets no keys.
        const int first_query = position + warp_row, last_query = warp_row < queries ? first_query + WARP_ROWS - 1 : -1;
        const LaneOffsets<E> offsets;
        const LeftRows<E, M, 0> query_rows(query_tile + warp_row * E);
        const float exponent_scale = heads.exponent_scale();
        OnlineSoftmax<M> softmax;
        float sum[M][E / 8][4] = {};
        for (; key < end_key; key += KEYS) {
            const bool meets = band.meets(first_query, last_query, key, KEYS);
            float scores[M][KEYS / 8][4];
            copy_async_wait<0>();
            __syncthreads();  // the keys are there, and no warp reads the values before
            load_tile<E, KEYS, THREADS>(value_tile, values, key, end_key, heads.head_dim, whole_chunks);
            copy_async_commit();
            if (meets) {
                multiply_rows(scores, query_rows, key_tile, offsets);
            }
            copy_async_wait<0>();
            __syncthreads();  // the values are there, and no warp reads these keys any more
            if (key + KEYS < end_key) {
                load_tile<E, KEYS, THREADS>(key_tile, keys, key + KEYS, end_key, heads.head_dim, whole_chunks);
            }
            copy_async_commit();
            if (meets) {
                if (heads.soft_cap > 0.0f) {
                    cap_scores(scores, heads);
                }
                if (!band.covers(first_query, last_query, key, KEYS)) {
                    band.mask_keys(scores, first_query, key);
                }
                float correction[M][2];
                softmax.weigh(scores, correction, exponent_scale);
                softmax.rescale(sum, correction);
                Fragments<M, KEYS / 16> weights;
                weights.round(scores);
                add_product(sum, weights, value_tile, offsets);
            }
        }
        softmax.finish();
        const HeadRows<bf16> to(out, tile.query_row, head, heads.num_heads, heads.head_dim);
        const auto inverse_total = [&](int m, int half) { return 1.0f / softmax.total[m][half]; };
        store_rows<E, M>(sum, inverse_total, query_tile + warp_row * E, to, warp_row, queries, heads.head_dim, whole_chunks);
        store_lse(softmax, warp_row, queries,
                  lse + static_cast<uint64_t>(tile.query_row) * heads.num_heads + head, heads.num_heads);
    }
};

}  // namespace
