// A matrix in global memory, read eight elements of a row at a time, in one access where its address and rows allow it.
#pragma once

#include "bf16_vector.cuh"
#include "tensor_core.cuh"

// Row-major, with rows that begin `stride` elements apart. Past its edges it is zero.
struct Matrix {
    const bf16* __restrict__ data;
    unsigned rows, cols, stride;
    bool vectorized;

    __device__ __forceinline__ Matrix(const bf16* data, unsigned rows, unsigned cols, unsigned stride)
        : data(data),
          rows(rows),
          cols(cols),
          stride(stride),
          vectorized(cols % 8 == 0 && stride % 8 == 0 && are_aligned(data)) {}

    __device__ __forceinline__ Matrix(const bf16* data, unsigned rows, unsigned cols) : Matrix(data, rows, cols, cols) {}

    __device__ __forceinline__ uint64_t index(unsigned row, unsigned col) const {
        return static_cast<uint64_t>(row) * stride + col;
    }

    __device__ __forceinline__ uint4 load(unsigned row, unsigned col) const {
        if (vectorized) {
            uint4 eight = {};
            if (row < rows && col < cols) {
                eight = *reinterpret_cast<const uint4*>(data + index(row, col));
            }
            return eight;
        }
        uint4 eight = {};
#pragma unroll 1
        for (unsigned i = 0; i < 8; i += 2) {
            eight = make_uint4(eight.y, eight.z, eight.w, element(row, col + i) | element(row, col + i + 1) << 16);
        }
        return eight;
    }

    // Shared memory has the elements after copy_async_wait and a barrier.
    __device__ __forceinline__ void copy_async(bf16* shared, unsigned row, unsigned col) const {
        if (vectorized) {
            const bool valid = row < rows && col < cols;
            copy_async_16(shared, valid ? data + index(row, col) : data, valid);
        } else {
            *reinterpret_cast<uint4*>(shared) = load(row, col);
        }
    }

 private:
    __device__ __forceinline__ unsigned element(unsigned row, unsigned col) const {
        return row < rows && col < cols ? data[index(row, col)].bits : 0u;
    }
};
