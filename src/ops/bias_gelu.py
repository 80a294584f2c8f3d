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
        self.saved = {"x": x, "bias": bias}
        return self._run("bias_gelu", "y", self.saved)

    def grad(self, dy):
        dx = self._run("grad_bias_gelu", "dx", {**self.saved, "dy": dy})
        return dx, dx.sum(dim=0)

    def _run(self, function, output, inputs):
        rows, columns = shape = inputs["x"].shape
        return run("bias_gelu", function, {output: shape}, inputs,
                   "rows, THREADS", rows=rows, columns=columns)[0]


def plain_bias_gelu(x: jt.Var, bias: jt.Var) -> jt.Var:
    """:func:`bias_gelu` in Jittor's own operators."""
    x = x + bias
    return 0.5 * x * (1 + jt.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))
