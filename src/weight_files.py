"""Finds and reads weights: a file, a Hugging Face folder, or shards with their index.

Arrays keep the names that the file gives them; src/weight_names.py translates these.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

import numpy as np

from runtime import torch_file
from runtime.digests import sha256
from runtime.errors import InputError

# What a Hugging Face folder may hold, in the order in which transformers looks for it
IN_FOLDER = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
             "pytorch_model.bin.index.json")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
ENDINGS = (".pt", ".pth", ".pkl", ".bin", ".safetensors")
OTHER_ENDINGS = (".h5", ".msgpack", ".gguf", ".onnx")  # of TensorFlow, Flax and others
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.safetensors|\.bin)")
JSON_LIMIT = 4 << 20  # bytes of an index or a config.json
# The types of numbers in safetensors as torch_file.to_array calls them.
SAFETENSORS_TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "bfloat16", "F64": "<f8", "BOOL": "?",
                     "U8": "u1"}
NO_FILE = "no such file; GPT-2's come with bash download_pretrained_checkpoints.sh"


def read(path: Path) -> dict[str, Any]:
    """What the files of ``path`` hold: arrays by name, perhaps in further dicts (see weight_names).

    Raises InputError if a file is missing, damaged or something else, or an index is wrong.
    """
    place = locate(path)
    if not _is_index(place):
        shard = SHARD.fullmatch(place.name)
        if shard and int(shard[3]) > 1:
            raise InputError(f"{place}: one of {int(shard[3])} shards; give the folder or "
                             f"{shard[1]}{shard[4]}.index.json, which names all")
        return _read_file(place)
    found: dict[str, Any] = {}
    names = _index(place)
    for file in sorted(set(names.values())):
        content = _read_file(place.parent / file)
        for name in content:
            if name in found:
                raise InputError(f"{place.parent / file}: holds {name}, which another shard holds, "
                                 "too; fetch the folder again")
        for name in (name for name, shard in names.items() if shard == file):
            if name not in content:
                raise InputError(f"{place.parent / file}: lacks {name}, which {place.name} says is "
                                 "there; fetch the folder again")
        found.update(content)
    return found


def locate(path: Path) -> Path:
    """The file of weights or the index that a folder stands for; any other ``path`` itself."""
    if not path.is_dir():
        return path
    for name in IN_FOLDER:
        if (path / name).is_file():
            return path / name
    if (path / ADAPTER[0]).is_file():
        raise InputError(f"{path}: a PEFT adapter, not a whole model; give its base as "
                         "--init_checkpoint and this folder as --lora_checkpoint")
    names = sorted(entry.name for entry in path.iterdir())
    ours = [name for name in names if name.endswith(ENDINGS)]
    others = [name for name in names if name.endswith(OTHER_ENDINGS)]
    remedy = (f"give one of its files, e.g. {path / ours[0]}" if ours else
              f"{others[0]} is of another program, save it with transformers" if others else
              "GPT-2's come with bash download_pretrained_checkpoints.sh")
    raise InputError(f"{path}: a folder without model.safetensors or pytorch_model.bin; {remedy}")


def digest(path: Path) -> str:
    """The SHA-256 of a file; of a folder, an index or an adapter that of the digests of its files.

    Shards, config.json and a PEFT adapter belong to them.
    """
    if path.is_file() and not _is_index(path) and path.name not in ADAPTER:
        return sha256(path)
    folder = path if path.is_dir() else path.parent
    place = next((path / name for name in IN_FOLDER if (path / name).is_file()), path)
    names = [*IN_FOLDER[::2], "config.json", *ADAPTER]
    if _is_index(place):
        names += [place.name, *sorted(set(_index(place).values()))]
    digests = [f"{name} {sha256(folder / name)}\n" for name in names if (folder / name).is_file()]
    return hashlib.sha256("".join(digests).encode("utf-8", "surrogateescape")).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises InputError if it is none."""
    with explained(path), torch_file.open_regular(path) as file:
        text = file.read(JSON_LIMIT + 1)
        try:
            value = json.loads(text) if len(text) <= JSON_LIMIT else None
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise torch_file.TorchFileError("no JSON object")
        return value


def read_note(path: Path, key: str) -> str | None:
    """The text that a file keeps as ``key`` beside its weights, or None; reads no weights."""
    with explained(path):
        if _is_index(path):
            return None
        if path.suffix == ".safetensors":
            with torch_file.open_regular(path) as file:
                size = int.from_bytes(file.read(8), "little")
                header = file.read(size) if size <= torch_file.DIRECTORY_LIMIT else b""
            try:
                note = json.loads(header)["__metadata__"][key]
            except (ValueError, LookupError, TypeError, RecursionError):
                note = None  # if it is damaged, reading the weights says so
        else:
            raw = torch_file.load_structure(path)
            note = raw.get(key) if isinstance(raw, dict) else None
        if note is None and _kind(path):
            raise torch_file.TorchFileError("")
    return note if isinstance(note, str) else None


def _is_index(path: Path) -> bool:
    return path.name.endswith(".index.json")


def _index(path: Path) -> dict[str, str]:
    """The file of each weight."""
    names = read_json(path).get("weight_map")
    if not isinstance(names, dict) or not names or not all(
            isinstance(name, str) and name == os.path.basename(name) and name.isprintable()
            for name in names.values()):
        raise InputError(f"{path}: no \"weight_map\" of files in its own folder; fetch it again")
    return names


def _read_file(path: Path) -> dict[str, Any]:
    with explained(path):
        raw = (_read_safetensors if path.suffix == ".safetensors" else torch_file.load)(path)
    if not isinstance(raw, dict):
        raise InputError(f"{path}: holds no named weights; give a file of GPT-2 or of this program")
    return raw


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns what reading ``path`` raises into an InputError that says what the file is."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{path}: {NO_FILE}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}; check the path"
                         ) from None
    except torch_file.TorchFileError as error:
        remedy = "save its state_dict" if "it asks for" in str(error) else "fetch or save it again"
        raise InputError(f"{path}: {_kind(path) or f'{error}; {remedy}'}") from None


def _kind(path: Path) -> str | None:
    """What a file that holds no weights is, if it is a usual mistake, and the remedy."""
    with open(path, "rb") as file:
        head = file.read(200).lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        return ("a Git LFS pointer, not the file itself; run: git lfs pull (or download the file "
                "from its page)")
    if head.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")):
        return "a web page, not the file itself; open it in a browser to see why, and fetch again"
    if head.startswith(b"{") and b"\0" not in head and path.suffix != ".json":
        return "a JSON text, no weights; give the file of weights or its folder"
    return None


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
