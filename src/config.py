"""The model cards and LoRA's settings: plain data, importable without Jittor."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Mapping


@dataclass(frozen=True)
class GPT2Config:
    """The dimensions of a GPT-2."""

    n_layer: int
    n_embd: int
    n_head: int
    vocab_size: int = 50257
    n_positions: int = 1024
    layer_norm_epsilon: float = 1e-5

    @property
    def weights(self) -> int:
        """The number of weights, without LoRA's."""
        C = self.n_embd
        return (self.vocab_size + self.n_positions + 2) * C + self.n_layer * (12 * C + 13) * C


MODEL_CARDS = {
    "gpt2.nano": GPT2Config(n_layer=4, n_embd=128, n_head=4),  # ours, for runs without downloads
    "gpt2.sm": GPT2Config(n_layer=12, n_embd=768, n_head=12),
    "gpt2.md": GPT2Config(n_layer=24, n_embd=1024, n_head=16),
    "gpt2.lg": GPT2Config(n_layer=36, n_embd=1280, n_head=20),
}


def card_of(config: GPT2Config) -> str:
    """The name of a model of these dimensions; if it has none, the dimensions in words."""
    names = (name for name, card in MODEL_CARDS.items() if card == config)
    return next(names, ", ".join(f"{key} {value}" for key, value in asdict(config).items()))


def config_of(values: Mapping[str, Any]) -> GPT2Config:
    """The dimensions in ``values``, by name; raises ValueError that names an impossible one."""
    config = GPT2Config(**values)
    for name, value in asdict(config).items():
        if name != "layer_norm_epsilon" and (type(value) is not int or not 0 < value < 1 << 31):
            raise ValueError(f"{name} is {str(value)[:50]}, no dimension of a model")
    epsilon = config.layer_norm_epsilon
    if type(epsilon) not in (int, float) or not 0 < epsilon < math.inf:
        raise ValueError(f"layer_norm_epsilon is {str(epsilon)[:50]}, not above 0")
    if config.n_embd % config.n_head:
        raise ValueError(f"n_embd is {config.n_embd}, no multiple of n_head {config.n_head}")
    return config


@dataclass(frozen=True)
class LoRAConfig:
    """LoRA's rank r (0: no LoRA, every weight trains), its scale alpha / r and its dropout.

    ``enable`` says which of query, key and value have LoRA; the experiment's are query and value.
    """

    r: int = 0
    alpha: float = 128
    dropout: float = 0.0
    enable: tuple[bool, bool, bool] = (True, False, True)
