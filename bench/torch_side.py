"""What the sides that use PyTorch have in common, and what they import from align/."""

from __future__ import annotations

import os
import sys
import time
from importlib import metadata
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "align"))

import torch  # noqa: E402

import torch_beam  # noqa: E402
import torch_data  # noqa: E402
import torch_model  # noqa: E402
import torch_optim  # noqa: E402
import torch_train  # noqa: E402

__all__ = ["TorchSide", "batches", "torch_beam", "torch_model", "torch_optim", "torch_train"]


class TorchSide:
    """The base class of these sides.

    A side adds ``packages``, whose versions the result names, the methods ``load`` and ``search``
    and, to train, ``start_training`` and ``micro_batch() -> loss``.
    """

    def start(self, device: str) -> dict:
        """The versions and the number of threads. Raises ValueError if the device is unusable."""
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("PyTorch finds no usable GPU; use --device cpu, or install its "
                             "CUDA build")
        self.device = torch.device(device)
        threads = len(os.sched_getaffinity(0))
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        return {"versions": {name: metadata.version(name) for name in self.packages},
                "threads": threads}

    def train(self, steps: int) -> dict:
        """The next micro-batches: milliseconds and loss of each."""
        times, losses = [], []
        for _ in range(steps):
            started = time.perf_counter()
            losses.append(self.micro_batch())
            self.synchronize()
            times.append((time.perf_counter() - started) * 1000)
        return {"ms": times, "loss": losses}

    @torch.no_grad()
    def matmul(self, shapes: list[tuple[int, int, int]], repeats: int) -> list[list[float]]:
        """Milliseconds of each repeat of each (m, k) x (k, n) product."""
        times = []
        for m, k, n in shapes:
            a = torch.rand(m, k, device=self.device)
            b = torch.rand(k, n, device=self.device)
            times.append([])
            for _ in range(repeats + 1):
                self.synchronize()
                started = time.perf_counter()
                torch.mm(a, b)
                self.synchronize()
                times[-1].append((time.perf_counter() - started) * 1000)
            del times[-1][0]
        return times

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def batches(data: str, batch_size: int, seq_len: int, seed: int):
    """The batches of ``data`` in the experiment's order, without end."""
    samples = torch_data.FTDataset(torch_data.read_samples(data), batch_size, seq_len)
    loader = torch_data.make_loader(samples, seed, drop_last=True)
    return (batch for _, _, batch in torch_train.micro_batches(loader, sys.maxsize))
