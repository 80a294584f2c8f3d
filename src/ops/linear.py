"""Linear layers with few rows and large weights.

oneDNN's matrix product, which Jittor calls, copies the whole weight into its kernel's memory order
in each call: with 100 rows a large part of the time, with 10 rows nearly all of it. gemm.h copies
the weight block by block while it multiplies, or takes it from :func:`pack_weight` in that order.
"""

from __future__ import annotations

from dataclasses import dataclass

import jittor as jt
import numpy as np

from ops.matmul import matmul
from ops.native import run

# How many numbers a word of 32 bits holds, and the layout of gemm.h, by precision.
_PACKED = {"float32": (1, "PACKED"), "bf16": (2, "PACKED_BFLOAT16"), "int8": (4, "PACKED_INT8")}


@dataclass(frozen=True)
class PackedWeight:
    """A matrix (n_in, n_out) that is not trained, as :func:`linear` multiplies it fastest.

    On the CPU, ``words`` has the memory order of gemm.h and 32 bits a number in float32, 16 in bf16
    and 8 in int8; on CUDA it is the matrix itself, in float32 or bfloat16. ``transposed`` says that
    it was given as (n_out, n_in). NumPy makes an array of that shape of it, but not of int8.
    ``layout`` is gemm.h's name for how it is multiplied, empty on CUDA.
    """

    words: jt.Var
    n_in: int
    n_out: int
    precision: str
    transposed: bool
    layout: str

    @property
    def shape(self) -> tuple[int, int]:
        return (self.n_out, self.n_in) if self.transposed else (self.n_in, self.n_out)

    @property
    def size(self) -> int:
        return self.n_in * self.n_out

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        if jt.flags.use_cuda:
            return self.words.float32().numpy()
        columns = packed_columns(self, jt.arange(self.n_out)).numpy()  # (n_out, n_in)
        return columns if self.transposed else np.ascontiguousarray(columns.T)


def linear(x: jt.Var, weight: jt.Var | PackedWeight, bias: jt.Var | None = None,
           residual: jt.Var | None = None, transposed: bool = False) -> jt.Var:
    """x W, plus bias (n_out,) and residual (N, n_out) if given -> (N, n_out); all float32.

    x (N, n_in); weight W (n_in, n_out), or (n_out, n_in) if ``transposed``. A packed weight has no
    gradient. In bf16, sums are float32, and x is rounded to bfloat16 where the processor multiplies
    bfloat16s; on CUDA sums are rounded, too, unless the weight is ``transposed``. In int8, products
    are of bytes, with a scale for each row of x and each column of W, and sums are exact.
    """
    if jt.flags.use_cuda:
        if isinstance(weight, PackedWeight):
            weight, transposed = weight.words, weight.transposed
            if transposed:  # the output head: logits in bfloat16 would be wrong by tenths
                weight = weight.float32()
        return plain_linear(x, weight, bias, residual, transposed)
    if isinstance(weight, PackedWeight):
        return _PackedLinear.apply(x, weight, bias, residual)
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


class _PackedLinear(jt.Function):
    def execute(self, x, weight, bias, residual):
        self.weight = weight
        self.has_bias, self.has_residual = bias is not None, residual is not None
        return _product(x, weight.words, weight.n_out, weight.layout, bias, residual)

    def grad(self, dy):
        weight = self.weight
        dx, = run("linear", f"grad_linear_x<gemm::{weight.layout}>",
                  {"dx": (dy.shape[0], weight.n_in)},
                  {"dy (rows, n_out)": dy, "weight": weight.words}, n_in=weight.n_in)
        return (dx, None, dy.sum(dim=0) if self.has_bias else None,
                dy if self.has_residual else None)


def _product(x: jt.Var, weight: jt.Var, n_out: int, layout: str, bias: jt.Var | None = None,
             residual: jt.Var | None = None) -> jt.Var:
    """x (N, n_in) times a weight of that layout in gemm.h, plus what is given -> (N, n_out)."""
    return run("linear", f"linear<gemm::{layout}>", {"y (rows, n_out)": (x.shape[0], n_out)},
               {"x (_, n_in)": x, "weight": weight, "bias": bias, "residual": residual})[0]


def plain_linear(x: jt.Var, weight: jt.Var, bias: jt.Var | None = None,
                 residual: jt.Var | None = None, transposed: bool = False) -> jt.Var:
    """:func:`linear` in Jittor's own operators; products with a weight in bfloat16 are in it."""
    y = matmul(x.cast(weight.dtype), weight, transpose_b=transposed).float32()  # (N, n_out)
    for addend in (bias, residual):
        y = y if addend is None else y + addend
    return y


def pack_weight(weight: jt.Var, transposed: bool = False, precision: str = "float32",
                many_rows: bool = False) -> PackedWeight:
    """W (n_in, n_out), or (n_out, n_in) if ``transposed``, in float32, bf16 or int8.

    With ``many_rows``, products of at least 128 rows in float32 (gradients: of 32) are computed
    from three bfloat16 terms of each number where the processor has tile registers. They take less
    time and are not less exact, but their last digits then depend on the number of rows, which
    those of beam search must not.
    """
    n_out, n_in = weight.shape if transposed else weight.shape[::-1]
    if jt.flags.use_cuda:
        words = weight.bfloat16().stop_grad() if precision == "bf16" else weight
        return PackedWeight(words, n_in, n_out, precision, transposed, "")
    numbers, packed = _PACKED[precision]
    product = "PACKED_IN_TERMS" if many_rows and precision == "float32" else packed
    padded = -(-n_out // 32) * 32  # gemm.h's NR is 16 or 32
    rows = n_in if numbers == 1 else -(-n_in // (16 * numbers)) * 16  # as gemm.h's words_of
    rows += 2 * (precision == "int8")  # scales and sums of the columns
    layout = "COLUMNS" if transposed else "ROWS"
    words, = run("linear", f"pack_weight<gemm::{layout}, gemm::{packed}>",
                 {"packed": (padded * rows + 16,)}, {"weight": weight},  # linear.h aligns them
                 dtypes=["float32" if numbers == 1 else "int32"], n_out=n_out, n_in=n_in)
    return PackedWeight(words.stop_grad(), n_in, n_out, precision, transposed, product)


def packed_columns(weight: PackedWeight, which: jt.Var) -> jt.Var:
    """The columns ``which`` (N,) int32 of a weight as rows (N, n_in) float32.

    Raises ValueError for a weight in int8.
    """
    if weight.precision == "int8":
        raise ValueError("a weight in int8 is only multiplied")
    if jt.flags.use_cuda:
        rows = weight.words[which] if weight.transposed else weight.words[:, which].transpose()
        return rows.float32()
    return run("linear", f"packed_columns<gemm::{_PACKED[weight.precision][1]}>",
               {"y (rows, n_in)": (which.shape[0], weight.n_in)},
               {"weight": weight.words, "which": which})[0]
