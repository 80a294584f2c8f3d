// See dropout.h. One thread computes one number.

#include "block.cuh"
#include "hash.h"

__global__ static void dropout(float* y, const float* x, int64_t count, uint32_t seed, float p) {
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < count) y[i] = x[i] * keep_scale(i, seed, p);
}
