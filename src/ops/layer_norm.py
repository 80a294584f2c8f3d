"""Layer normalisation (Ba et al., 2016)."""

from __future__ import annotations

import jittor as jt

from ops.native import run, wants_plain


def layer_norm(x: jt.Var, weight: jt.Var, bias: jt.Var, epsilon: float) -> jt.Var:
    """Each row of x (N, C) scaled to mean 0 and variance 1, times weight (C,), plus bias (C,).

    All float32. ``epsilon`` is added to the variance.
    """
    if wants_plain():
        return plain_layer_norm(x, weight, bias, epsilon)
    return _LayerNorm.apply(x, weight, bias, float(epsilon))


class _LayerNorm(jt.Function):
    def execute(self, x, weight, bias, epsilon):
        rows, columns = x.shape
        numbers = {"rows": rows, "columns": columns}
        y, moments = run("layer_norm", "layer_norm", {"y": x.shape, "moments": (rows, 2)},
                         {"x": x, "weight": weight, "bias": bias}, "rows, THREADS",
                         **numbers, epsilon=epsilon)
        self.saved = x, weight, moments, numbers
        return y

    def grad(self, dy):
        x, weight, moments, numbers = self.saved
        dx, = run("layer_norm", "grad_layer_norm_x", {"dx": x.shape},
                  {"x": x, "weight": weight, "moments": moments, "dy": dy}, "rows, THREADS",
                  **numbers)
        dweight, dbias = run("layer_norm", "grad_layer_norm_parameters",
                             {"dweight": weight.shape, "dbias": weight.shape},
                             {"x": x, "moments": moments, "dy": dy},
                             "blocks_for(columns, COLUMNS), THREADS", **numbers)
        return dx, dweight, dbias, None


def plain_layer_norm(x: jt.Var, weight: jt.Var, bias: jt.Var, epsilon: float) -> jt.Var:
    """:func:`layer_norm` in Jittor's own operators."""
    centred = x - x.mean(dim=-1, keepdims=True)  # (N, C)
    variance = (centred * centred).mean(dim=-1, keepdims=True)  # (N, 1)
    return centred / jt.sqrt(variance + epsilon) * weight + bias
