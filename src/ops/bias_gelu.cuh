// GELU of x + bias, and its gradient. y, x, dx, dy: (rows, columns); bias: (columns).
// One thread computes one number.

#include "block.cuh"

__device__ static float gate(float x) {
    const float u = 0.7978845608f * (x + 0.044715f * x * x * x);
    return 1 / (1 + expf(fminf(-2 * u, 80.f)));
}

__global__ static void bias_gelu_kernel(float* y, const float* x, const float* bias, int64_t count,
                                        int columns) {
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i >= count) return;
    const float sum = x[i] + bias[i % columns];
    y[i] = sum * gate(sum);
}

static void bias_gelu(float* y, const float* x, const float* bias, int rows, int columns) {
    const int64_t count = (int64_t)rows * columns;
    bias_gelu_kernel<<<blocks_for(count), THREADS>>>(y, x, bias, count, columns);
}

__global__ static void grad_bias_gelu_kernel(float* dx, const float* x, const float* bias,
                                             const float* dy, int64_t count, int columns) {
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i >= count) return;
    const float sum = x[i] + bias[i % columns], g = gate(sum);
    const float slope = 1.5957691216f * (1 + 0.134145f * sum * sum);
    dx[i] = dy[i] * (g + sum * g * (1 - g) * slope);
}

static void grad_bias_gelu(float* dx, const float* x, const float* bias, const float* dy, int rows,
                           int columns) {
    const int64_t count = (int64_t)rows * columns;
    grad_bias_gelu_kernel<<<blocks_for(count), THREADS>>>(dx, x, bias, dy, count, columns);
}
