"""What the sides that use PyTorch have in common, and what they import from align/."""

from __future__ import annotations

import os
import sys
import time
from importlib import metadata
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "align"))

import torch  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel  # noqa: E402

import torch_beam  # noqa: E402
import torch_data  # noqa: E402
import torch_model  # noqa: E402
import torch_optim  # noqa: E402
import torch_train  # noqa: E402

__all__ = ["TorchSide", "batches", "merged", "torch_beam", "torch_model", "torch_optim",
           "torch_train"]


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

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def batches(data: str, batch_size: int, seq_len: int, seed: int):
    """The batches of ``data`` in the experiment's order, without end."""
    samples = torch_data.FTDataset(torch_data.read_samples(data), batch_size, seq_len)
    loader = torch_data.make_loader(samples, seed, drop_last=True)
    return (batch for _, _, batch in torch_train.micro_batches(loader, sys.maxsize))


def merged(card: str, base: str, lora: str | None, r: int, alpha: int):
    """A plain GPT2LMHeadModel whose weight W + B A alpha / r replaces W and LoRA."""
    whole = torch_model.build(card, r, alpha)
    torch_model.load_weights(whole, base)
    if lora:
        torch_model.load_lora(whole, lora)
    weights = whole.state_dict()
    width = whole.config.n_embd
    for layer in range(whole.config.n_layer if r else 0):
        name = f"transformer.h.{layer}.attn.c_attn."
        weight = weights[name + "weight"]  # (C, 3 C)
        a, b = weights.pop(name + "lora_A"), weights.pop(name + "lora_B")  # (2 r, C), (2 C, r)
        for half, columns in enumerate((slice(0, width), slice(2 * width, 3 * width))):
            product = b[half * width:(half + 1) * width] @ a[half * r:(half + 1) * r]
            weight[:, columns] += product.T * (alpha / r)
    config = GPT2Config(**torch_model.CARDS[card], resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                        bos_token_id=None, eos_token_id=None)
    model = GPT2LMHeadModel(config)
    model.load_state_dict(weights)
    return model
