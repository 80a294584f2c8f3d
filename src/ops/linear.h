// Linear layers. y, residual: (rows, n_out); x: (rows, n_in); bias: (n_out); bias and residual may
// be nullptr. weight: (n_in, n_out), its transpose or packed, see gemm::Layout.

#include "gemm.h"

template <gemm::Layout layout>
static void linear(float* y, const float* x, const float* weight, const float* bias,
        const float* residual, int rows, int n_out, int n_in) {
    const auto add = [&](int m, int n, int count, float* row) {
        if (bias && residual)
            for (int i = 0; i < count; i++)
                row[i] += bias[n + i] + residual[(int64_t)m * n_out + n + i];
        else if (bias)
            for (int i = 0; i < count; i++) row[i] += bias[n + i];
        else if (residual)
            for (int i = 0; i < count; i++) row[i] += residual[(int64_t)m * n_out + n + i];
    };
    gemm::multiply<layout>(rows, n_out, n_in, x, weight, y, add);
}

template <gemm::Layout layout>
static void pack_weight(float* packed, const float* weight, int n_out, int n_in) {
    gemm::pack<layout>(n_out, n_in, weight, packed);
}
