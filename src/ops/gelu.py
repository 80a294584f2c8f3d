"""GELU (Hendrycks & Gimpel, 2016), the tanh approximation that GPT-2 was trained with."""

from __future__ import annotations

import math

import jittor as jt

from ops.native import run, wants_plain

# 0.5 (1 + tanh u) is the logistic function of 2u, whose exp the compiler vectorises.
_HEADER = r"""
    static inline float gate(float x) {
        float u = 0.7978845608f * (x + 0.044715f * x * x * x);
        return 1 / (1 + std::exp(std::min(-2 * u, 80.f)));
    }
"""
# A thread for each number.
_KERNELS = r"""
    __device__ static float gate(float x) {
        const float u = 0.7978845608f * (x + 0.044715f * x * x * x);
        return 1 / (1 + expf(fminf(-2 * u, 80.f)));
    }
    __global__ static void gelu(const float* in, const float* bias, int64_t count, int C,
                                float* out) {
        const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
        if (i >= count) return;
        const float x = in[i] + bias[i % C];
        out[i] = x * gate(x);
    }
    __global__ static void grad_gelu(const float* in, const float* bias, const float* grad,
                                     int64_t count, int C, float* grad_in) {
        const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
        if (i >= count) return;
        const float x = in[i] + bias[i % C], g = gate(x);
        const float slope = 1.5957691216f * (1 + 0.134145f * x * x);
        grad_in[i] = grad[i] * (g + x * g * (1 - g) * slope);
    }
"""
_CUDA = (_KERNELS, r"""
    gelu<<<blocks_for(in0->num), THREADS>>>(in0_p, in1_p, in0->num, in0_shape1, out0_p);
""")
_GRAD_CUDA = (_KERNELS, r"""
    grad_gelu<<<blocks_for(in0->num), THREADS>>>(in0_p, in1_p, in2_p, in0->num, in0_shape1,
                                                 out0_p);
""")
_GELU = r"""
    const int C = in0_shape1;
    #pragma omp parallel for
    for (int n = 0; n < in0_shape0; n++)
        for (int c = 0; c < C; c++) {
            float x = in0_p[(int64)n * C + c] + in1_p[c];
            out0_p[(int64)n * C + c] = x * gate(x);
        }
"""
_GRAD = r"""
    const int C = in0_shape1;
    #pragma omp parallel for
    for (int n = 0; n < in0_shape0; n++)
        for (int c = 0; c < C; c++) {
            int64 i = (int64)n * C + c;
            float x = in0_p[i] + in1_p[c], g = gate(x);
            float slope = 1.5957691216f * (1 + 0.134145f * x * x);
            out0_p[i] = in2_p[i] * (g + x * g * (1 - g) * slope);
        }
"""


class _BiasGelu(jt.Function):
    def execute(self, x, bias):
        self.saved = x, bias
        return run(x.shape, [x, bias], _GELU, _HEADER, _CUDA)

    def grad(self, grad):
        grad_x = run(grad.shape, [*self.saved, grad], _GRAD, _HEADER, _GRAD_CUDA)
        return grad_x, grad_x.sum(dim=0)


def bias_gelu(x: jt.Var, bias: jt.Var) -> jt.Var:
    """GELU of x (N, C) + bias (C,)."""
    return plain_bias_gelu(x, bias) if wants_plain() else _BiasGelu.apply(x, bias)


def plain_bias_gelu(x: jt.Var, bias: jt.Var) -> jt.Var:
    """:func:`bias_gelu` in Jittor's own operators."""
    x = x + bias
    return 0.5 * x * (1 + jt.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))
