"""Counts what a GPU does in a training step, a validation and a step of beam search.

    python tests/cuda_emulation/count_steps.py LAYERS

runs under the environment of toolkit.build(), on a GPT-2 of a few thousand weights, and prints a
line of JSON: {"training": {"launches": 100, ...}, ...}.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

import toolkit

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from runtime import backend  # noqa: E402

backend.start("cuda", seed=1)

import jittor as jt  # noqa: E402
import numpy as np  # noqa: E402

import lora  # noqa: E402
from beam_search import BeamOptions, predict  # noqa: E402
from config import GPT2Config, LoRAConfig  # noqa: E402
from dataset import Batch  # noqa: E402
from generator import Generator  # noqa: E402
from model import GPT2LMModel  # noqa: E402
from optimizer import AdamW  # noqa: E402
from trainer import Trainer, TrainOptions  # noqa: E402

VOCAB, SAMPLES, BEAMS = 97, 4, 3


def counted(*actions) -> list[dict[str, int]]:
    """The counts of each action, which is done once before, so that its operators are compiled."""
    library, results = ctypes.CDLL("libcudart.so"), []
    for action in actions:
        action()
        before = toolkit.counts(library)
        action()
        after = toolkit.counts(library)
        results.append({name: after[name] - before[name] for name in after})
    return results


def main(layers: int) -> dict[str, dict[str, int]]:
    random = np.random.default_rng(0)
    model = GPT2LMModel(GPT2Config(layers, 24, 3, VOCAB, 40), LoRAConfig(3, 6, 0.1))
    jt.sync_all()
    lora.mark_only_lora_as_trainable(model)
    model.pack("float32")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    trainer = Trainer(model, AdamW(trained), lambda step: 0.01, TrainOptions(label_smooth=0.1))
    ids, target = random.integers(VOCAB, size=(2, SAMPLES, 12))
    batch = Batch(ids, target, (random.random(ids.shape) < 0.5).astype(np.float32))
    samples = [(tuple(ids[i % 2, :5]), tuple(ids[i, 5:])) for i in range(SAMPLES)]

    def train():
        trainer.backward([batch])
        trainer.step()

    def validate():
        model.eval()
        with jt.no_grad():
            model.completion_losses(sorted(samples))
        model.train()

    train_counts, valid_counts = counted(train, validate)
    generator = Generator(model)
    queries = [tuple(random.integers(VOCAB, size=size)) for size in (4, 6, 6, 9)]

    def search(steps: int) -> None:
        predict(generator, queries, BeamOptions(BEAMS, steps, eos_token_ids=frozenset()), SAMPLES)

    short, long = counted(lambda: search(6), lambda: search(7))
    return {"training": train_counts, "validation": valid_counts,
            "beam": {name: long[name] - short[name] for name in long}}


print(json.dumps(main(int(sys.argv[1]))))
