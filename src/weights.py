"""The weights of GPT-2 and of LoRA by our parameter names, and which of them are LoRA's.

This module and what it imports need NumPy alone; checkpoint.py puts weights into a model.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np

import weight_files
from weight_names import weights_of

Weights = dict[str, np.ndarray]


def read_weights(path: str | os.PathLike) -> Weights:
    """The weights in a file, folder or index, by our parameter names, float32.

    Raises InputError if there are none that can be read, see weight_files and weight_names.
    """
    return weights_of(weight_files.read(Path(path)), Path(path))


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
