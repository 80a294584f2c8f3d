"""The original's optimizer and learning-rate schedules in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

SCHEDULERS = ("cosine", "inv_sqrt", "dev_perf", "constant", "linear", "cycle")


class AdamW(torch.optim.Optimizer):
    """Adam whose weight decay comes last and whose bias correction is optional.

    Loshchilov and Hutter, 2019 (arXiv:1711.05101). torch.optim.AdamW is different: it
    decays first, always corrects the bias, and adds eps to the corrected root.
    """

    def __init__(self, params: Iterable, lr: float, betas: tuple[float, float] = (0.9, 0.98),
                 eps: float = 1e-6, weight_decay: float = 0.01, correct_bias: bool = False):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
                                      correct_bias=correct_bias))

    @torch.no_grad()
    def step(self) -> None:
        """Updates every parameter that has a gradient."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(t=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
                state["t"] += 1
                m, v, t = state["m"], state["v"], state["t"]
                m.mul_(beta1).add_(p.grad, alpha=1.0 - beta1)
                v.mul_(beta2).addcmul_(p.grad, p.grad, value=1.0 - beta2)
                rate = group["lr"]
                if group["correct_bias"]:
                    rate *= math.sqrt(1.0 - beta2 ** t) / (1.0 - beta1 ** t)
                p.addcdiv_(m, v.sqrt().add_(group["eps"]), value=-rate)
                if group["weight_decay"] > 0.0:
                    p.add_(p, alpha=-group["lr"] * group["weight_decay"])


def parameter_groups(model: nn.Module, no_decay_bias: bool = False) -> list[dict]:
    """The parameters for :class:`AdamW`; ``no_decay_bias``: biases have no weight decay."""
    if not no_decay_bias:
        return [{"params": list(model.parameters())}]
    named = list(model.named_parameters())
    return [{"params": [p for name, p in named if "bias" not in name]},
            {"params": [p for name, p in named if "bias" in name], "weight_decay": 0.0}]


class Schedule:
    """Sets an optimizer's learning rate; ``lr`` is that of the next micro-batch."""

    def __init__(self, rate: Callable[[int], float],
                 optimizer: torch.optim.Optimizer | None = None):
        """``rate(n)`` is the learning rate after n micro-batches."""
        self.rate, self.optimizer, self.done = rate, optimizer, 0
        self._set()

    def step(self) -> None:
        """Counts one micro-batch."""
        self.done += 1
        self._set()

    def _set(self) -> None:
        self.lr = self.rate(self.done)
        if self.optimizer is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr


def make_schedule(scheduler: str, lr: float, max_step: int = 1, warmup_step: int = 0,
                  i_steps: Sequence[int] = (0,), i_lrs: Sequence[float] = (0.00025,),
                  optimizer: torch.optim.Optimizer | None = None) -> Schedule:
    """The schedule of that name, counted in micro-batches.

    linear and constant warm up from 0 to ``lr``; linear then falls to 0 at ``max_step``. cosine is
    always 0 in the first micro-batch; after the warm-up it follows half a cosine that begins at
    step 0, so it does not reach ``lr`` if there is a warm-up. cycle is linear between the points
    (``i_steps``, ``i_lrs``), has the first rate at step 0 even if the first point is later, and
    ignores ``lr``. inv_sqrt and dev_perf, which the original accepts, are always ``lr``.
    """
    def warm(step: int) -> float:
        return lr * (step / max(1, warmup_step))

    def linear(step: int) -> float:
        if step < warmup_step:
            return warm(step)
        return lr * max(0.0, (max_step - step) / max(1, max_step - warmup_step))

    def constant(step: int) -> float:
        return warm(step) if step < warmup_step else lr

    def cosine(step: int) -> float:
        if step == 0:
            return 0.0
        if step < warmup_step:
            return lr * step / warmup_step
        return lr * (0.5 * (1 + math.cos(math.pi * min(step, max_step) / max_step)))

    def cycle(step: int) -> float:
        if step == 0:
            return i_lrs[0]
        for start, end, before, after in zip(i_steps, i_steps[1:], i_lrs, i_lrs[1:]):
            if start <= step < end:
                share = (step - start) / (end - start + 1e-6)
                return share * after + (1.0 - share) * before
        return i_lrs[-1]

    rates = {"linear": linear, "constant": constant, "cosine": cosine, "cycle": cycle,
             "inv_sqrt": lambda step: lr, "dev_perf": lambda step: lr}
    return Schedule(rates[scheduler], optimizer)
