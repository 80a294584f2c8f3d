"""The weights that all sides load: random ones, or those of a trained checkpoint."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from shared import LORA, MODEL_CARDS, ROOT, WORK, InputError, log, torch_file
from workers import Worker


def random_model(card: str) -> dict:
    """The arguments of ``load`` for a random GPT-2 with LoRA; the files are written once.

    LoRA's B is random, too: if it were 0, the results of a side without LoRA would look correct.
    """
    base, lora = WORK / card / "base.pt", WORK / card / "lora.pt"
    if not base.is_file():
        room_for(base, 4 * _size(card))
        log(f"{card}: writing random weights to {base.parent}")
        _torch_init(card, base, "--random_seed", "0")
    if not lora.is_file():
        drawn = lora.with_suffix(".A.pt")
        _torch_init(card, drawn, "--random_seed", "1", "--lora_dim", str(LORA["r"]))
        state = torch_file.load(drawn)["model_state_dict"]
        random = np.random.default_rng(1)
        for name in sorted(name for name in state if name.endswith("lora_B")):
            state[name] = random.normal(0.0, 0.02, state[name].shape).astype(np.float32)
        torch_file.save(lora, {"model_state_dict": state})
        drawn.unlink()
    return {"card": card, "base": str(base), "lora": str(lora), **LORA}


def trained_model(card: str, path: Path) -> dict:
    """The same for a whole checkpoint: the last one of src/gpt2_ft.py, or a base without LoRA."""
    try:
        state = torch_file.load(path)["model_state_dict"]
        width = state["transformer.wte.weight"].shape[1]
    except (OSError, torch_file.TorchFileError, TypeError, KeyError):
        raise InputError(f"{path}: not a whole checkpoint; give the last model.STEP.pt of "
                         "src/gpt2_ft.py") from None
    if width != MODEL_CARDS[card].n_embd:
        raise InputError(f"{path}: n_embd is {width}, but {MODEL_CARDS[card].n_embd} in {card}; "
                         "give the --card that was trained")
    a = state.get("transformer.h.0.attn.c_attn.lora_A")  # (2 r, C)
    return {"card": card, "base": str(path), "lora": None,
            "r": 0 if a is None else a.shape[0] // 2, "alpha": LORA["alpha"]}


def converted(model: dict, form: str, script: str) -> str:
    """The folder with ``model`` in another program's format, by ``convert`` of bench/SCRIPT."""
    folder = WORK / model["card"] / form
    if model["lora"] is None:  # a training run may have replaced the checkpoint since
        folder = folder.with_name(f"{form}-checkpoint")
        shutil.rmtree(folder, ignore_errors=True)
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        log(f"{model['card']}: converting for {form} to {folder}")
        with Worker(script) as worker, tempfile.TemporaryDirectory(dir=folder.parent) as fresh:
            worker.ask("convert", folder=f"{fresh}/{form}", **model)
            Path(fresh, form).rename(folder)
    return str(folder)


def _torch_init(card: str, output: Path, *flags: str) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, ROOT / "align/torch_init.py", "--model_card", card,
               "--output", output, *flags]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        last = (process.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(f"align/torch_init.py: {last}")


def _size(card: str) -> int:
    """The approximate number of bytes of a card's weights in float32."""
    config = MODEL_CARDS[card]
    return 4 * config.n_embd * (config.vocab_size + 12 * config.n_layer * config.n_embd)


def room_for(path: Path, size: int) -> None:
    """Raises InputError if the disk of ``path`` has less than ``size`` bytes left."""
    place = next(folder for folder in path.parents if folder.is_dir())
    free = shutil.disk_usage(place).free
    if free < size:
        raise InputError(f"{path}: needs {size / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are "
                         "free on that disk; free some space")
