"""From the names that programs give to GPT-2's weights to ours, float32."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import InputError

# Buffers in which other programs store the causal mask; they are no weights.
MASK_BUFFER = re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)")
HEAD_NAMES = ("lm_head.weight", "lm_head.decoder.weight")
EMBEDDING = "transformer.wte.weight"
TF_ENDINGS = {".g": ".weight", ".w": ".weight", ".b": ".bias"}
# Keys under which programs store a table of weights, and how deep they nest them
TABLES = ("model_state_dict", "state_dict", "model", "module", "net")
TABLE_DEPTH = 4
# Parts that DataParallel, torch.compile, FSDP and activation checkpoints add to names
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
MODEL_PREFIXES = ("base_model", "model")
PEFT_NAME = re.compile(r"\.(base_layer|lora_[AB]\.\w+|lora_embedding_[AB]|modules_to_save)\b")


def weights_of(raw: dict[str, Any], path: Path) -> dict[str, np.ndarray]:
    """The weights in what a file holds, by our parameter names, float32.

    Accepts Hugging Face's names with or without ``transformer.``, those of the original experiment
    and the endings of TensorFlow's conversion, with the prefixes of PyTorch's wrappers. What is no
    array is left out. Raises InputError if there are no weights, if two names stand for one, if the
    output head differs from the embedding, or if a number is NaN or infinite.
    """
    table = _table(raw)
    if not table or not all(
            isinstance(key, str) and key.isprintable() and value.dtype.kind in "biuf"  # not complex
            for key, value in table.items()):
        raise InputError(f"{path}: holds no named weights; give a file of GPT-2 or of this program")
    _refuse_peft(list(table), path)
    weights: dict[str, np.ndarray] = {}
    head = None
    for key, value in table.items():
        name = parameter_name(key)
        if name in weights:
            raise InputError(f"{path}: holds {name} under two names; remove one of them")
        if MASK_BUFFER.fullmatch(name):
            continue
        with np.errstate(over="ignore"):  # numbers beyond float32 become infinite
            value = value.astype(np.float32, copy=False)
        _require_finite(name, value, path)
        if name in HEAD_NAMES:
            head = value
        else:
            weights[name] = value
    if head is not None and not np.array_equal(head, weights.setdefault(EMBEDDING, head)):
        raise InputError(f"{path}: its output head differs from its token embedding; GPT-2 ties "
                         "them, give a tied checkpoint")
    return weights


def parameter_name(key: str) -> str:
    """Our name of a weight that a file calls ``key``."""
    for ending, ours in TF_ENDINGS.items():
        if key.endswith(ending):
            key = key[: -len(ending)] + ours
    parts = [part for part in key.split(".") if part not in WRAPPERS]
    while len(parts) > 1 and parts[0] in MODEL_PREFIXES:
        del parts[0]
    key = ".".join(parts)
    if re.match(r"(h\.\d+|wte|wpe|ln_f)\.", key):
        key = "transformer." + key
    return key


def _table(raw: dict[str, Any], depth: int = TABLE_DEPTH) -> dict[str, np.ndarray]:
    """The innermost table of arrays, without what stands beside them."""
    for key in TABLES if depth else ():
        if isinstance(raw.get(key), dict):
            inner = _table(raw[key], depth - 1)
            if inner:
                return inner
    return {key: value for key, value in raw.items() if isinstance(value, np.ndarray)}


def _refuse_peft(names: list[str], path: Path) -> None:
    of_peft = [name for name in names if PEFT_NAME.search(name)]
    if of_peft and len(of_peft) == len(names):
        raise InputError(f"{path}: a PEFT adapter, not a whole model; give its base as "
                         "--init_checkpoint and the adapter's folder as --lora_checkpoint")
    if of_peft:
        raise InputError(f"{path}: holds {of_peft[0]}, of a PEFT model that is not merged; save it "
                         "after merge_and_unload, or its adapter by save_pretrained")


def _require_finite(name: str, array: np.ndarray, path: Path) -> None:
    finite = np.isfinite(array)
    if not finite.all():
        raise InputError(f"{path}: {finite.size - np.count_nonzero(finite)} of {finite.size} "
                         f"numbers of {name} are NaN or infinite; give an earlier checkpoint, or "
                         "save the weights anew")
