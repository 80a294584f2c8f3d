"""Dropout (Srivastava et al., 2014) with the same mask on every device."""

from typing import Sequence

import jittor as jt
import numpy as np

from ops.native import constant, run, upload


def dropout(x: jt.Var, p: float, seeds: Sequence[int], starts: Sequence[int] = (0,)) -> jt.Var:
    """Sets each element of x to 0 with probability p and multiplies the rest by 1 / (1 - p).

    x (N, C) float32, p in [0, 1). The rows from ``starts[i]`` on, up to the next start, are part i;
    ``starts`` rise from 0. A part's mask is the one that it would get alone: it depends on
    ``seeds[i]`` (int32 >= 0) and on the element's position in the part. There is no plain twin:
    Jittor's own random numbers differ between devices.
    """
    if len(seeds) != len(starts):
        raise ValueError(f"{len(seeds)} seeds for {len(starts)} parts")
    return _Dropout.apply(x, float(p), seeds, starts)


class _Dropout(jt.Function):
    def execute(self, x, p, seeds, starts):
        self.p = p
        self.parts = {"starts (parts)": constant(tuple(starts)),
                      "seeds": upload(np.array(seeds, np.int32))}
        return self._masked(x)

    def grad(self, dy):
        return self._masked(dy), None, None, None

    def _masked(self, x):
        return run("dropout", "dropout", {"y (rows, columns)": x.shape}, {"x": x, **self.parts},
                   "rows, THREADS", p=self.p)[0]
