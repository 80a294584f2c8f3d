"""This project as a side of the benches: its own model, training loop and beam search."""

from __future__ import annotations

import itertools
import math
import os
import sys
import time
from importlib import metadata
from pathlib import Path
from statistics import median

# In front: the loralib of this side is that of src/, not PyTorch's.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import backend  # noqa: E402
from config import MODEL_CARDS, LoRAConfig  # noqa: E402
from serving import serve  # noqa: E402


class Side:
    def start(self, device: str) -> dict:
        """Imports Jittor; what runs here, in words."""
        backend.start(device, seed=1)
        return {"versions": {name: metadata.version(name) for name in ("jittor", "numpy")},
                "threads": len(os.sched_getaffinity(0))}

    def load(self, card: str, base: str, lora: str | None, r: int, alpha: int,
             lora_dropout: float = 0.0) -> None:
        import jittor as jt

        import checkpoint
        from model import GPT2LMModel

        self.model = self.training = None
        jt.gc()
        self.loaded, self.packed = (card, base, lora, r, alpha, lora_dropout), False
        self.model = GPT2LMModel(MODEL_CARDS[card], LoRAConfig(r, alpha, lora_dropout))
        checkpoint.load(self.model, base, lora, lora_required=True)

    def start_training(self, data: str, **flags) -> None:
        if self.packed:  # by a search, after which nothing can be trained
            self.load(*self.loaded)
        self.training = Training(self.model, data, **flags)

    def train(self, steps: int) -> dict:
        """The next micro-batches: milliseconds and loss of each."""
        times, losses = [], []
        for _ in range(steps):
            started = time.perf_counter()
            losses.append(self.training.micro_batch())
            _synchronize()
            times.append((time.perf_counter() - started) * 1000)
        return {"ms": times, "loss": losses}

    def search(self, queries: list[list[int]], batch_size: int, beam: int, eval_len: int,
               length_penalty: float, no_repeat_ngram_size: int, eos: list[int]) -> dict:
        from beam_search import BeamOptions, predict

        options = BeamOptions(beam, eval_len, 0, length_penalty, no_repeat_ngram_size,
                              eos_token_ids=frozenset(eos))
        if not self.packed:
            self.model.pack_weights()
            self.packed = True
        started = time.perf_counter()
        ids = predict(self.model, [tuple(query) for query in queries], options, batch_size)
        return {"seconds": time.perf_counter() - started, "ids": ids}

    def matmul(self, shapes: list[tuple[int, int, int]], repeats: int) -> list[list[float]]:
        """Milliseconds of each repeat of each (m, k) x (k, n) product, by the faster of two."""
        import jittor as jt

        import ops

        times = []
        for m, k, n in shapes:
            a, b = jt.rand(m, k), jt.rand(k, n)
            jt.sync([a, b])
            _synchronize()
            products = []
            for multiply in (jt.matmul, ops.linear):
                products.append([])
                for _ in range(repeats + 1):
                    started = time.perf_counter()
                    multiply(a, b).sync()
                    _synchronize()
                    products[-1].append((time.perf_counter() - started) * 1000)
                del products[-1][0]
            times.append(min(products, key=median))
        return times


class Training:
    """The body of trainer.train's loop, a micro-batch a call.

    The only place in bench/ that knows what that loop is made of.
    """

    def __init__(self, model, data: str, *, batch_size: int, seq_len: int, grad_acc: int,
                 label_smooth: float, lr: float, warmup_step: int, max_step: int,
                 weight_decay: float, beta1: float, beta2: float, epsilon: float, seed: int):
        import loralib as lora
        from dataset import FTDataset
        from optimizer import AdamW, make_schedule

        model.train()  # first: after a search, in eval(), Jittor holds every parameter for frozen
        lora.mark_only_lora_as_trainable(model)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.model, self.grad_acc = model, grad_acc
        self.label_smooth, self.seed = label_smooth, seed
        self.optimizer = AdamW(trained, beta1, beta2, epsilon, weight_decay)
        self.schedule = make_schedule("linear", lr, warmup_step, max_step, [], [])
        samples = FTDataset(data, batch_size, seq_len)
        self.batches = (batch for epoch in itertools.count(1)
                        for batch in samples.batches(seed, epoch))
        self.step, self.gradients = 0, {}

    def micro_batch(self) -> float:
        """Trains on the next batch and returns its loss."""
        import loralib as lora
        from trainer import accumulate

        batch = next(self.batches)
        self.step += 1
        lora.seed_dropout(self.model, self.seed, self.step)
        loss = self.model.loss(batch.input_ids, batch.target, batch.mask, self.label_smooth)
        accumulate(self.gradients, loss / self.grad_acc, self.optimizer.parameters)
        loss = float(loss.item())
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} at step {self.step}")
        if self.step % self.grad_acc == 0:
            self.optimizer.step(self.gradients, self.schedule(self.step - 1))
            self.gradients = {}
        return loss


def _synchronize() -> None:
    import jittor as jt

    jt.sync_all(True)


if __name__ == "__main__":
    serve(Side())
