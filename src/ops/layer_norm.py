"""Layer normalisation (Ba et al., 2016)."""

from __future__ import annotations

import jittor as jt

from ops.native import run, wants_plain

_NORM = r"""
    #pragma omp parallel for
    for (int n = 0; n < in0_shape0; n++) {
        const int C = in0_shape1;
        const float* x = in0_p + (int64)n * C;
        float* y = out0_p + (int64)n * C;
        float mean = 0, variance = 0;
        for (int c = 0; c < C; c++) mean += x[c];
        mean /= C;
        for (int c = 0; c < C; c++) variance += (x[c] - mean) * (x[c] - mean);
        float scale = 1 / std::sqrt(variance / C + epsilon);
        for (int c = 0; c < C; c++) y[c] = (x[c] - mean) * scale * in1_p[c] + in2_p[c];
        out1_p[2 * n] = mean;
        out1_p[2 * n + 1] = scale;
    }
"""
_GRAD_X = r"""
    #pragma omp parallel for
    for (int n = 0; n < in0_shape0; n++) {
        const int C = in0_shape1;
        const float *x = in0_p + (int64)n * C, *dy = in3_p + (int64)n * C, *w = in1_p;
        float* dx = out0_p + (int64)n * C;
        float mean = in2_p[2 * n], scale = in2_p[2 * n + 1], sum = 0, dot = 0;
        for (int c = 0; c < C; c++) {
            sum += dy[c] * w[c];
            dot += dy[c] * w[c] * (x[c] - mean);
        }
        sum /= C;
        dot *= scale * scale / C;
        for (int c = 0; c < C; c++) dx[c] = scale * (dy[c] * w[c] - sum - (x[c] - mean) * dot);
    }
"""
_GRAD_WEIGHTS = r"""
    #pragma omp parallel for
    for (int block = 0; block < in0_shape1; block += 16) {  // a cache line of columns a time
        const int C = in0_shape1, end = std::min(block + 16, C);
        for (int c = block; c < end; c++) out0_p[c] = out1_p[c] = 0;
        for (int n = 0; n < in0_shape0; n++)
            for (int c = block; c < end; c++) {
                float dy = in2_p[(int64)n * C + c];
                out0_p[c] += dy * (in0_p[(int64)n * C + c] - in1_p[2 * n]) * in1_p[2 * n + 1];
                out1_p[c] += dy;
            }
    }
"""
# A block for each row; for the weights' gradients one for each 32 columns, 8 threads a column.
_KERNELS = r"""
    __global__ static void norm(const float* in, const float* weight, const float* bias, int C,
                                float epsilon, float* out, float* moments) {
        const int n = blockIdx.x;
        const float* x = in + (int64_t)n * C;
        float sum = 0, squares = 0;
        for (int c = threadIdx.x; c < C; c += THREADS) sum += x[c];
        const float mean = sum_of(sum) / C;
        for (int c = threadIdx.x; c < C; c += THREADS) squares += (x[c] - mean) * (x[c] - mean);
        const float scale = 1 / sqrtf(sum_of(squares) / C + epsilon);
        for (int c = threadIdx.x; c < C; c += THREADS)
            out[(int64_t)n * C + c] = (x[c] - mean) * scale * weight[c] + bias[c];
        if (threadIdx.x) return;
        moments[2 * n] = mean;
        moments[2 * n + 1] = scale;
    }
    __global__ static void grad_norm(const float* in, const float* w, const float* moments,
                                     const float* grad, int C, float* grad_in) {
        const int n = blockIdx.x;
        const float *x = in + (int64_t)n * C, *dy = grad + (int64_t)n * C;
        const float mean = moments[2 * n], scale = moments[2 * n + 1];
        float sum = 0, dot = 0;
        for (int c = threadIdx.x; c < C; c += THREADS) {
            sum += dy[c] * w[c];
            dot += dy[c] * w[c] * (x[c] - mean);
        }
        sum = sum_of(sum) / C;
        dot = sum_of(dot) * scale * scale / C;
        for (int c = threadIdx.x; c < C; c += THREADS)
            grad_in[(int64_t)n * C + c] = scale * (dy[c] * w[c] - sum - (x[c] - mean) * dot);
    }
    __global__ static void grad_weights(const float* x, const float* moments, const float* grad,
                                        int N, int C, float* grad_weight, float* grad_bias) {
        const int c = blockIdx.x * COLUMNS + threadIdx.x % COLUMNS;
        float weight = 0, bias = 0;
        for (int n = threadIdx.x / COLUMNS; n < N && c < C; n += THREADS / COLUMNS) {
            const float dy = grad[(int64_t)n * C + c];
            weight += dy * (x[(int64_t)n * C + c] - moments[2 * n]) * moments[2 * n + 1];
            bias += dy;
        }
        weight = sum_of(weight, COLUMNS);
        bias = sum_of(bias, COLUMNS);
        if (threadIdx.x >= COLUMNS || c >= C) return;
        grad_weight[c] = weight;
        grad_bias[c] = bias;
    }
"""
_CUDA = (_KERNELS, r"""
    norm<<<in0_shape0, THREADS>>>(in0_p, in1_p, in2_p, in0_shape1, epsilon, out0_p, out1_p);
""")
_GRAD_X_CUDA = (_KERNELS, r"""
    grad_norm<<<in0_shape0, THREADS>>>(in0_p, in1_p, in2_p, in3_p, in0_shape1, out0_p);
""")
_GRAD_WEIGHTS_CUDA = (_KERNELS, r"""
    grad_weights<<<(in0_shape1 + COLUMNS - 1) / COLUMNS, THREADS>>>(
        in0_p, in1_p, in2_p, in0_shape0, in0_shape1, out0_p, out1_p);
""")


class _LayerNorm(jt.Function):
    def execute(self, x, weight, bias, epsilon):
        y, moments = run([x.shape, (x.shape[0], 2)], [x, weight, bias], _NORM, cuda=_CUDA,
                         epsilon=float(epsilon))
        self.saved = x, weight, moments
        return y

    def grad(self, grad_y):
        x, weight, moments = self.saved
        grad_x = run(x.shape, [x, weight, moments, grad_y], _GRAD_X, cuda=_GRAD_X_CUDA)
        grad_weight, grad_bias = run([weight.shape, weight.shape], [x, moments, grad_y],
                                     _GRAD_WEIGHTS, cuda=_GRAD_WEIGHTS_CUDA)
        return grad_x, grad_weight, grad_bias, None


def layer_norm(x: jt.Var, weight: jt.Var, bias: jt.Var, epsilon: float) -> jt.Var:
    """Each row of x (N, C) to mean 0 and variance 1, then times weight (C,) plus bias (C,)."""
    if wants_plain():
        return plain_layer_norm(x, weight, bias, epsilon)
    return _LayerNorm.apply(x, weight, bias, epsilon)


def plain_layer_norm(x: jt.Var, weight: jt.Var, bias: jt.Var, epsilon: float) -> jt.Var:
    """:func:`layer_norm` in Jittor's own operators."""
    centred = x - x.mean(dim=-1, keepdims=True)
    variance = (centred * centred).mean(dim=-1, keepdims=True)  # (N, 1)
    return centred / jt.sqrt(variance + epsilon) * weight + bias
