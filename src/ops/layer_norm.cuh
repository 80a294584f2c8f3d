// layer_norm.h on a GPU. One block computes one row, or the parameters' gradients of 32 columns,
// with 8 threads a column.

#include "layer_norm.h"

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
