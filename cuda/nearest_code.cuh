// The nearest of an ascending map of codes: what 4-bit weights, their scales and 8-bit moments are quantized with.
#pragma once

#include "common.cuh"

// The largest code whose lower bound is below `value`, found bit by bit; `lower_bounds[k]` lies between the codes k - 1 and k.
//
// A value equal to a bound takes the lower code. CODES is a power of two; lower_bounds[0] is never read; a NaN takes code 0.
template <unsigned CODES>
__device__ __forceinline__ unsigned nearest_code(const float* lower_bounds, float value) {
    unsigned code = 0;
#pragma unroll
    for (unsigned bit = CODES / 2; bit > 0; bit /= 2) {
        code |= lower_bounds[code | bit] < value ? bit : 0;
    }
    return code;
}
