"""LoRA (Hu et al., 2021, arXiv:2106.09685) for Jittor: one layer and two functions."""

from loralib.layers import MergedLinear
from loralib.utils import lora_state_dict, mark_only_lora_as_trainable, seed_dropout

__all__ = ["MergedLinear", "lora_state_dict", "mark_only_lora_as_trainable", "seed_dropout"]
