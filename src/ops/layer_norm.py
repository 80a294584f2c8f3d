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
        y, moments = run(
            "layer_norm", "layer_norm(y, moments, x, weight, bias, rows, columns, epsilon)",
            {"y": x.shape, "moments": (rows, 2)}, {"x": x, "weight": weight, "bias": bias},
            rows=rows, columns=columns, epsilon=epsilon)
        self.saved = x, weight, moments
        return y

    def grad(self, dy):
        x, weight, moments = self.saved
        rows, columns = x.shape
        dx, = run(
            "layer_norm", "grad_layer_norm_x(dx, x, weight, moments, dy, rows, columns)",
            {"dx": x.shape}, {"x": x, "weight": weight, "moments": moments, "dy": dy},
            rows=rows, columns=columns)
        dweight, dbias = run(
            "layer_norm",
            "grad_layer_norm_parameters(dweight, dbias, x, moments, dy, rows, columns)",
            {"dweight": weight.shape, "dbias": weight.shape},
            {"x": x, "moments": moments, "dy": dy}, rows=rows, columns=columns)
        return dx, dweight, dbias, None


def plain_layer_norm(x: jt.Var, weight: jt.Var, bias: jt.Var, epsilon: float) -> jt.Var:
    """:func:`layer_norm` in Jittor's own operators."""
    centred = x - x.mean(dim=-1, keepdims=True)  # (N, C)
    variance = (centred * centred).mean(dim=-1, keepdims=True)  # (N, 1)
    return centred / jt.sqrt(variance + epsilon) * weight + bias
