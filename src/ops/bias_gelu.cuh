// See bias_gelu.h. One thread computes one number.

#include "block.cuh"

__device__ static float gate(float x) {
    const float u = 0.7978845608f * (x + 0.044715f * x * x * x);
    return 1 / (1 + expf(fminf(-2 * u, 80.f)));
}

__global__ static void bias_gelu(
        float* y, const float* x, const float* bias, int rows, int columns) {
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i >= (int64_t)rows * columns) return;
    const float sum = x[i] + bias[i % columns];
    y[i] = sum * gate(sum);
}

__global__ static void grad_bias_gelu(
        float* dx, const float* x, const float* bias, const float* dy, int rows, int columns) {
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i >= (int64_t)rows * columns) return;
    const float sum = x[i] + bias[i % columns], g = gate(sum);
    const float slope = 1.5957691216f * (1 + 0.134145f * sum * sum);
    dx[i] = dy[i] * (g + sum * g * (1 - g) * slope);
}
