"""align/ as a side of the benchmarks: PyTorch as the original program uses it."""

from __future__ import annotations

import time

from serving import serve
from torch_side import TorchSide, batches, torch_beam, torch_model, torch_optim, torch_train


class Side(TorchSide):
    packages = ("torch", "transformers", "loralib")

    def load(self, card: str, base: str, lora: str | None, r: int, alpha: int,
             lora_dropout: float = 0.0, precision: str = "float32") -> None:
        self.model = self.optimizer = self.schedule = None
        model = torch_model.build(card, r, alpha, lora_dropout)
        torch_model.load_weights(model, base)
        if lora:
            torch_model.load_lora(model, lora)
        self.model = model.to(self.device)

    def start_training(self, data: str, *, batch_size: int, seq_len: int, grad_acc: int,
                       label_smooth: float, lr: float, warmup_step: int, max_step: int,
                       weight_decay: float, beta2: float, seed: int) -> None:
        self.batches = batches(data, batch_size, seq_len, seed)
        self.optimizer = torch_optim.AdamW(torch_optim.parameter_groups(self.model), lr,
                                           (0.9, beta2), 1e-6, weight_decay)
        self.schedule = torch_optim.make_schedule("linear", lr, max_step, warmup_step,
                                                  optimizer=self.optimizer)
        self.grad_acc, self.label_smooth = grad_acc, label_smooth
        self.model.train()

    def micro_batch(self) -> float:
        """The loop body of torch_train.train."""
        loss = torch_train.batch_loss(self.model, next(self.batches), self.label_smooth)
        (loss / self.grad_acc).backward()
        if (self.schedule.done + 1) % self.grad_acc == 0:
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.schedule.step()
        return loss.item()

    def search(self, queries: list[list[int]], batch_size: int, beam: int, eval_len: int,
               length_penalty: float, no_repeat_ngram_size: int, eos: list[int]) -> dict:
        """Searches one query at a time at every batch size: torch_beam has no batches."""
        started = time.perf_counter()
        found = [torch_beam.search(self.model, query, num_beams=beam, eval_len=eval_len,
                                   eos=set(eos), length_penalty=length_penalty,
                                   no_repeat_ngram_size=no_repeat_ngram_size)
                 for query in queries]
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "ids": [ids + [0] * (eval_len - len(ids)) for ids in found]}


if __name__ == "__main__":
    serve(Side())
