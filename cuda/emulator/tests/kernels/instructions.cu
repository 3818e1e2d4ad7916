// One instruction each, with the operands of each lane read from memory.
#include "tensor_core.cuh"

KERNEL(64, thread_numbers)(unsigned* out) { out[blockIdx.x * blockDim.x + threadIdx.x] = 1000 * blockIdx.x + threadIdx.x; }

KERNEL(32, shuffles)(const unsigned* in, unsigned operand, unsigned width, unsigned* out) {
    const unsigned value = in[threadIdx.x];
    const int segment = static_cast<int>(width);
    out[threadIdx.x] = __shfl_sync(ALL_LANES, value, static_cast<int>(operand), segment);
    out[32 + threadIdx.x] = __shfl_up_sync(ALL_LANES, value, operand, segment);
    out[64 + threadIdx.x] = __shfl_down_sync(ALL_LANES, value, operand, segment);
    out[96 + threadIdx.x] = __shfl_xor_sync(ALL_LANES, value, static_cast<int>(operand), segment);
}

KERNEL(32, votes)(const unsigned* in, unsigned* out) {
    const int yes = in[threadIdx.x] != 0;
    out[threadIdx.x] = __ballot_sync(ALL_LANES, yes);
    out[32 + threadIdx.x] = static_cast<unsigned>(__any_sync(ALL_LANES, yes));
    out[64 + threadIdx.x] = static_cast<unsigned>(__all_sync(ALL_LANES, yes));
}

// D = A B by way of shared memory, as the matrix kernels do it: a [16, 16], b [16, 8] (rows of k) or its transpose [8, 16].
KERNEL(32, matrix_product)(const bf16* a, const bf16* b, unsigned is_b_transposed, const float* c, float* d) {
    SHARED(bf16, a_tile, 16 * 16);
    SHARED(bf16, b_tile, 16 * 8);
    const unsigned lane = threadIdx.x;
    for (unsigned i = lane; i < 16 * 16; i += 32) {
        a_tile[i] = a[i];
    }
    for (unsigned i = lane; i < 16 * 8; i += 32) {
        b_tile[i] = b[i];
    }
    __syncwarp();
    unsigned a_registers[4];
    unsigned b_registers[2];
    load_matrix_x4(a_registers, a_tile + lane % 16 * 16 + lane / 16 * 8);
    if (is_b_transposed) {
        load_matrix_x2(b_registers, b_tile + lane % 8 * 16 + lane / 8 % 2 * 8);
    } else {
        load_matrix_x2_transposed(b_registers, b_tile + lane % 16 * 8);
    }
    float sum[4];
    const unsigned row = lane / 4;
    const unsigned column = 2 * (lane % 4);
    for (unsigned i = 0; i < 4; i++) {
        sum[i] = c[(row + i / 2 * 8) * 8 + column + i % 2];
    }
    mma_m16n8k16(sum, a_registers, b_registers);
    for (unsigned i = 0; i < 4; i++) {
        d[(row + i / 2 * 8) * 8 + column + i % 2] = sum[i];
    }
}

// What each lane receives of the 32 rows of 8 elements.
KERNEL(32, matrix_loads)(const uint4* rows, unsigned* plain, unsigned* transposed) {
    SHARED(uint4, tile, 32);
    tile[threadIdx.x] = rows[threadIdx.x];
    __syncwarp();
    unsigned registers[4];
    load_matrix_x4(registers, &tile[threadIdx.x]);
    for (unsigned i = 0; i < 4; i++) {
        plain[4 * threadIdx.x + i] = registers[i];
    }
    load_matrix_x4_transposed(registers, &tile[threadIdx.x]);
    for (unsigned i = 0; i < 4; i++) {
        transposed[4 * threadIdx.x + i] = registers[i];
    }
}

KERNEL(256, float_conversions)(const float* in, unsigned n, uint16_t* to_bf16, uint16_t* to_f16) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) {
        to_bf16[i] = from_float<bf16>(in[i]).bits;
        to_f16[i] = from_float<f16>(in[i]).bits;
    }
}

KERNEL(256, half_conversions)(float* from_bf16, float* from_f16) {
    const uint16_t bits = static_cast<uint16_t>(blockIdx.x * blockDim.x + threadIdx.x);
    from_bf16[bits] = to_float(bf16{bits});
    from_f16[bits] = to_float(f16{bits});
}

KERNEL(32, bit_operations)(unsigned a, unsigned b, unsigned selector, unsigned* out) {
    if (threadIdx.x == 0) {
        out[0] = __umulhi(a, b);
        out[1] = static_cast<unsigned>(__popc(static_cast<int>(a)));
        out[2] = static_cast<unsigned>(__clz(static_cast<int>(a)));
        out[3] = static_cast<unsigned>(__ffs(static_cast<int>(a)));
        out[4] = __brev(a);
        out[5] = __byte_perm(a, b, selector);
        out[6] = pack_bf16(1.0f, -2.0f);
    }
}
