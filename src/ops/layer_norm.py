"""Layer normalisation (Ba et al., 2016)."""

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
        y, moments = run("layer_norm", "layer_norm", {"y": x.shape, "moments": (x.shape[0], 2)},
                         {"x (rows, columns)": x, "weight": weight, "bias": bias}, "rows, THREADS",
                         epsilon=epsilon)
        self.saved = x, weight, moments
        return y

    def grad(self, dy):
        x, weight, moments = self.saved
        dx, = run("layer_norm", "grad_layer_norm_x", {"dx": x.shape},
                  {"x (rows, columns)": x, "weight": weight, "moments": moments, "dy": dy},
                  "rows, THREADS")
        dweight, dbias = run("layer_norm", "grad_layer_norm_parameters",
                             {"dweight": weight.shape, "dbias": weight.shape},
                             {"x (rows, columns)": x, "moments": moments, "dy": dy},
                             "blocks_for(columns, COLUMNS), THREADS")
        return dx, dweight, dbias, None


def plain_layer_norm(x: jt.Var, weight: jt.Var, bias: jt.Var, epsilon: float) -> jt.Var:
    """:func:`layer_norm` in Jittor's own operators."""
    centred = x - x.mean(dim=-1, keepdims=True)  # (N, C)
    variance = (centred * centred).mean(dim=-1, keepdims=True)  # (N, 1)
    return centred / jt.sqrt(variance + epsilon) * weight + bias
