"""Reads the ``config.json`` that Hugging Face's transformers keeps beside GPT-2's weights."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from config import GPT2Config, config_of
from runtime.errors import InputError
from weight_files import read_json

# Defaults of transformers for keys that are not in the file; the other names it also accepts
DEFAULTS = {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 1024,
            "layer_norm_epsilon": 1e-5}
ALIASES = {"num_hidden_layers": "n_layer", "hidden_size": "n_embd",
           "num_attention_heads": "n_head", "max_position_embeddings": "n_positions"}
# Settings of another computation than ours: the key, its default, the only value that runs here
FIXED = {"model_type": "gpt2", "activation_function": "gelu_new", "scale_attn_weights": True,
         "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}


def path_beside(weights: Path) -> Path | None:
    """The config.json of a folder, or beside a file, of weights; None if there is none."""
    path = (weights if weights.is_dir() else weights.parent) / "config.json"
    return path if path.is_file() else None


def read(path: Path) -> GPT2Config:
    """The dimensions that a config.json states.

    Raises InputError if it is damaged, or of a model that computes something else than GPT-2 here.
    """
    values: dict[str, Any] = read_json(path)
    for key, ours in FIXED.items():
        if values.get(key, ours) != ours:
            raise InputError(f"{path}: {key} is {_shown(values[key])}, only {_shown(ours)} can run "
                             "here; give another model")
    values = {**DEFAULTS, **{ALIASES.get(key, key): value for key, value in values.items()}}
    try:
        config = config_of({field.name: values[field.name] for field in fields(GPT2Config)})
    except ValueError as error:
        raise InputError(f"{path}: {error}; fetch it again") from None
    if values.get("n_inner") not in (None, 4 * config.n_embd):
        raise InputError(f"{path}: n_inner is {_shown(values['n_inner'])}, only 4 n_embd can run "
                         f"here, which is {4 * config.n_embd}; give another model")
    return config


def _shown(value: object) -> str:
    return str(value)[:50].lower() if isinstance(value, bool) else str(value)[:50]
