"""What the scripts that load a model share: its flags, and what those not given take from files.

A flag that is not given, and that the checkpoint states, is the checkpoint's; see about.py.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import about
from config import MODEL_CARDS, GPT2Config, card_of
from runtime.errors import InputError
from runtime.flags import at_least, number
from runtime.progress import log

LORA_DEFAULTS = {"lora_dim": 0, "lora_alpha": 128}  # the original's


def add_flags(parser: argparse.ArgumentParser, default_card: str,
              trains: bool) -> argparse._ArgumentGroup:
    """Adds the flags that name a model and its weights; returns their group in the help.

    A script that ``trains`` may start from random weights.
    """
    model = parser.add_argument_group("model")
    model.add_argument("--model_card", choices=[*MODEL_CARDS, "auto"],
                       help="size of GPT-2; auto: that of --init_checkpoint, which says it; none: "
                            f"auto, or {default_card} if it does not")
    model.add_argument("--init_checkpoint", metavar="PATH", required=not trains,
                       help="weights: a file (.bin, .pt, .safetensors, .pkl), a Hugging Face "
                            "folder or an index" + "; none: random" * trains)
    model.add_argument("--lora_checkpoint", metavar="PATH",
                       help="LoRA matrices or the folder of a PEFT adapter, if --init_checkpoint "
                            "has only the base")
    model.add_argument("--lora_dim", type=at_least(0), help="LoRA's rank r; 0: " + (
        "every weight trains" if trains else "no LoRA") + "; none: that of the checkpoint, or 0")
    model.add_argument("--lora_alpha", type=at_least(0, number),
                       help="LoRA's output is scaled by alpha / r; none: that of the checkpoint, "
                            "or 128")
    model.add_argument("--precision", default="float32",
                       choices=["float32", "bf16"] + ["int8"] * (not trains),
                       help="of the frozen matrices and of the products with them; bf16 " + (
                           "trains" if trains else "or int8 (CPU only) generates")
                            + " faster, results differ a little")
    return model


def complete(args: argparse.Namespace, default_card: str) -> GPT2Config:
    """Sets --model_card, --lora_dim and --lora_alpha where they are not given; the dimensions.

    They are those of the checkpoints, if these say them, else the defaults; logs which are taken
    from a file. Raises InputError where a flag contradicts its file.
    """
    base = about.read(Path(args.init_checkpoint)) if args.init_checkpoint else None
    lora = about.read_lora(Path(args.lora_checkpoint)) if args.lora_checkpoint else base
    taken: dict[Path, list[str]] = {}
    known = [(one.path, one.config) for one in (base, lora) if one and one.config]
    config = _complete_card(args, default_card, known, taken)
    if lora and lora.lora_dim and args.lora_dim != 0:  # --lora_dim 0: the base alone
        for flag in LORA_DEFAULTS:
            _settle(args, flag, getattr(lora, flag), lora.path, taken)
    for flag, default in LORA_DEFAULTS.items():
        if getattr(args, flag) is None:
            setattr(args, flag, default)
    for path, flags in taken.items():
        log(f"{path}: taken from it: {', '.join(flags)}")
    return config


def _complete_card(args: argparse.Namespace, default: str, known: list[tuple[Path, GPT2Config]],
                   taken: dict[Path, list[str]]) -> GPT2Config:
    given = None if args.model_card == "auto" else args.model_card
    if not known:
        if args.model_card == "auto":
            raise InputError(f"{args.init_checkpoint}: neither this file nor a config.json beside "
                             "it says the model's dimensions; name them by --model_card")
        args.model_card = given or default
        return MODEL_CARDS[args.model_card]
    (path, config), (other_path, other) = known[0], known[-1]
    if config != other:
        raise InputError(f"{other_path}: trained on another base than {path}: "
                         f"{_difference(other, config, 'that')}; give its own")
    if given and MODEL_CARDS[given] != config:
        if path.name == "config.json":
            raise InputError(f"{path}: {_difference(config, MODEL_CARDS[given], given)}; leave "
                             "--model_card out, or this file is not of these weights")
        raise InputError(f"{path}: trained with --model_card {card_of(config)}, not {given}; leave "
                         "the flag out")
    args.model_card = card_of(config)
    if not given:
        taken.setdefault(path, []).append(f"--model_card {args.model_card}")
    return config


def _settle(args: argparse.Namespace, flag: str, value: object, path: Path,
            taken: dict[Path, list[str]]) -> None:
    given = getattr(args, flag)
    if given is None:
        setattr(args, flag, value)
        taken.setdefault(path, []).append(f"--{flag} {value}")
    elif given != value:
        raise InputError(f"{path}: trained with --{flag} {value}, not {given}; leave the flag out")


def _difference(one: GPT2Config, other: GPT2Config, where: str) -> str:
    """The first dimension in which they differ, as "n_head is 8, but 12 in gpt2.sm"."""
    name = next(name for name in asdict(one) if getattr(one, name) != getattr(other, name))
    return f"{name} is {getattr(one, name)}, but {getattr(other, name)} in {where}"
