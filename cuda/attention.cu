// Causal attention over packed sequences, with grouped-query heads, an optional sliding window and an optional cap on scores.
//
//   forward        S = scale Q K^T, or cap tanh(S / cap);  lse = log rowsum(exp(S));  P = exp(S - lse);  O = P V
//   backward_delta delta = rowsum(dO O)
//   backward_q     dS = P (dO V^T - delta), times the cap's derivative;  dQ = scale dS K
//   backward_kv    dV = P^T dO;  dK = scale dS^T Q
//
// Sources: arXiv:2205.14135, arXiv:2307.08691. For heads of 128 columns on sm_90 there is attention_hopper.cu.
//
// A block takes one tile of rows of one head, and grid = (tiles, heads): query heads, or key/value heads in backward_kv. It
// walks through the tiles of the other side that its rows see. A warp takes a strip of 16 or 32 rows: its lanes hold scores
// and sums in registers, and one product is, rounded to bf16, the left factor of the next one without leaving them. Each
// gradient is summed by one block, in a fixed order. With that backward does 7 products where atomics would do 5.
//
//       |     forward: 128 threads     |    backward_q: 128 threads   |   backward_kv: 128 threads
//     E | queries  keys   shared bytes | queries  keys   shared bytes | keys  queries   shared bytes
//    64 |     128   128          49152 |     128    64          65536 |   64       64          58368
//    80 |     128    64          40960 |     128    32          61440 |   64       64          70656
//    96 |     128    64          49152 |     128    32          73728 |   64       64          82944
//   128 |     128    64          65536 |     128    32          98304 |   64       32          70144
//   256 |      64    64          98304 |      64    16          98304 |   32       32         100864
//
// The first column of each is the rows of a tile in `tiles`. A head of head_dim < E columns has zeros in the others. The limit
// on shared memory is the 99 KB of sm_86, 89 and 120. A multiprocessor of sm_90 or 100 runs two blocks at a time (registers
// allow no third), and so does one of sm_80 where a block takes at most 82944 bytes.
//
// For T queries with T keys, half of them seen, a head takes 2 T^2 head_dim FLOPs in forward and 7 T^2 head_dim in backward, of
// which 5 T^2 head_dim would be necessary. Tensors are read from memory about once; from the cache, a block reads
// 4 T head_dim bytes and there are T / rows of them.

#include "attention_backward.cuh"
#include "attention_forward.cuh"

// The parameters of a kernel and its body; the shared bytes are those of the table.
#define FORWARD(E, QUERIES, KEYS, BYTES)                                                                                 \
    (const bf16* q, const bf16* k, const bf16* v, const AttentionTile* tiles, unsigned num_heads, unsigned num_kv_heads, \
     unsigned head_dim, float scale, unsigned window, float soft_cap, bf16* out, float* lse) {                           \
        using Kernel = Forward<E, QUERIES, KEYS>;                                                                        \
        static_assert(Kernel::SHARED_BYTES == BYTES && Kernel::THREADS == 128, "as the table says");                     \
        const Heads heads{num_heads, num_kv_heads, head_dim, scale, window, soft_cap};                                   \
        Kernel::run(q, k, v, tile_of_block(tiles), heads, out, lse);                                                     \
    }

KERNEL(128, attention_forward_bf16_64) FORWARD(64, 128, 128, 49152)
KERNEL(128, attention_forward_bf16_80) FORWARD(80, 128, 64, 40960)
KERNEL(128, attention_forward_bf16_96) FORWARD(96, 128, 64, 49152)
KERNEL(128, attention_forward_bf16_128) FORWARD(128, 128, 64, 65536)
KERNEL(128, attention_forward_bf16_256) FORWARD(256, 64, 64, 98304)

KERNEL(256, attention_backward_delta_bf16)
(const bf16* d_out, const bf16* out, unsigned rows, unsigned num_heads, unsigned head_dim, float* delta) {
    backward_delta(d_out, out, static_cast<uint64_t>(rows) * num_heads, head_dim, delta);
}

#define BACKWARD_Q(E, QUERIES, KEYS, HELD, BYTES)                                                           \
    (const bf16* q, const bf16* k, const bf16* v, const bf16* d_out, const float* lse, const float* delta,  \
     const AttentionTile* tiles, unsigned num_heads, unsigned num_kv_heads, unsigned head_dim, float scale, \
     unsigned window, float soft_cap, bf16* dq) {                                                           \
        using Kernel = BackwardQ<E, QUERIES, KEYS, HELD>;                                                   \
        static_assert(Kernel::SHARED_BYTES == BYTES && Kernel::THREADS == 128, "as the table says");        \
        const Heads heads{num_heads, num_kv_heads, head_dim, scale, window, soft_cap};                      \
        Kernel::run({q, k, v, d_out, lse, delta}, tile_of_block(tiles), heads, dq);                         \
    }

KERNEL(128, attention_backward_q_bf16_64) BACKWARD_Q(64, 128, 64, 0, 65536)
KERNEL(128, attention_backward_q_bf16_80) BACKWARD_Q(80, 128, 32, 2, 61440)
KERNEL(128, attention_backward_q_bf16_96) BACKWARD_Q(96, 128, 32, 1, 73728)
KERNEL(128, attention_backward_q_bf16_128) BACKWARD_Q(128, 128, 32, 0, 98304)
KERNEL(128, attention_backward_q_bf16_256) BACKWARD_Q(256, 64, 16, 6, 98304)

#define BACKWARD_KV(E, KEYS, QUERIES, HELD, BYTES)                                                          \
    (const bf16* q, const bf16* k, const bf16* v, const bf16* d_out, const float* lse, const float* delta,  \
     const AttentionTile* tiles, unsigned num_heads, unsigned num_kv_heads, unsigned head_dim, float scale, \
     unsigned window, float soft_cap, bf16* dk, bf16* dv) {                                                 \
        using Kernel = BackwardKv<E, KEYS, QUERIES, HELD>;                                                  \
        static_assert(Kernel::SHARED_BYTES == BYTES && Kernel::THREADS == 128, "as the table says");        \
        const Heads heads{num_heads, num_kv_heads, head_dim, scale, window, soft_cap};                      \
        Kernel::run({q, k, v, d_out, lse, delta}, tile_of_block(tiles), heads, dk, dv);                     \
    }

KERNEL(128, attention_backward_kv_bf16_64) BACKWARD_KV(64, 64, 64, 4, 58368)
KERNEL(128, attention_backward_kv_bf16_80) BACKWARD_KV(80, 64, 64, 4, 70656)
KERNEL(128, attention_backward_kv_bf16_96) BACKWARD_KV(96, 64, 64, 2, 82944)
KERNEL(128, attention_backward_kv_bf16_128) BACKWARD_KV(128, 64, 32, 4, 70144)
KERNEL(128, attention_backward_kv_bf16_256) BACKWARD_KV(256, 32, 32, 8, 100864)
