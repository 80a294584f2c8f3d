"""What a checkpoint says about itself.

A checkpoint of this program holds, beside its weights, the entry ``about``: JSON with the LoRA
settings, the dimensions of the model, the data set and the step. A file of other programs may have
a config.json beside it, which states the dimensions.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import hf_config
import peft_adapter
import weight_files
from config import MODEL_CARDS, GPT2Config, LoRAConfig, card_of, config_of
from runtime.errors import InputError

VERSION = 1  # of the entry; a reader must know it


def describe(config: GPT2Config, lora: LoRAConfig, data: str, step: int) -> str:
    """The entry of a model after ``step`` micro-batches on the data set named ``data``."""
    card = card_of(config)
    return json.dumps({
        "version": VERSION, "model_card": card if card in MODEL_CARDS else "auto",
        "config": asdict(config), "lora_dim": lora.r, "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout, "data": data, "step": step})


@dataclass(frozen=True)
class About:
    """What is known of a checkpoint; None stands for what is not."""

    path: Path  # of the file that says so
    config: GPT2Config | None = None
    lora_dim: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float | None = None
    trained: str = ""  # "400 micro-batches on e2e"


def read_lora(path: Path) -> About:
    """What is known of the LoRA at ``path``: a PEFT adapter, of which all is read, or as `read`."""
    if peft_adapter.folder_of(path):
        lora = peft_adapter.in_its_layers(peft_adapter.read(path))
        return About(path, None, lora.r, lora.alpha)
    return read(path)


def read(path: Path) -> About:
    """What is known of the checkpoint at ``path``: a file, a folder or an index.

    Reads no weights. Raises InputError if a file is missing or damaged, or cannot run here.
    """
    place = weight_files.locate(path)
    note = weight_files.read_note(place, "about")
    about = _parsed(note, place) if note else None
    config = hf_config.path_beside(place)
    if about is None and config:
        return About(config, hf_config.read(config))
    return about or About(place)


def _parsed(note: str, path: Path) -> About | None:
    """The entry of a checkpoint, or of the state of a run; None if it is of another program."""
    try:
        if sum(map(note.count, "[{")) > 1 << 16:  # each takes some 100 bytes of memory
            return None
        entry: Any = json.loads(note)
        if "settings" in entry:  # of resume.STEP.pt
            entry = entry["settings"]
            config = MODEL_CARDS.get(entry["model_card"])
        elif entry["version"] == VERSION:
            config = config_of(entry["config"])
        elif entry["version"] in range(VERSION, 1000):
            raise InputError(f"{path}: of a newer version of this program; update this one")
        else:
            return None
        dim, alpha = entry["lora_dim"], entry["lora_alpha"]
        if type(dim) is not int or type(alpha) not in (int, float) \
                or not (0 <= dim < 1 << 20 and 0 <= alpha < 1e30):
            return None
        dropout = entry.get("lora_dropout", 0)
        if type(dropout) not in (int, float) or not 0 <= dropout < 1:
            return None
        data, step = entry.get("data"), entry.get("step")
        trained = (f"{step} micro-batches on {data}" if type(step) is int and isinstance(data, str)
                   and data and data.isprintable() else "")
        return About(path, config, dim, alpha, dropout, trained)
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
