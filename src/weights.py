"""The weights of GPT-2 and of LoRA in files, under all the names that are in use.

This module and what it imports need NumPy alone; checkpoint.py puts weights into a model.
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import numpy as np

from runtime import torch_file
from runtime.errors import InputError

Weights = dict[str, np.ndarray]  # by parameter name
# Buffers in which other programs store the causal mask; they are no weights.
MASK_BUFFER = re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)")
HEAD_NAMES = ("lm_head.weight", "lm_head.decoder.weight")
EMBEDDING = "transformer.wte.weight"
# The types of numbers in safetensors as torch_file.to_array calls them.
SAFETENSORS_TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "bfloat16", "F64": "<f8", "BOOL": "?",
                     "U8": "u1"}
TF_ENDINGS = {".g": ".weight", ".w": ".weight", ".b": ".bias"}


def read_weights(path: str | os.PathLike) -> Weights:
    """The weights in a ``.safetensors``, ``.bin`` or ``.pt`` file by our parameter names, float32.

    Accepts Hugging Face's names with or without ``transformer.``, those of the original experiment
    and the endings of TensorFlow's conversion. Raises InputError if the file is missing or damaged,
    holds something else, or has an output head that differs from the embedding.
    """
    raw = read_tensors(path)
    weights: Weights = {}
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


def read_tensors(path: str | os.PathLike) -> Weights:
    """The arrays in a ``.safetensors``, ``.bin`` or ``.pt`` file, under the names that it uses.

    Raises InputError if the file is missing or damaged, or holds no arrays by name.
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
    return raw


def _read_safetensors(path: Path) -> Weights:
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


def lora_part(weights: Weights) -> Weights:
    """What a file gives as ``--lora_checkpoint``: its LoRA matrices, of a whole model those alone.

    A file without the base's matrices gives its biases, too: with ``bias="lora_only"`` or "all",
    loralib trains biases and saves them beside the LoRA matrices.
    """
    lora = {name: w for name, w in weights.items() if "lora_" in name}
    others = weights.keys() - lora.keys()
    return dict(weights) if lora and all(name.endswith(".bias") for name in others) else lora


def lora_form(lora: Weights) -> tuple[int, tuple[bool, bool, bool]] | None:
    """LoRA's rank r, and which of query, key and value it is on, by the shapes of its matrices.

    Of two thirds, lora_A is (2r, C) and lora_B (2C, r): the query's and the value's, as in the
    original. Of three, it is (3r, C) and (3C, r). None for other shapes.
    """
    thirds = {2: (True, False, True), 3: (True, True, True)}
    for name, A in lora.items():
        B = lora.get(name[:-1] + "B")
        if name.endswith(".lora_A") and B is not None and A.ndim == B.ndim == 2 and B.shape[1]:
            groups, rest = divmod(A.shape[0], B.shape[1])
            return None if rest or groups not in thirds else (B.shape[1], thirds[groups])
    return None


def write_safetensors(path: Path, weights: Weights) -> None:
    """Writes a .safetensors file as transformers and PEFT want it; raises OSError if that fails."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:  # safetensors 0.8 writes wrong numbers for arrays that are not contiguous
        save_file({name: np.ascontiguousarray(value) for name, value in weights.items()}, path,
                  {"format": "pt"})
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(path)) from None
