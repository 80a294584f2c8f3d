// GELU of x + bias, and its gradient. y, x, dx, dy: (rows, columns); bias: (columns).
// On a GPU, one block computes one row.

#include "device.h"

// 0.5 (1 + tanh u) is the logistic function of 2 u, and the compiler can vectorise exp.
DEVICE float gate(float x) {
    float u = 0.7978845608f * (x + 0.044715f * x * x * x);
    return 1 / (1 + std::exp(min(-2 * u, 80.f)));
}

KERNEL void bias_gelu(float* y, const float* x, const float* bias, int rows, int columns) {
    FOR_ROWS (n, rows)
        FOR_COLUMNS (c, columns) {
            float sum = x[(int64_t)n * columns + c] + bias[c];
            y[(int64_t)n * columns + c] = sum * gate(sum);
        }
}

KERNEL void grad_bias_gelu(
        float* dx, const float* x, const float* bias, const float* dy, int rows, int columns) {
    FOR_ROWS (n, rows)
        FOR_COLUMNS (c, columns) {
            int64_t i = (int64_t)n * columns + c;
            float sum = x[i] + bias[c], g = gate(sum);
            float slope = 1.5957691216f * (1 + 0.134145f * sum * sum);
            dx[i] = dy[i] * (g + sum * g * (1 - g) * slope);
        }
}
