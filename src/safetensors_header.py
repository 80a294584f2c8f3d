"""Checks the header of a safetensors file before any of its tensors are touched.

The format (huggingface/safetensors, README): 8 bytes with the header's size, the header in JSON,
then the tensors' bytes, one after the other without gaps.
"""

from __future__ import annotations

import json
import math
import os

from torch_file import TorchFileError

HEADER_LIMIT = 4 << 20  # bytes; that of gpt2.lg takes 50 thousand
BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16,
        "I16": 16, "U16": 16, "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8}


def check(path: str | os.PathLike) -> None:
    """Raises TorchFileError unless the tensors fill the file exactly, and none shares its bytes.

    Also OSError where the file cannot be read.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise TorchFileError("damaged, or no safetensors file (the header does not fit in it)")
        if length > HEADER_LIMIT:
            raise TorchFileError(f"refused: its header has {length} bytes, more than "
                                 f"{HEADER_LIMIT}")
        header = _parse(file.read(length))
    end = 0
    tensors = [(name, *_tensor(name, entry)) for name, entry in header.items()
               if name != "__metadata__"]
    for name, begin, until, nbytes in sorted(tensors, key=lambda tensor: tensor[1:]):
        if begin != end:
            raise TorchFileError(f"damaged: {name} begins at byte {begin}, where byte {end} is "
                                 "due: tensors overlap, or there is a gap")
        if until - begin != nbytes:
            raise TorchFileError(f"damaged: {name} has {until - begin} bytes, its shape {nbytes}")
        end = until
    if end != size - 8 - length:
        raise TorchFileError(f"damaged: its tensors have {end} bytes, the file "
                             f"{size - 8 - length}")


def _parse(data: bytes) -> dict:
    def unique(pairs: list) -> dict:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a name occurs twice")
        return dict(pairs)

    try:
        header = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise TorchFileError(f"damaged, or no safetensors file ({error})") from None
    if not isinstance(header, dict):
        raise TorchFileError("damaged, or no safetensors file (the header is no table)")
    return header


def _tensor(name: str, entry: object) -> tuple[int, int, int]:
    """(first byte, byte after the last, bytes by its shape) of a tensor."""
    entry = entry if isinstance(entry, dict) else {}
    shape, offsets, dtype = (entry.get(key) for key in ("shape", "data_offsets", "dtype"))
    if not isinstance(dtype, str) or not isinstance(shape, list) \
            or not isinstance(offsets, list) or len(offsets) != 2 or len(shape) > 32 \
            or not all(type(n) is int and 0 <= n < 1 << 63 for n in (*shape, *offsets)):
        raise TorchFileError(f"damaged: {name} has no valid dtype, shape and data_offsets")
    if dtype not in BITS:
        raise TorchFileError(f"{name} is of type {dtype}, not one of {', '.join(BITS)}")
    return offsets[0], offsets[1], math.prod(shape) * BITS[dtype] // 8
