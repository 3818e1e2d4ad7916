// Asynchronous copies by a warp: each lane copies 16 bytes.
#include "tensor_core.cuh"

KERNEL(32, copy_and_wait)(const uint4* in, uint4* out, unsigned wait) {
    SHARED(uint4, tile, 32);
    tile[threadIdx.x] = make_uint4(1, 2, 3, 4);
    copy_async_16(&tile[threadIdx.x], &in[threadIdx.x], true);
    copy_async_commit();
    if (wait) {
        copy_async_wait<0>();
    }
    out[threadIdx.x] = tile[threadIdx.x];
    copy_async_wait<0>();
}

KERNEL(32, copy_of_nothing)(uint4* out) {
    SHARED(uint4, tile, 32);
    copy_async_16(&tile[threadIdx.x], nullptr, false);
    copy_async_commit();
    copy_async_wait<0>();
    out[threadIdx.x] = tile[threadIdx.x];
}

// Two groups; the older has landed when one may still be under way.
KERNEL(32, older_of_two_groups)(const uint4* in, uint4* out) {
    SHARED(uint4, tile, 64);
    copy_async_16(&tile[threadIdx.x], &in[threadIdx.x], true);
    copy_async_commit();
    copy_async_16(&tile[32 + threadIdx.x], &in[32 + threadIdx.x], true);
    copy_async_commit();
    copy_async_wait<1>();
    out[threadIdx.x] = tile[threadIdx.x];
    copy_async_wait<0>();
    out[32 + threadIdx.x] = tile[32 + threadIdx.x];
}

// A copy that is in no group yet is not waited for.
KERNEL(32, copy_without_commit)(const uint4* in, uint4* out) {
    SHARED(uint4, tile, 32);
    tile[threadIdx.x] = make_uint4(1, 2, 3, 4);
    copy_async_16(&tile[threadIdx.x], &in[threadIdx.x], true);
    copy_async_wait<0>();
    out[threadIdx.x] = tile[threadIdx.x];
}

KERNEL(32, copy_after_the_end)(const uint4* in, unsigned wait) {
    SHARED(uint4, tile, 32);
    copy_async_16(&tile[threadIdx.x], &in[threadIdx.x], true);
    copy_async_commit();
    if (wait) {
        copy_async_wait<0>();
    }
}

// A lane reads what its neighbour copied: the wait alone is not enough.
KERNEL(32, copy_for_the_neighbour)(const uint4* in, uint4* out, unsigned synchronize) {
    SHARED(uint4, tile, 32);
    copy_async_16(&tile[threadIdx.x], &in[threadIdx.x], true);
    copy_async_commit();
    copy_async_wait<0>();
    if (synchronize) {
        __syncwarp();
    }
    out[threadIdx.x] = tile[threadIdx.x ^ 1];
}
