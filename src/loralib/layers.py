"""The LoRA layer of GPT-2's attention.

A frozen weight W (n_in, n_out) gains a trained detour of rank r::

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

from __future__ import annotations

import math

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
        r: int = 0,  # rank of the detour; 0 leaves a plain linear layer
        lora_alpha: int = 1,  # the detour is scaled by lora_alpha / r
        lora_dropout: float = 0.0,  # on the detour's input, in training only
        enable_lora: tuple[bool, ...] = (True,),  # which projections get a detour
    ):
        if out_features % len(enable_lora):
            raise ValueError("out_features must divide evenly among enable_lora")
        self.r, self.scaling = r, lora_alpha / r if r else 0.0
        # where in the output each enabled projection begins
        width = out_features // len(enable_lora)
        self.columns = [i * width for i, enabled in enumerate(enable_lora) if enabled]
        self.lora_dropout, self.dropout_seed = lora_dropout, 0
        self.weight = jt.init.gauss((in_features, out_features), mean=0.0, std=0.02)
        self.bias = jt.zeros(out_features)
        if r:
            groups = len(self.columns)
            bound = 1 / math.sqrt(in_features)  # Kaiming-uniform with a = sqrt(5)
            self.lora_A = jt.init.uniform((r * groups, in_features), low=-bound, high=bound)
            self.lora_B = jt.zeros((width * groups, r))

    def execute(self, x: jt.Var) -> jt.Var:
        """x (N, in_features) -> (N, out_features)."""
        if not self.r:
            return ops.linear(x, self.weight, self.bias)
        y = ops.linear(x, self.weight)  # (N, out)
        if self.is_training() and self.lora_dropout:
            x = ops.dropout(x, self.lora_dropout, self.dropout_seed)
        low = nn.matmul_transpose(x, self.lora_A)  # (N, r * groups)
        return ops.lora_up(y, self.bias, low, self.lora_B, self.scaling, self.columns)
