// Layer normalisation, and its gradients. y, x, dx, dy: (rows, columns); weight, bias: (columns);
// moments: (rows, 2), the mean of each row and 1 / its standard deviation.

#include "device.h"

KERNEL void layer_norm(float* y, float* moments, const float* x, const float* weight,
        const float* bias, int rows, int columns, float epsilon) {
    FOR_ROWS (n, rows) {
        const float* xn = x + (int64_t)n * columns;
        float* yn = y + (int64_t)n * columns;
        float mean = 0, variance = 0;
        FOR_COLUMNS (c, columns) mean += xn[c];
        mean = sum_of(mean) / columns;
        FOR_COLUMNS (c, columns) variance += (xn[c] - mean) * (xn[c] - mean);
        const float scale = 1 / std::sqrt(sum_of(variance) / columns + epsilon);
        FOR_COLUMNS (c, columns) yn[c] = (xn[c] - mean) * scale * weight[c] + bias[c];
        if (FIRST_THREAD) {
            moments[2 * n] = mean;
            moments[2 * n + 1] = scale;
        }
    }
}

KERNEL void grad_layer_norm_x(float* dx, const float* x, const float* weight, const float* moments,
        const float* dy, int rows, int columns) {
    FOR_ROWS (n, rows) {
        const float *xn = x + (int64_t)n * columns, *dyn = dy + (int64_t)n * columns;
        float* dxn = dx + (int64_t)n * columns;
        const float mean = moments[2 * n], scale = moments[2 * n + 1];
        float sum = 0, dot = 0;
        FOR_COLUMNS (c, columns) {
            sum += dyn[c] * weight[c];
            dot += dyn[c] * weight[c] * (xn[c] - mean);
        }
        sum = sum_of(sum) / columns;
        dot = sum_of(dot) * (scale * scale / columns);
        FOR_COLUMNS (c, columns) dxn[c] = scale * (dyn[c] * weight[c] - sum - (xn[c] - mean) * dot);
    }
}

#ifndef __CUDACC__
static void grad_layer_norm_parameters(float* dweight, float* dbias, const float* x,
        const float* moments, const float* dy, int rows, int columns) {
    #pragma omp parallel for
    for (int block = 0; block < columns; block += 16) {  // one cache line of columns at a time
        const int end = block + 16 < columns ? block + 16 : columns;
        for (int c = block; c < end; c++) dweight[c] = dbias[c] = 0;
        for (int n = 0; n < rows; n++)
            for (int c = block; c < end; c++) {
                const int64_t i = (int64_t)n * columns + c;
                dweight[c] += dy[i] * (x[i] - moments[2 * n]) * moments[2 * n + 1];
                dbias[c] += dy[i];
            }
    }
}
#endif
