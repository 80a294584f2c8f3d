"""This project as a side of the benchmarks: model, training step and search of its scripts."""

from __future__ import annotations

import itertools
import os
import sys
import time
from importlib import metadata
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "src"))

from config import MODEL_CARDS, LoRAConfig  # noqa: E402
from runtime import backend  # noqa: E402
from serving import serve  # noqa: E402


class Side:
    def start(self, device: str) -> dict:
        """Imports Jittor; returns the versions and the number of threads."""
        backend.start(device, seed=1)
        return {"versions": {name: metadata.version(name) for name in ("jittor", "numpy")},
                "threads": len(os.sched_getaffinity(0))}

    def load(self, card: str, base: str, lora: str | None, r: int, alpha: int,
             lora_dropout: float = 0.0, precision: str = "float32") -> None:
        import jittor as jt

        import checkpoint
        from model import GPT2LMModel

        self.precision = precision  # of the frozen matrices
        self.model = self.trainer = self.generator = None
        jt.gc()
        self.model = GPT2LMModel(MODEL_CARDS[card], LoRAConfig(r, alpha, lora_dropout))
        checkpoint.load(self.model, base, lora, lora_required=True)

    def start_training(self, data: str, *, batch_size: int, seq_len: int, grad_acc: int,
                       label_smooth: float, lr: float, warmup_step: int, max_step: int,
                       weight_decay: float, beta2: float, seed: int) -> None:
        import lora
        from dataset import FTDataset
        from optimizer import AdamW, make_schedule
        from trainer import Trainer, TrainOptions, joined_batches

        lora.mark_only_lora_as_trainable(self.model)
        if not self.model.packed:
            self.model.pack(self.precision)
        trained = lora.lora_state_dict(self.model)
        self.generator = None  # it has a copy of the weights before training
        samples = FTDataset(data, batch_size, seq_len)
        self.trainer = Trainer(
            self.model, AdamW(trained, beta2=beta2, weight_decay=weight_decay),
            make_schedule("linear", lr, warmup_step, max_step, [], []),
            TrainOptions(grad_acc=grad_acc, joined=joined_batches(samples, grad_acc),
                         label_smooth=label_smooth, seed=seed))
        self.batches = (batch for epoch in itertools.count(1)
                        for batch in samples.batches(seed, epoch))

    def train(self, steps: int) -> dict:
        """The next micro-batches: milliseconds and loss of each."""
        times, losses = [], []
        while left := steps - len(losses):
            started = time.perf_counter()
            unit = list(itertools.islice(self.batches, self.trainer.unit(left)))
            losses += self.trainer.backward(unit)
            for _ in unit:
                self.trainer.step()
            _synchronize()
            times += [(time.perf_counter() - started) * 1000 / len(unit)] * len(unit)
        return {"ms": times, "loss": losses}

    def search(self, queries: list[list[int]], batch_size: int, beam: int, eval_len: int,
               length_penalty: float, no_repeat_ngram_size: int, eos: list[int]) -> dict:
        from beam_search import BeamOptions, predict
        from generator import Generator

        options = BeamOptions(beam=beam, eval_len=eval_len, length_penalty=length_penalty,
                              no_repeat_ngram_size=no_repeat_ngram_size,
                              eos_token_ids=frozenset(eos))
        if self.generator is None:
            self.generator = Generator(self.model, self.precision)
            _synchronize()
        started = time.perf_counter()
        ids = predict(self.generator, [tuple(query) for query in queries], options, batch_size)
        took = time.perf_counter() - started
        return {"seconds": took, "ids": [found + [0] * (eval_len - len(found)) for found in ids]}


def _synchronize() -> None:
    import jittor as jt

    jt.sync_all(True)


if __name__ == "__main__":
    serve(Side())
