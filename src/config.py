"""The model cards and LoRA's settings: plain data, importable without Jittor."""

from dataclasses import dataclass


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


@dataclass(frozen=True)
class LoRAConfig:
    """LoRA's rank r (0: no LoRA, every weight trains), its scale alpha / r and its dropout.

    ``enable`` says which of query, key and value have LoRA; the experiment's are query and value.
    """

    r: int = 0
    alpha: float = 128
    dropout: float = 0.0
    enable: tuple[bool, bool, bool] = (True, False, True)
