// See layer_norm.h. One block computes one row, or the parameters' gradients of 32 columns, with 8
// threads a column.

#include "block.cuh"

__global__ static void layer_norm(float* y, float* moments, const float* x, const float* weight,
        const float* bias, int rows, int columns, float epsilon) {
    const int n = blockIdx.x;
    const float* xn = x + (int64_t)n * columns;
    float sum = 0, squares = 0;
    for (int c = threadIdx.x; c < columns; c += THREADS) sum += xn[c];
    const float mean = sum_of(sum) / columns;
    for (int c = threadIdx.x; c < columns; c += THREADS) squares += (xn[c] - mean) * (xn[c] - mean);
    const float scale = 1 / sqrtf(sum_of(squares) / columns + epsilon);
    for (int c = threadIdx.x; c < columns; c += THREADS)
        y[(int64_t)n * columns + c] = (xn[c] - mean) * scale * weight[c] + bias[c];
    if (threadIdx.x) return;
    moments[2 * n] = mean;
    moments[2 * n + 1] = scale;
}

__global__ static void grad_layer_norm_x(float* dx, const float* x, const float* weight,
        const float* moments, const float* dy, int rows, int columns) {
    const int n = blockIdx.x;
    const float *xn = x + (int64_t)n * columns, *dyn = dy + (int64_t)n * columns;
    const float mean = moments[2 * n], scale = moments[2 * n + 1];
    float sum = 0, dot = 0;
    for (int c = threadIdx.x; c < columns; c += THREADS) {
        sum += dyn[c] * weight[c];
        dot += dyn[c] * weight[c] * (xn[c] - mean);
    }
    sum = sum_of(sum) / columns;
    dot = sum_of(dot) * scale * scale / columns;
    for (int c = threadIdx.x; c < columns; c += THREADS)
        dx[(int64_t)n * columns + c] = scale * (dyn[c] * weight[c] - sum - (xn[c] - mean) * dot);
}

__global__ static void grad_layer_norm_parameters(float* dweight, float* dbias, const float* x,
        const float* moments, const float* dy, int rows, int columns) {
    const int c = blockIdx.x * COLUMNS + threadIdx.x % COLUMNS;
    float weight = 0, bias = 0;
    for (int n = threadIdx.x / COLUMNS; n < rows && c < columns; n += THREADS / COLUMNS) {
        const int64_t i = (int64_t)n * columns + c;
        weight += dy[i] * (x[i] - moments[2 * n]) * moments[2 * n + 1];
        bias += dy[i];
    }
    weight = sum_of(weight, COLUMNS);
    bias = sum_of(bias, COLUMNS);
    if (threadIdx.x >= COLUMNS || c >= columns) return;
    dweight[c] = weight;
    dbias[c] = bias;
}
