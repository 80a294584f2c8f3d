"""Linear layers on the CPU with few rows and large weights.

oneDNN's matrix product, which Jittor calls, copies the whole weight into its kernel's memory order
in each call: with 100 rows a large part of the time, with 10 rows nearly all of it. gemm.h copies
the weight block by block while it multiplies, or takes it from :func:`pack_weight` in that order.
"""

from __future__ import annotations

from dataclasses import dataclass

import jittor as jt

from ops.matmul import matmul
from ops.native import run


@dataclass(frozen=True)
class PackedWeight:
    """A weight in the memory order in which :func:`linear` multiplies few rows fastest."""

    numbers: jt.Var
    n_out: int


def linear(x: jt.Var, weight: jt.Var | PackedWeight, bias: jt.Var | None = None,
           residual: jt.Var | None = None, transposed: bool = False) -> jt.Var:
    """x W, plus bias (n_out,) and residual (N, n_out) if given -> (N, n_out); all float32.

    x (N, n_in); weight W (n_in, n_out), or (n_out, n_in) if ``transposed``. With a packed weight
    there are no gradients.
    """
    if isinstance(weight, PackedWeight):
        return _product(x, weight.numbers, weight.n_out, "PACKED", bias, residual)
    if jt.flags.use_cuda:
        return plain_linear(x, weight, bias, residual, transposed)
    return _Linear.apply(x, weight, bias, residual, transposed)


class _Linear(jt.Function):
    def execute(self, x, weight, bias, residual, transposed):
        self.saved = x, weight, transposed
        self.has_bias, self.has_residual = bias is not None, residual is not None
        n_out, layout = (weight.shape[0], "COLUMNS") if transposed else (weight.shape[1], "ROWS")
        return _product(x, weight, n_out, layout, bias, residual)

    def grad(self, dy):
        x, weight, transposed = self.saved
        dx = _product(dy, weight, x.shape[1], "ROWS" if transposed else "COLUMNS")
        # Jittor is lazy: it computes only those gradients that are used.
        a, b = (dy, x) if transposed else (x, dy)
        return (dx, matmul(a.transpose(), b), dy.sum(dim=0) if self.has_bias else None,
                dy if self.has_residual else None, None)


def _product(x: jt.Var, weight: jt.Var, n_out: int, layout: str, bias: jt.Var | None = None,
             residual: jt.Var | None = None) -> jt.Var:
    """x (N, n_in) times a weight of that layout in gemm.h, plus what is given -> (N, n_out)."""
    return run("linear", f"linear<gemm::{layout}>", {"y (rows, n_out)": (x.shape[0], n_out)},
               {"x (_, n_in)": x, "weight": weight, "bias": bias, "residual": residual})[0]


def plain_linear(x: jt.Var, weight: jt.Var, bias: jt.Var | None = None,
                 residual: jt.Var | None = None, transposed: bool = False) -> jt.Var:
    """:func:`linear` in Jittor's own operators."""
    y = matmul(x, weight, transpose_b=transposed)  # (N, n_out)
    for addend in (bias, residual):
        y = y if addend is None else y + addend
    return y


def pack_weight(weight: jt.Var, transposed: bool = False) -> PackedWeight:
    """W (n_in, n_out), or (n_out, n_in) if ``transposed``, packed; for the CPU."""
    n_out, n_in = weight.shape if transposed else weight.shape[::-1]
    padded = -(-n_out // 32) * 32  # gemm.h's NR is 16 or 32
    layout = "COLUMNS" if transposed else "ROWS"
    numbers, = run("linear", f"pack_weight<gemm::{layout}>", {"packed": (padded * n_in,)},
                   {"weight": weight}, n_out=n_out, n_in=n_in)
    return PackedWeight(numbers, n_out)
