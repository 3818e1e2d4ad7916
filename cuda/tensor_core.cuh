// The warp-wide matrix instructions and the asynchronous copies that the matrix kernels are built of: one function per PTX
// instruction (PTX ISA 7.0, sm_80 and later). All 32 lanes of a warp call each matrix function together.
//
// Which element a lane holds, with g = lane / 4 and t = lane % 4 (two bf16 to a register, the lower column or row first):
//
//     A [16, 16]   a[0] = (g, 2t)      a[1] = (g + 8, 2t)     a[2] = (g, 2t + 8)     a[3] = (g + 8, 2t + 8)
//     B [16, 8]    b[0] = (2t, g)      b[1] = (2t + 8, g)
//     D [16, 8]    d[0], d[1] = (g, 2t), (g, 2t + 1)          d[2], d[3] = (g + 8, 2t), (g + 8, 2t + 1)
#pragma once

#include "common.cuh"

#ifdef __CUDACC__

namespace tensor_core {
__device__ __forceinline__ unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}
}  // namespace tensor_core

// D += A B, with A [16, 16] and B [16, 8] in bf16 and D [16, 8] in f32.
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Loads four 8 x 8 matrices of bf16: lane 8 i + j gives the address of row j of matrix i (16 bytes, 16-byte aligned), and
// receives in r[i] the elements (lane / 4, 2 (lane % 4)) and the one right of it.
__device__ __forceinline__ void load_matrix_x4(unsigned (&r)[4], const void* shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(tensor_core::shared_address(shared_row))
                 : "memory");
}

// The same, each matrix transposed: a lane receives the elements (2 (lane % 4), lane / 4) and the one below it.
__device__ __forceinline__ void load_matrix_x4_transposed(unsigned (&r)[4], const void* shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(tensor_core::shared_address(shared_row))
                 : "memory");
}

// Two matrices: lanes 0 to 15 give the addresses.
__device__ __forceinline__ void load_matrix_x2(unsigned (&r)[2], const void* shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(tensor_core::shared_address(shared_row))
                 : "memory");
}

__device__ __forceinline__ void load_matrix_x2_transposed(unsigned (&r)[2], const void* shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(tensor_core::shared_address(shared_row))
                 : "memory");
}

// Starts a copy of 16 bytes (both sides 16-byte aligned) into shared memory; where not `valid`, writes zeros and reads nothing.
// The bytes are there for this thread after copy_async_wait, and for others after a barrier behind that.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool valid) {
    const unsigned bytes_to_read = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(tensor_core::shared_address(shared)), "l"(global), "r"(bytes_to_read)
                 : "memory");
}

// Closes a group of the copies started since the last call.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the N newest groups of this thread are still under way.
template <int N>
__device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

#else
#include "emulator/host/tensor_core_on_host.h"
#endif
