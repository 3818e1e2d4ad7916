// Matrix products of a warpgroup, which is four warps in a row: one function per PTX instruction (PTX ISA 8.0, sm_90a alone).
// All 128 lanes call each function together. A product runs beside what follows: between its start and the wait that it is over
// by, nothing touches its result, its left factor in registers or its factors in shared memory.
//
// A lane holds of a result [64, 8 N] what mma_m16n8k16 has for each of N results next to each other: row lane / 4 (and 8 further)
// of the 16 rows of its warp, as d[n][4]. A left factor [64, 16] in registers is likewise the A of that instruction.
//
// Factors in shared memory lie in panels of 64 columns: a row of a panel has 128 bytes, and its 16-byte chunk c lies at place
// c ^ row % 8. A panel begins at a multiple of 1024 bytes.
#pragma once

#include "tensor_core.cuh"

constexpr int PANEL_COLUMNS = 64;
constexpr int PANEL_ROW_BYTES = 128;

#ifdef __CUDACC__

// A factor in shared memory.
struct SharedFactor {
    uint64_t descriptor;

    // The one that begins so many bytes later.
    __device__ __forceinline__ SharedFactor after(int bytes) const { return {descriptor + static_cast<unsigned>(bytes >> 4)}; }
};

// Panels from `start` on, `panel_bytes` apart: where a factor's columns are summed over, the distance plays no part.
__device__ __forceinline__ SharedFactor shared_factor(const void* start, int panel_bytes) {
    constexpr uint64_t GROUP_OF_ROWS = 8 * PANEL_ROW_BYTES >> 4, SWIZZLE_128 = 1;
    const uint64_t address = tensor_core::shared_address(start) >> 4;
    return {address | static_cast<uint64_t>(panel_bytes >> 4) << 16 | GROUP_OF_ROWS << 32 | SWIZZLE_128 << 62};
}

#define FOUR(mode, d) mode(d[0]), mode(d[1]), mode(d[2]), mode(d[3])
#define THIRTY_TWO(mode, d, n)                                                                          \
    FOUR(mode, d[n]), FOUR(mode, d[n + 1]), FOUR(mode, d[n + 2]), FOUR(mode, d[n + 3]), FOUR(mode, d[n + 4]), \
        FOUR(mode, d[n + 5]), FOUR(mode, d[n + 6]), FOUR(mode, d[n + 7])
#define FIRST_32                                                                                                      \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
    "%24, %25, %26, %27, %28, %29, %30, %31"
#define SECOND_32                                                                                                     \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, " \
    "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PRODUCT(columns, results, factors, add, transposed)                                                       \
    "{\n.reg .pred add;\nsetp.ne.b32 add, " add                                                                   \
    ", 0;\nwgmma.mma_async.sync.aligned.m64n" columns "k16.f32.bf16.bf16 {" results "}, " factors ", add, 1, 1, " \
    transposed ";\n}"

// d = A B^T: A [64, 16] and B [8 N, 16], 16 columns of panels.
__device__ __forceinline__ void start_product(float (&d)[8][4], SharedFactor a, SharedFactor b) {
    asm volatile(PRODUCT("64", FIRST_32, "%32, %33", "0", "0, 0")
                 : THIRTY_TWO("=f", d, 0)
                 : "l"(a.descriptor), "l"(b.descriptor));
}

__device__ __forceinline__ void start_product(float (&d)[16][4], SharedFactor a, SharedFactor b) {
    asm volatile(PRODUCT("128", FIRST_32 ", " SECOND_32, "%64, %65", "0", "0, 0")
                 : THIRTY_TWO("=f", d, 0), THIRTY_TWO("=f", d, 8)
                 : "l"(a.descriptor), "l"(b.descriptor));
}

// d += A B^T
__device__ __forceinline__ void add_product(float (&d)[8][4], SharedFactor a, SharedFactor b) {
    asm volatile(PRODUCT("64", FIRST_32, "%32, %33", "1", "0, 0")
                 : THIRTY_TWO("+f", d, 0)
                 : "l"(a.descriptor), "l"(b.descriptor));
}

__device__ __forceinline__ void add_product(float (&d)[16][4], SharedFactor a, SharedFactor b) {
    asm volatile(PRODUCT("128", FIRST_32 ", " SECOND_32, "%64, %65", "1", "0, 0")
                 : THIRTY_TWO("+f", d, 0), THIRTY_TWO("+f", d, 8)
                 : "l"(a.descriptor), "l"(b.descriptor));
}

// d += A B: A [64, 16] in registers and B [16, 128], 16 rows of two panels.
__device__ __forceinline__ void add_product_of_rows(float (&d)[16][4], const unsigned (&a)[4], SharedFactor b) {
    asm volatile(PRODUCT("128", FIRST_32 ", " SECOND_32, "{%64, %65, %66, %67}, %68", "1", "1")
                 : THIRTY_TWO("+f", d, 0), THIRTY_TWO("+f", d, 8)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.descriptor));
}

#undef FOUR
#undef THIRTY_TWO
#undef FIRST_32
#undef SECOND_32
#undef PRODUCT

// Before the first product of a group: what was written to registers is there for it.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes a group of the products started since the last call.
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most the NEWEST groups are still under way.
template <int NEWEST>
__device__ __forceinline__ void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(NEWEST) : "memory");
}

// Keeps the compiler from moving uses of a result across this place.
template <int N>
__device__ __forceinline__ void hold_in_place(float (&d)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; n++) {
        asm volatile("" : "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])::"memory");
    }
}

// What this thread wrote to shared memory, copies that have landed included, is there for products behind the next barrier.
__device__ __forceinline__ void show_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#else
#include "emulator/host/warpgroup_on_host.h"
#endif
