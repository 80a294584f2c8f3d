"""GELU (Hendrycks & Gimpel, 2016) of a linear layer's output, with the layer's bias.

The tanh approximation that GPT-2 was trained with.
"""

from __future__ import annotations

import math

import jittor as jt

from ops.native import run, wants_plain


def bias_gelu(x: jt.Var, bias: jt.Var) -> jt.Var:
    """GELU of x (N, C) + bias (C,) -> (N, C)."""
    return plain_bias_gelu(x, bias) if wants_plain() else _BiasGelu.apply(x, bias)


class _BiasGelu(jt.Function):
    def execute(self, x, bias):
        self.saved = x, bias
        y, = run("bias_gelu", "bias_gelu(y, x, bias, rows, columns)", {"y": x.shape},
                 {"x": x, "bias": bias}, rows=x.shape[0], columns=x.shape[1])
        return y

    def grad(self, dy):
        x, bias = self.saved
        dx, = run("bias_gelu", "grad_bias_gelu(dx, x, bias, dy, rows, columns)", {"dx": x.shape},
                  {"x": x, "bias": bias, "dy": dy}, rows=x.shape[0], columns=x.shape[1])
        return dx, dx.sum(dim=0)


def plain_bias_gelu(x: jt.Var, bias: jt.Var) -> jt.Var:
    """:func:`bias_gelu` in Jittor's own operators."""
    x = x + bias
    return 0.5 * x * (1 + jt.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))
