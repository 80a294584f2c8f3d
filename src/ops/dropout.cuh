// Dropout. y, x: (count). One thread computes one number.

#include "block.cuh"
#include "hash.h"

__global__ static void dropout_kernel(float* y, const float* x, int64_t count, uint32_t seed,
                                      float p) {
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < count) y[i] = x[i] * keep_scale(i, seed, p);
}

static void dropout(float* y, const float* x, int64_t count, uint32_t seed, float p) {
    dropout_kernel<<<blocks_for(count), THREADS>>>(y, x, count, seed, p);
}
