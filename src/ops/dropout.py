"""Dropout (Srivastava et al., 2014) with the same mask on every device."""

import jittor as jt

from ops.native import run


def dropout(x: jt.Var, p: float, seed: int) -> jt.Var:
    """Sets each element of x to 0 with probability p and multiplies the rest by 1 / (1 - p).

    x is float32 of any shape, p in [0, 1). The mask depends on ``seed`` (int32 >= 0) and on the
    element's position alone. There is no plain twin: Jittor's own random numbers differ between
    devices.
    """
    return _Dropout.apply(x, float(p), seed)


class _Dropout(jt.Function):
    def execute(self, x, p, seed):
        self.p, self.seed = p, seed
        return self._masked(x)

    def grad(self, dy):
        return self._masked(dy), None, None

    def _masked(self, x):
        return run("dropout", "dropout", {"y": x.shape}, {"x": x}, "blocks_for(count), THREADS",
                   count=x.numel(), seed=self.seed, p=self.p)[0]
