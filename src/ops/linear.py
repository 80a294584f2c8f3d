"""Linear layers on the CPU: few rows, large weights.

oneDNN's product, which Jittor calls, brings the whole weight into the order its kernel wants before
it multiplies, at each call anew: for a hundred rows that is much of the time, for ten nearly all
of it. gemm.h brings it in order piece by piece while it multiplies, or takes it from
:func:`pack_weight` in order for good.
"""

from __future__ import annotations

from dataclasses import dataclass

import jittor as jt

from ops.native import GEMM, run


@dataclass(frozen=True)
class PackedWeight:
    """A weight in the order in which :func:`linear` multiplies few rows fastest."""

    numbers: jt.Var
    n_out: int


def _product(x: jt.Var, weight: jt.Var, n_out: int, layout: str, bias: jt.Var | None = None,
             residual: jt.Var | None = None) -> jt.Var:
    """x (N, K) times a weight of that layout in gemm.h, plus bias (n_out,), residual (N, n_out)."""
    inputs, added = [x, weight], []
    for where, addend in (("n + i", bias), ("(int64)m * out0_shape1 + n + i", residual)):
        if addend is not None:
            added.append(f"in{len(inputs)}_p[{where}]")
            inputs.append(addend)
    finish = "gemm::Nothing()"
    if added:
        finish = ("[&](int m, int n, int count, float* row) {"
                  f" for (int i = 0; i < count; i++) row[i] += {' + '.join(added)}; }}")
    return run((x.shape[0], n_out), inputs, f"""
        gemm::multiply<gemm::{layout}>(in0_shape0, out0_shape1, in0_shape1, in0_p, in1_p, out0_p,
                                       {finish});
    """, GEMM)


class _Linear(jt.Function):
    def execute(self, x, weight, bias, residual, transposed):
        self.saved = x, weight, transposed
        self.has_bias, self.has_residual = bias is not None, residual is not None
        return _product(x, weight, weight.shape[0 if transposed else 1],
                        "COLUMNS" if transposed else "ROWS", bias, residual)

    def grad(self, grad):
        x, weight, transposed = self.saved
        grad_x = _product(grad, weight, x.shape[1], "ROWS" if transposed else "COLUMNS")
        # Computed only where they are asked for: Jittor is lazy.
        a, b = (grad, x) if transposed else (x, grad)
        return (grad_x, jt.matmul(a.transpose(), b), grad.sum(dim=0) if self.has_bias else None,
                grad if self.has_residual else None, None)


def linear(x: jt.Var, weight: jt.Var | PackedWeight, bias: jt.Var | None = None,
           residual: jt.Var | None = None, transposed: bool = False) -> jt.Var:
    """x W, plus bias (n_out,) and residual (N, n_out) if given -> (N, n_out).

    x (N, n_in); weight W (n_in, n_out), or (n_out, n_in) where ``transposed``. A packed weight
    must not be asked for gradients, nor its input.
    """
    if isinstance(weight, PackedWeight):
        return _product(x, weight.numbers, weight.n_out, "PACKED", bias, residual)
    if jt.flags.use_cuda:
        return plain_linear(x, weight, bias, residual, transposed)
    return _Linear.apply(x, weight, bias, residual, transposed)


def plain_linear(x: jt.Var, weight: jt.Var, bias: jt.Var | None = None,
                 residual: jt.Var | None = None, transposed: bool = False) -> jt.Var:
    """:func:`linear` in Jittor's own operators."""
    y = jt.nn.matmul_transpose(x, weight) if transposed else jt.matmul(x, weight)
    for addend in (bias, residual):
        y = y if addend is None else y + addend
    return y


def pack_weight(weight: jt.Var, transposed: bool = False) -> PackedWeight:
    """W (n_in, n_out), or (n_out, n_in) where ``transposed``, packed at once; for the CPU."""
    n_out, n_in = weight.shape if transposed else weight.shape[::-1]
    padded = -(-n_out // 32) * 32  # gemm.h's NR is 16 or 32
    numbers = run((padded * n_in,), [weight], f"""
        gemm::pack<gemm::{"COLUMNS" if transposed else "ROWS"}>({n_out}, {n_in}, in0_p, out0_p);
    """, GEMM)
    numbers.sync()
    return PackedWeight(numbers, n_out)
