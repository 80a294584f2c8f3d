"""What a training script needs to know of LoRA, as in Microsoft's loralib."""

from __future__ import annotations

import hashlib

import jittor as jt
from jittor import nn

from loralib.layers import MergedLinear


def mark_only_lora_as_trainable(model: nn.Module) -> None:
    """Freezes every parameter whose name does not contain ``lora_``."""
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.stop_grad()


def lora_state_dict(model: nn.Module) -> dict[str, jt.Var]:
    """The LoRA matrices by name, all that fine-tuning changes."""
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def seed_dropout(model: nn.Module, seed: int, step: int) -> None:
    """Fixes the dropout masks of the next forward pass.

    A mask depends on (seed, step, layer) alone and not on a generator's state, so a run that is
    resumed at ``step`` draws what the uninterrupted run drew.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, MergedLinear)]
    for index, layer in enumerate(layers):
        digest = hashlib.sha256(f"{seed} {step} {index}".encode()).digest()
        layer.dropout_seed = int.from_bytes(digest[:4], "little") >> 1  # fits an int32
