// Small kernels that the emulator's own tests run; each does one thing, rightly or wrongly.
#include "tensor_core.cuh"

KERNEL(64, thread_numbers)(unsigned* out) { out[blockIdx.x * blockDim.x + threadIdx.x] = 1000 * blockIdx.x + threadIdx.x; }
