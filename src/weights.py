"""Reads the weights of GPT-2 and of LoRA from files, under all the names that are in use.

This module and what it imports need NumPy alone; checkpoint.py puts weights into a model.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np

from runtime import torch_file
from runtime.errors import InputError

# Buffers in which other programs store the causal mask; they are no weights.
MASK_BUFFER = re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)")
HEAD_NAMES = ("lm_head.weight", "lm_head.decoder.weight")
EMBEDDING = "transformer.wte.weight"
# The types of numbers in safetensors as torch_file.to_array calls them.
SAFETENSORS_TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "bfloat16", "F64": "<f8", "BOOL": "?",
                     "U8": "u1"}
TF_ENDINGS = {".g": ".weight", ".w": ".weight", ".b": ".bias"}


def read_weights(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The weights in a ``.safetensors``, ``.bin`` or ``.pt`` file by our parameter names, float32.

    Accepts Hugging Face's names with or without ``transformer.``, those of the original experiment
    and the endings of TensorFlow's conversion. Raises InputError if the file is missing or damaged,
    holds something else, or has an output head that differs from the embedding.
    """
    path = Path(path)
    try:
        raw = (_read_safetensors if path.suffix == ".safetensors" else torch_file.load)(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; GPT-2's come with "
                         "bash download_pretrained_checkpoints.sh") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}; "
                         "check the path") from None
    except torch_file.TorchFileError as error:
        raise InputError(f"{path}: {error}; fetch or save it again") from None
    if isinstance(raw, dict) and isinstance(raw.get("model_state_dict"), dict):
        raw = raw["model_state_dict"]
    if not isinstance(raw, dict) or not raw or not all(
            isinstance(key, str) and key.isprintable()
            and isinstance(value, np.ndarray) and value.dtype.kind in "biuf"  # not complex
            for key, value in raw.items()):
        raise InputError(f"{path}: holds no named weights; give a file of GPT-2 or of this program")

    weights: dict[str, np.ndarray] = {}
    head = None
    for key, value in raw.items():
        name = parameter_name(key)
        if name in weights:
            raise InputError(f"{path}: holds {name} under two names; remove one of them")
        if name in HEAD_NAMES:
            head = value
        elif not MASK_BUFFER.fullmatch(name):
            weights[name] = value.astype(np.float32, copy=False)
    if head is not None and EMBEDDING in weights and not np.array_equal(head, weights[EMBEDDING]):
        raise InputError(f"{path}: its output head differs from its token embedding; GPT-2 ties "
                         "them, give a tied checkpoint")
    return weights


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    import safetensors
    import safetensors.numpy

    with torch_file.open_regular(path) as file:
        header = int.from_bytes(file.read(8), "little")
    if header > torch_file.DIRECTORY_LIMIT:
        raise torch_file.TorchFileError("damaged, or no safetensors file (its header would have "
                                        f"{header} bytes)")
    try:
        try:
            return safetensors.numpy.load_file(path)
        except (TypeError, AttributeError, KeyError):  # it holds types that NumPy does not have
            tensors = dict(safetensors.deserialize(path.read_bytes()))
        for name, tensor in tensors.items():
            if tensor["dtype"] not in SAFETENSORS_TYPES:
                raise torch_file.TorchFileError(f"{name} is of type {tensor['dtype']}, not one of "
                                                f"{', '.join(SAFETENSORS_TYPES)}")
        return {name: torch_file.to_array(tensor["data"], SAFETENSORS_TYPES[tensor["dtype"]])
                .reshape(tensor["shape"]) for name, tensor in tensors.items()}
    except (OSError, torch_file.TorchFileError):
        raise
    except Exception as error:  # what a damaged file raises can be anything
        raise torch_file.TorchFileError(f"damaged, or no safetensors file ({error})") from None


def parameter_name(key: str) -> str:
    """Our name of a weight that a file calls ``key``."""
    for ending, ours in TF_ENDINGS.items():
        if key.endswith(ending):
            key = key[: -len(ending)] + ours
    key = key[len("module."):] if key.startswith("module.") else key
    if re.match(r"(h\.\d+|wte|wpe|ln_f)\.", key):
        key = "transformer." + key
    return key
