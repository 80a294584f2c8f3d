"""LoRA's second product (Hu et al., 2021), from rank r to the width of the enabled projections."""

import jittor as jt

from ops.matmul import matmul
from ops.native import constant, run, wants_plain


def lora_up(y: jt.Var, bias: jt.Var, low: jt.Var, lora_B: jt.Var, scaling: float,
            columns: list[int]) -> jt.Var:
    """y (N, C) + bias (C,) + scaling * low lora_B^T in the columns of the enabled projections.

    low (N, G * r) and lora_B (G * width, r) hold G groups, one for each enabled projection: the
    product (N, width) of group g is added from column ``columns[g]`` on. All float32 -> (N, C).
    """
    if wants_plain():
        return plain_lora_up(y, bias, low, lora_B, scaling, columns)
    return _LoRAUp.apply(y, bias, low, lora_B, float(scaling), columns)


class _LoRAUp(jt.Function):
    def execute(self, y, bias, low, lora_B, scaling, columns):
        self.first = constant(tuple(columns))
        self.saved = low, lora_B
        height, rank = lora_B.shape
        self.numbers = {"rank": rank, "width": height // len(columns), "scaling": scaling}
        return self._run("lora_up", {"z (rows, columns)": y.shape},
                         "blocks_for(rows * columns), THREADS",
                         {"y": y, "bias": bias, "low": low, "lora_B": lora_B})

    def grad(self, dz):
        low, lora_B = self.saved
        dlow = self._run("grad_lora_up_low", {"dlow": low.shape}, "rows, THREADS",
                         {"dz (rows, columns)": dz, "lora_B": lora_B})
        dB = self._run("grad_lora_up_B", {"dB": lora_B.shape},
                       "dim3(blocks_for(groups * width, COLUMNS), rank), THREADS",
                       {"dz (rows, columns)": dz, "low": low})
        return dz, dz.sum(dim=0), dlow, dB, None, None

    def _run(self, function, output, launch, inputs):
        return run("lora_up", function, output, {**inputs, "first (groups)": self.first}, launch,
                   **self.numbers)[0]


def plain_lora_up(y: jt.Var, bias: jt.Var, low: jt.Var, lora_B: jt.Var, scaling: float,
                  columns: list[int]) -> jt.Var:
    """:func:`lora_up` in Jittor's own operators."""
    rank, width = lora_B.shape[1], lora_B.shape[0] // len(columns)
    parts, end = [], 0
    for group, column in enumerate(columns):
        if column > end:
            parts.append(jt.zeros((y.shape[0], column - end)))
        own = low[:, group * rank:(group + 1) * rank]  # (N, r)
        own_B = lora_B[group * width:(group + 1) * width]  # (width, r)
        parts.append(matmul(own, own_B, transpose_b=True))  # (N, width)
        end = column + width
    if end < y.shape[1]:
        parts.append(jt.zeros((y.shape[0], y.shape[1] - end)))
    return y + bias + jt.concat(parts, dim=1) * scaling
