// Kernels that each break one rule, unless the name says that it is allowed.
#include "tensor_core.cuh"

KERNEL(64, half_a_block_waits)(unsigned* out) {
    // Warp 1 waits for a lane that waits for warp 0 at the barrier.
    if (threadIdx.x != 40) {
        __syncwarp(threadIdx.x < 32 ? ALL_LANES : 0xfffffeff);
    }
    if (threadIdx.x < 32 || threadIdx.x == 40) {
        __syncthreads();
    } else {
        __shfl_sync(ALL_LANES, threadIdx.x, 0);
    }
    out[threadIdx.x] = 1;
}

KERNEL(64, two_barriers_for_one)(unsigned* out) {
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    out[threadIdx.x] = 1;
}

KERNEL(64, exited_threads_are_not_waited_for)(unsigned* out) {
    if (threadIdx.x % 3 == 1) {
        return;
    }
    __syncthreads();
    out[threadIdx.x] = 1;
}

KERNEL(32, mask_without_the_caller)(unsigned* out) { out[threadIdx.x] = __ballot_sync(0x7fffffff, 1); }

KERNEL(32, masks_that_differ)(unsigned* out) {
    out[threadIdx.x] = __ballot_sync(threadIdx.x < 16 ? ALL_LANES : 0xffff0001, 1);
}

KERNEL(32, operations_that_differ)(unsigned* out) {
    if (threadIdx.x < 16) {
        out[threadIdx.x] = __ballot_sync(ALL_LANES, 1);
    } else {
        out[threadIdx.x] = __shfl_sync(ALL_LANES, threadIdx.x, 0);
    }
}

KERNEL(32, lane_that_has_exited)(unsigned* out) {
    if (threadIdx.x == 7) {
        return;
    }
    out[threadIdx.x] = __ballot_sync(ALL_LANES, 1);
}

KERNEL(32, shuffle_from_outside_the_mask)(unsigned* out) {
    if (threadIdx.x < 16) {
        out[threadIdx.x] = __shfl_sync(0xffff, threadIdx.x, 20);
    }
}

KERNEL(32, misaligned_matrix_row)(unsigned* out) {
    SHARED(bf16, rows, 32 * 9);
    unsigned registers[4];
    load_matrix_x4(registers, rows + 9 * threadIdx.x);
    out[threadIdx.x] = registers[0];
}

KERNEL(32, misaligned_copy)(const float* in) {
    SHARED(float, tile, 128);
    copy_async_16(tile + 4 * threadIdx.x, in + 1, true);
    copy_async_commit();
    copy_async_wait<0>();
}

KERNEL(32, misaligned_vector)(const float* in, float* out) {
    const float2 pair = *reinterpret_cast<const float2*>(in + 1);
    out[threadIdx.x] = pair.x;
}

KERNEL(32, write_behind_a_shared_array)(unsigned last) {
    SHARED(unsigned, before, 32);
    SHARED(unsigned, after, 32);
    before[threadIdx.x] = threadIdx.x;
    after[threadIdx.x] = threadIdx.x;
    if (threadIdx.x == 0) {
        unsigned* const start = before;
        start[last] = 1;
    }
}

KERNEL(32, write_behind_the_dynamic_memory)(unsigned last) {
    SHARED_DYNAMIC(unsigned, tile);
    if (threadIdx.x == 0) {
        tile[last] = 1;
    }
}

KERNEL(32, too_much_static_memory)(unsigned* out) {
    SHARED(unsigned, tile, 100 << 8);
    tile[threadIdx.x] = 1;
    out[threadIdx.x] = tile[threadIdx.x];
}

KERNEL(32, wild_address)(unsigned* out, uint64_t distance) {
    if (threadIdx.x == 5) {
        out[distance] = 1;
    }
}

KERNEL(32, division_by_zero)(unsigned* out, unsigned divisor) { out[threadIdx.x] = threadIdx.x / divisor; }

__device__ unsigned depth_of_recursion(const volatile unsigned* limit, unsigned depth) {
    volatile unsigned frame[256];
    frame[depth % 256] = depth;
    return depth == *limit ? 0 : depth_of_recursion(limit, depth + 1) + frame[depth % 256];
}

KERNEL(32, stack_that_runs_over)(const unsigned* limit, unsigned* out) { out[threadIdx.x] = depth_of_recursion(limit, 0); }

KERNEL(32, shift_too_far)(unsigned* out, unsigned distance) { out[threadIdx.x] = 1u << distance; }

KERNEL(32, signed_overflow)(unsigned* out, int factor) { out[threadIdx.x] = static_cast<unsigned>(factor * 0x10000); }

KERNEL(32, index_beyond_its_array)(unsigned* out, unsigned index) {
    const unsigned table[4] = {1, 2, 3, 4};
    out[threadIdx.x] = table[index];
}

KERNEL(32, read_of_unwritten_shared_memory)(unsigned* out) {
    SHARED(unsigned, tile, 64);
    tile[threadIdx.x] = threadIdx.x;
    __syncwarp();
    out[threadIdx.x] = tile[threadIdx.x + 1];
}

KERNEL(32, read_behind_a_buffer)(const unsigned* in, unsigned* out) { out[threadIdx.x] = in[threadIdx.x + 1]; }
