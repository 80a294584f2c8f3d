"""The arithmetic of bench/: what it counts and how it sums up, not how fast anything is."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "bench"))

import flops  # noqa: E402
from shared import GPT2Config  # noqa: E402

CARD = {"n_layer": 3, "n_embd": 8, "n_head": 2, "vocab_size": 31}
R = 2
MASK = [[0, 0, 1, 1, 1, 0], [0, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]]


def count_by_torch() -> int:
    """Runs the task with nothing spared but what flops.py spares, and counts PyTorch's products.

    Autograd itself finds out which gradients are needed.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    width, heads, vocab = CARD["n_embd"], CARD["n_head"], CARD["vocab_size"]

    def draw(*shape, trained=False):
        return torch.randn(shape, requires_grad=trained)

    def attend(queries, keys, values, positions):
        query, key, value = (x.view(len(x), heads, -1).transpose(0, 1)
                             for x in (queries, keys, values))  # (H, T, D)
        rows = [(query[:, n:n + 1] @ key[:, :p + 1].mT).softmax(-1) @ value[:, :p + 1]
                for n, p in enumerate(positions)]
        return torch.cat(rows, dim=1).transpose(0, 1).reshape(len(queries), width)

    layers = [{"qkv": [draw(width, width) for _ in range(3)],
               "A": [draw(width, R, trained=True) for _ in range(2)],
               "B": [draw(R, width, trained=True) for _ in range(2)],
               "proj": draw(width, width), "fc": draw(width, 4 * width),
               "out": draw(4 * width, width)} for _ in range(CARD["n_layer"])]
    head = draw(width, vocab)
    with FlopCounterMode(display=False) as counter:
        for row in MASK:
            targets = [position for position, counted in enumerate(row) if counted]
            if not targets:
                continue
            x = draw(targets[-1] + 1, width)
            for layer in layers:
                kept = targets if layer is layers[-1] else list(range(len(x)))
                query, value = (
                    rows @ layer["qkv"][which] + rows @ layer["A"][n] @ layer["B"][n]
                    for n, (which, rows) in enumerate(((0, x[kept]), (2, x))))
                mixed = attend(query, x @ layer["qkv"][1], value, kept)
                x = x[kept] + mixed @ layer["proj"]
                x = x + (x @ layer["fc"]).tanh() @ layer["out"]
            (x @ head).square().sum().backward()
    return counter.get_total_flops()


def test_flops_are_those_that_pytorch_counts():
    if not importlib.util.find_spec("torch"):
        pytest.skip("no PyTorch; pip install -r requirement-test.txt")
    process = subprocess.run([sys.executable, __file__], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    counted = json.loads(process.stdout)
    assert flops.micro_batch(np.array(MASK), GPT2Config(**CARD), R) == counted


if __name__ == "__main__":  # PyTorch in a process without Jittor
    print(json.dumps(count_by_torch()))
