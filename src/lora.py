"""LoRA (Hu et al., 2021, arXiv:2106.09685): its layer, and what a training script needs of it.

A frozen weight W (n_in, n_out) gets a second, trained path of rank r beside it:

        x (N, n_in)
        |      \\
        |       dropout
        |          \\
        W           A^T (n_in, r)      A: Kaiming-uniform, B: zero at first,
        |           |                  so training starts at the frozen model
        |           B^T (r, n_out)
        |           |
        |           * alpha / r
        |          /
        y (N, n_out)

MergedLinear does this for a weight that holds several projections side by side, such as the
query, key and value of GPT-2's ``c_attn``, and only for those of them that are enabled.
"""

import hashlib
import math
from typing import Sequence

import jittor as jt
from jittor import nn

import ops


class MergedLinear(nn.Module):
    """A linear layer of ``len(enable_lora)`` equal projections, LoRA on the enabled ones.

    Its parameters keep the names and shapes of loralib's: ``weight`` (in_features, out_features)
    as in GPT-2's Conv1D, ``bias`` (out_features), ``lora_A`` (r * groups, in_features) and
    ``lora_B`` (out_features / len(enable_lora) * groups, r), where groups counts the enabled.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,  # rank of LoRA; 0 makes this a plain linear layer
        lora_alpha: float = 1,  # LoRA's output is scaled by lora_alpha / r
        lora_dropout: float = 0.0,  # on LoRA's input, in training only
        enable_lora: tuple[bool, ...] = (True,),  # which projections get LoRA
    ):
        self.r, self.scaling = r, lora_alpha / r if r else 0.0
        self.lora_dropout = lora_dropout
        # of the parts of x that have masks of their own: their seeds, their first rows
        self.dropout_seeds: list[int] = [0]
        self.dropout_starts: list[int] = [0]
        self.weight = jt.init.gauss((in_features, out_features), mean=0.0, std=0.02)
        self.bias = jt.zeros(out_features)
        self.enable(enable_lora)

    def enable(self, enable_lora: tuple[bool, ...]) -> None:
        """Puts LoRA on these projections, with new matrices; training starts at the frozen W."""
        in_features, out_features = self.weight.shape
        if out_features % len(enable_lora):
            raise ValueError("out_features must divide evenly among enable_lora")
        # the first output column of each enabled projection
        width = out_features // len(enable_lora)
        self.columns = [i * width for i, enabled in enumerate(enable_lora) if enabled]
        if self.r:
            groups = len(self.columns)
            bound = 1 / math.sqrt(in_features)  # Kaiming-uniform with a = sqrt(5)
            self.lora_A = jt.init.uniform((self.r * groups, in_features), low=-bound, high=bound)
            self.lora_B = jt.zeros((width * groups, self.r))

    def execute(self, x: jt.Var) -> jt.Var:
        """x (N, in_features) -> (N, out_features)."""
        if not self.r:
            return ops.linear(x, self.weight, self.bias)
        y = ops.linear(x, self.weight)  # (N, out_features)
        if self.is_training() and self.lora_dropout:
            x = ops.dropout(x, self.lora_dropout, self.dropout_seeds, self.dropout_starts)
        if isinstance(self.lora_A, ops.PackedWeight):  # in a Generator
            low = ops.linear(x, self.lora_A)  # (N, r * groups)
        else:
            low = ops.matmul(x, self.lora_A, transpose_b=True)
        return ops.lora_up(y, self.bias, low, self.lora_B, self.scaling, self.columns)


def mark_only_lora_as_trainable(model: nn.Module) -> None:
    """Freezes every parameter whose name does not contain ``lora_``."""
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.stop_grad()


def lora_state_dict(model: nn.Module) -> dict[str, jt.Var]:
    """The LoRA matrices by name, which are all that fine-tuning changes."""
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def seed_dropout(model: nn.Module, seed: int, steps: Sequence[int]) -> None:
    """Fixes the dropout masks of the next forward pass, whose parts are of these ``steps``.

    The mask of a part depends on (seed, step, layer) alone and not on the state of a generator, nor
    on what the other parts are. So a run that is resumed at ``step`` draws the same masks as an
    uninterrupted one.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, MergedLinear)]
    for index, layer in enumerate(layers):
        digests = [hashlib.sha256(f"{seed} {step} {index}".encode()).digest() for step in steps]
        layer.dropout_seeds = [int.from_bytes(digest[:4], "little") >> 1  # fits an int32
                               for digest in digests]
