"""The original experiment's AdamW and its learning-rate schedules."""

import math
from typing import Callable, Collection

import jittor as jt

import ops

Schedule = Callable[[int], float]  # number of micro-batches done -> learning rate


class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter, 2019), which follows the update.

    Bias correction is off unless asked for, as in the original. Parameters whose name is in
    ``no_decay`` are not decayed.
    """

    def __init__(self, parameters: dict[str, jt.Var], *, beta1: float = 0.9, beta2: float = 0.98,
                 epsilon: float = 1e-6, weight_decay: float = 0.01, correct_bias: bool = False,
                 no_decay: Collection[str] = ()):
        self.parameters, self.no_decay = parameters, no_decay
        self.beta1, self.beta2, self.epsilon = beta1, beta2, epsilon
        self.weight_decay, self.correct_bias = weight_decay, correct_bias
        self.updates = 0
        # running means of the gradient and of its square, by parameter name
        self.m = {name: jt.zeros(p.shape).stop_grad() for name, p in parameters.items()}
        self.v = {name: jt.zeros(p.shape).stop_grad() for name, p in parameters.items()}

    def step(self, gradients: dict[str, jt.Var], lr: float) -> None:
        """Updates every parameter once; ``gradients`` by parameter name."""
        self.updates += 1
        step_size = lr
        if self.correct_bias:
            step_size *= math.sqrt(1 - self.beta2 ** self.updates)
            step_size /= 1 - self.beta1 ** self.updates
        for name, p in self.parameters.items():
            moved = ops.adamw_update(
                p, gradients[name], self.m[name], self.v[name], beta1=self.beta1, beta2=self.beta2,
                epsilon=self.epsilon, step_size=step_size,
                decay=0.0 if name in self.no_decay else lr * self.weight_decay)
            for var, value in zip((p, self.m[name], self.v[name]), moved):
                var.update(value)
        jt.sync_all()


def clip_gradients(gradients: dict[str, jt.Var], max_norm: float) -> dict[str, jt.Var]:
    """Scales all gradients together so that their global L2 norm is at most max_norm."""
    # One read for all: on CUDA, each waits until the GPU has done all before it.
    squares = jt.concat([(g * g).sum().reshape((1,)) for g in gradients.values()]).numpy()
    norm = math.sqrt(sum(squares.tolist()))
    scale = min(1.0, max_norm / (norm + 1e-6))
    return {name: g * scale for name, g in gradients.items()}


def make_schedule(name: str, lr: float, warmup_step: int, max_step: int,
                  i_steps: list[int], i_lrs: list[float]) -> Schedule:
    """The learning rate as a function of the micro-batches done so far (0 for the first).

    linear: rises over warmup_step, then falls to 0 at max_step. constant: rises, then stays.
    cosine: rises, then half a cosine over max_step. cycle: linear between the points
    (i_steps, i_lrs). inv_sqrt and dev_perf have no schedule in the original either: always lr.
    """

    def warmed_up(rate: Schedule) -> Schedule:
        return lambda step: lr * step / warmup_step if step < warmup_step else rate(step)

    def linear(step):
        return lr * max(0.0, (max_step - step) / max(1, max_step - warmup_step))

    def cosine(step):
        if step == 0:
            return 0.0  # the original starts at 0 whatever the warm-up
        return lr * 0.5 * (1 + math.cos(math.pi * min(step, max_step) / max_step))

    def cycle(step):
        if step == 0:
            return i_lrs[0]
        for begin, end, lr_begin, lr_end in zip(i_steps, i_steps[1:], i_lrs, i_lrs[1:]):
            if begin <= step < end:
                part = (step - begin) / (end - begin + 1e-6)
                return part * lr_end + (1 - part) * lr_begin
        return i_lrs[-1]

    def level(step):
        return lr

    return {"linear": warmed_up(linear), "constant": warmed_up(level), "cosine": warmed_up(cosine),
            "cycle": cycle, "inv_sqrt": level, "dev_perf": level}[name]
