"""GELU (Hendrycks & Gimpel, 2016) of a linear layer's output, with the layer's bias.

The tanh approximation that GPT-2 was trained with.
"""

import math

import jittor as jt

from ops.native import run, wants_plain


def bias_gelu(x: jt.Var, bias: jt.Var) -> jt.Var:
    """GELU of x (N, C) + bias (C,) -> (N, C)."""
    return plain_bias_gelu(x, bias) if wants_plain() else _BiasGelu.apply(x, bias)


class _BiasGelu(jt.Function):
    def execute(self, x, bias):
        self.saved = {"x (rows, columns)": x, "bias": bias}
        return run("bias_gelu", "bias_gelu", {"y": x.shape}, self.saved, "rows, THREADS")[0]

    def grad(self, dy):
        dx, = run("bias_gelu", "grad_bias_gelu", {"dx": dy.shape}, {**self.saved, "dy": dy},
                  "rows, THREADS")
        return dx, dx.sum(dim=0)


def plain_bias_gelu(x: jt.Var, bias: jt.Var) -> jt.Var:
    """:func:`bias_gelu` in Jittor's own operators."""
    x = x + bias
    # 0.5 (1 + tanh u) is the logistic function of 2 u; nvcc's fast math only approximates tanh.
    return x * jt.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))
