"""The fastest matrix products that PyTorch offers, with which bench_train.py compares training."""

from __future__ import annotations

import time
from statistics import median

import torch

from serving import serve
from torch_side import TorchSide

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


class Side(TorchSide):
    packages = ("torch",)

    @torch.no_grad()
    def products(self, shapes: list[tuple[int, int, int]], precisions: list[str],
                 repeats: int) -> dict[str, list[float]]:
        """Milliseconds of each (m, k) x (k, n) product: the median of the fastest function."""
        return {precision: [min(median(self.times(function, repeats))
                                for function in self.functions(m, k, n, DTYPES[precision]))
                            for m, k, n in shapes] for precision in precisions}

    def functions(self, m: int, k: int, n: int, dtype: torch.dtype) -> list:
        a, b = (torch.rand(shape, device=self.device).to(dtype) for shape in ((m, k), (k, n)))
        found = [lambda: torch.mm(a, b)]
        if self.device.type == "cpu":  # oneDNN, the weight in the order of its kernel
            packed = torch.ops.mkldnn._reorder_linear_weight(b.T.contiguous(), m)
            found.append(lambda: torch.ops.mkldnn._linear_pointwise(
                a, packed, None, "none", [], ""))
        return found

    def times(self, function, repeats: int) -> list[float]:
        found = []
        for _ in range(repeats + 1):
            self.synchronize()
            started = time.perf_counter()
            function()
            self.synchronize()
            found.append((time.perf_counter() - started) * 1000)
        return found[1:]


if __name__ == "__main__":
    serve(Side())
