"""Exports what was trained here to the formats of transformers, PEFT and loralib.

    python src/gpt2_export.py --format hf|peft|loralib --init_checkpoint FILE --output_dir DIR

hf: the model as a folder of transformers, LoRA merged into its weights. peft: the LoRA as an
adapter. loralib: its matrices as the original experiment saves them, in lora.pt. The LoRA is that
of ``--lora_checkpoint``, which may be a PEFT adapter, else that in ``--init_checkpoint``. The
folder appears whole or not at all.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import about
import hf_export
import model_flags
import peft_adapter
from config import MODEL_CARDS, GPT2Config, LoRAConfig, card_of
from peft_adapter import Adapter, OurLoRA
from runtime import torch_file
from runtime.errors import InputError
from runtime.flags import ArgumentParser, at_least, number, share
from runtime.folders import exported
from runtime.progress import log
from runtime.script import run
from weight_names import EMBEDDING
from weights import Weights, lora_part, read_weights

LAYER = re.compile(r"transformer\.h\.(\d+)\.")


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--format", choices=["hf", "peft", "loralib"], required=True,
                        help="hf: the merged model for transformers; peft: the LoRA as an adapter; "
                             "loralib: the LoRA in lora.pt")
    parser.add_argument("--init_checkpoint", metavar="PATH", required=True,
                        help="weights of the base or of the whole model")
    parser.add_argument("--lora_checkpoint", metavar="PATH",
                        help="LoRA matrices, or the folder of a PEFT adapter")
    parser.add_argument("--output_dir", metavar="DIR", type=Path, required=True,
                        help="a new folder; an earlier export of the same format is replaced")
    parser.add_argument("--model_card", choices=MODEL_CARDS,
                        help="size of GPT-2; none: that of the file, or by the shapes")
    parser.add_argument("--lora_dim", type=at_least(1), help="LoRA's rank r; none: by its shapes")
    parser.add_argument("--lora_alpha", type=at_least(0, number),
                        help="the --lora_alpha of the training; none: that of the file")
    parser.add_argument("--lora_dropout", type=share, help="peft, loralib: that of the training; "
                        "none: that of the file, or 0")
    parser.add_argument("--base_model", metavar="HUB_ID",
                        help="peft: the base's name on the Hugging Face Hub, or its folder")
    parser.add_argument("--vocab", metavar="DIR", type=Path,
                        help="hf: folder of encoder.json and vocab.bpe; none: vocab")
    args = parser.parse_args()
    for flag, kinds in (("base_model", ["peft"]), ("lora_dropout", ["peft", "loralib"]),
                        ("vocab", ["hf"])):
        if getattr(args, flag) is not None and args.format not in kinds:
            parser.error(f"--{flag} does nothing with --format {args.format}")
    output = args.output_dir.resolve()
    for path in filter(None, (args.init_checkpoint, args.lora_checkpoint)):
        if output in (Path(path).resolve(), *Path(path).resolve().parents):
            parser.error(f"--output_dir {args.output_dir} holds {path}; give another folder")
    return args


def dimensions(args: argparse.Namespace, base: Weights) -> GPT2Config:
    """The model's dimensions: those that a file says, else of the card that fits the shapes.

    Raises InputError if there are none, if a flag contradicts its file, or if ``base`` is no whole
    GPT-2 of them.
    """
    path, embedding = args.init_checkpoint, base.get(EMBEDDING)
    if embedding is None:
        raise InputError(f"{path}: holds no {EMBEDDING}; give the base as --init_checkpoint")
    n_layer = len({match[1] for match in map(LAYER.match, base) if match})
    cards = [name for name, card in MODEL_CARDS.items()
             if (card.n_layer, card.n_embd) == (n_layer, *embedding.shape[1:])]
    if not cards and about.read(Path(path)).config is None:
        raise InputError(f"{path}: {n_layer} layers with {EMBEDDING} {embedding.shape} are of no "
                         "--model_card; keep the config.json of the weights beside them")
    flags = argparse.Namespace(**vars(args))
    if is_adapter(args.lora_checkpoint):  # some can be merged, though they have no rank and alpha
        flags.lora_checkpoint, flags.lora_dim = None, 0
    config = model_flags.complete(flags, (cards or list(MODEL_CARDS))[0])
    shapes, found = hf_export.shapes(config), {name: w.shape for name, w in base.items()}
    for name in sorted(shapes.keys() | found.keys()):
        if found.get(name) != shapes.get(name):
            raise InputError(f"{path}: {name} is {found.get(name, 'missing')}, in "
                             f"{card_of(config)} it is {shapes.get(name, 'missing')}; does "
                             "--model_card fit?")
    return config


def is_adapter(path: str | None) -> bool:
    return path is not None and peft_adapter.folder_of(path) is not None


def read_lora(args: argparse.Namespace, weights: Weights) -> OurLoRA | Adapter | None:
    """The LoRA of --lora_checkpoint or, without it, that among ``weights``; None if there is none.

    Raises InputError if a flag contradicts it, or if nothing says its alpha.
    """
    path = args.lora_checkpoint or args.init_checkpoint
    if is_adapter(args.lora_checkpoint):
        if args.lora_dim or args.lora_alpha is not None:
            raise InputError(f"{path}: an adapter says its rank and alpha itself; leave --lora_dim "
                             "and --lora_alpha out")
        adapter = peft_adapter.read(path)
        if args.lora_dropout is None:
            args.lora_dropout = adapter.dropout
        return adapter
    lora = lora_part(read_weights(path) if args.lora_checkpoint else weights)
    if not lora:
        if args.lora_checkpoint or args.lora_dim or args.lora_alpha is not None:
            raise InputError(f"{path}: holds no LoRA matrices; give a model.STEP.pt of a training "
                             "with LoRA, or the folder of a PEFT adapter")
        return None
    known = about.read(Path(path))
    alpha = known.lora_alpha if args.lora_alpha is None else args.lora_alpha
    if alpha is None:
        raise InputError(f"{path}: does not say its alpha; give the --lora_alpha of its training")
    found = peft_adapter.our_lora(lora, alpha, path)
    if args.lora_dim not in (None, found.r):
        raise InputError(f"{path}: its LoRA has rank {found.r}, not {args.lora_dim}; leave "
                         "--lora_dim out")
    if args.lora_dropout is None:
        args.lora_dropout = known.lora_dropout
    return found


def write_hf(folder: Path, args: argparse.Namespace, config: GPT2Config, base: Weights,
             lora: OurLoRA | Adapter | None) -> str:
    """The merged model; returns what was written, in words."""
    if isinstance(lora, OurLoRA):
        lora = peft_adapter.from_lora(lora, args.lora_checkpoint or args.init_checkpoint)
    if lora:
        base = peft_adapter.merge(lora, base)
    hf_export.write_model(folder, config, {name: base[name] for name in hf_export.shapes(config)})
    what = "the model, LoRA merged into it" if lora else "the model, which has no LoRA"
    if config.vocab_size < hf_export.VOCABULARY:
        return f"{what}; no tokenizer, because its vocabulary is not GPT-2's"
    hf_export.write_tokenizer(folder, args.vocab or Path("vocab"), config.n_positions)
    return what


def write_lora(folder: Path, args: argparse.Namespace, config: GPT2Config, base: Weights,
               lora: OurLoRA | Adapter | None) -> str:
    """The LoRA as an adapter or in lora.pt; returns what was written, in words."""
    path = args.lora_checkpoint or args.init_checkpoint
    if lora is None:
        raise InputError(f"{path}: holds no LoRA matrices; give a model.STEP.pt of a training with "
                         "LoRA, or the folder of a PEFT adapter as --lora_checkpoint")
    if isinstance(lora, Adapter):
        lora = peft_adapter.as_lora(lora, config)
    peft_adapter.require_fit(peft_adapter.from_lora(lora, path), base)
    dropout = args.lora_dropout or 0.0
    if args.format == "loralib":
        torch_file.save(folder / "lora.pt", {
            "model_state_dict": lora.weights,
            "about": about.describe(config, LoRAConfig(lora.r, lora.alpha, dropout), "", 0)})
    else:
        trained = about.read_lora(Path(path)).trained
        peft_adapter.write(folder, lora, dropout, trained, args.base_model)
    return (f"LoRA of rank {lora.r} and alpha {lora.alpha:g} on "
            f"{peft_adapter.thirds(lora.enable)}")


def main() -> None:
    args = parse_args()
    with exported(args.output_dir, args.format) as folder:
        weights = read_weights(args.init_checkpoint)
        base = {name: w for name, w in weights.items() if "lora_" not in name}
        config = dimensions(args, base)
        lora = read_lora(args, weights)
        write = write_hf if args.format == "hf" else write_lora
        what = write(folder, args, config, base, lora)
    log(f"saved {args.output_dir}: {what}")


if __name__ == "__main__":
    run(main)
