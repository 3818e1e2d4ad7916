// Threads that meet at one address. Where a kernel takes `synchronize`, it is right if that is not 0.
#include "tensor_core.cuh"

KERNEL(64, neighbours_across_warps)(unsigned* out, unsigned synchronize) {
    SHARED(unsigned, tile, 64);
    tile[threadIdx.x] = threadIdx.x;
    if (synchronize) {
        __syncthreads();
    }
    out[threadIdx.x] = tile[threadIdx.x ^ 32];
}

KERNEL(32, neighbours_in_a_warp)(unsigned* out, unsigned synchronize) {
    SHARED(unsigned, tile, 32);
    tile[threadIdx.x] = threadIdx.x;
    if (synchronize) {
        __syncwarp();
    }
    out[threadIdx.x] = tile[threadIdx.x ^ 1];
}

KERNEL(64, warp_barrier_between_warps)(unsigned* out) {
    SHARED(unsigned, tile, 64);
    tile[threadIdx.x] = threadIdx.x;
    __syncwarp();
    out[threadIdx.x] = tile[threadIdx.x ^ 32];
}

KERNEL(32, shuffle_instead_of_a_barrier)(unsigned* out) {
    SHARED(unsigned, tile, 32);
    tile[threadIdx.x] = threadIdx.x;
    __shfl_xor_sync(ALL_LANES, threadIdx.x, 1);
    out[threadIdx.x] = tile[threadIdx.x ^ 1];
}

// Many read, then one writes.
KERNEL(64, write_after_read)(unsigned* out, unsigned synchronize) {
    SHARED(unsigned, word, 1);
    if (threadIdx.x == 0) {
        word[0] = 7;
    }
    __syncthreads();
    out[threadIdx.x] = word[0];
    if (synchronize) {
        __syncthreads();
    }
    if (threadIdx.x == 63) {
        word[0] = 8;
    }
}

KERNEL(32, blocks_that_write_one_word)(unsigned* out) {
    if (threadIdx.x == 0) {
        out[0] = blockIdx.x;
    }
}

KERNEL(32, blocks_that_read_their_neighbour)(unsigned* out) {
    const unsigned neighbour = threadIdx.x == 0 ? out[blockIdx.x ^ 1] : 0;
    if (threadIdx.x == 0) {
        out[blockIdx.x] = neighbour + 1;
    }
}

KERNEL(64, blocks_that_count_atomically)(unsigned* out) { atomicAdd(out, 1u); }

KERNEL(64, repeated_block_sums)(const float* in, float* out) {
    const float first = block_sum<64>(in[threadIdx.x]);
    const float second = block_sum<64>(first * in[threadIdx.x]);
    out[threadIdx.x] = second;
}

KERNEL(64, repeated_block_maxima)(const float* in, float* out) {
    const float largest = block_max<64>(in[threadIdx.x]);
    const float least = -block_max<64>(-in[threadIdx.x]);
    out[threadIdx.x] = largest - least;
}
