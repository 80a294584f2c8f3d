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
from dataclasses import replace
from pathlib import Path

import hf_export
import peft_adapter
from config import MODEL_CARDS, GPT2Config
from peft_adapter import Adapter, OurLoRA
from runtime import torch_file
from runtime.errors import InputError
from runtime.flags import ArgumentParser, at_least, share
from runtime.folders import exported
from runtime.progress import log
from runtime.script import run
from weights import EMBEDDING, Weights, lora_part, read_weights


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--format", choices=["hf", "peft", "loralib"], required=True,
                        help="hf: the merged model for transformers; peft: the LoRA as an adapter; "
                             "loralib: the LoRA in lora.pt")
    parser.add_argument("--init_checkpoint", metavar="FILE", required=True,
                        help="weights of the base or of the whole model")
    parser.add_argument("--lora_checkpoint", metavar="FILE",
                        help="LoRA matrices, or the folder of a PEFT adapter")
    parser.add_argument("--output_dir", metavar="DIR", type=Path, required=True,
                        help="a new folder; an earlier export of the same format is replaced")
    parser.add_argument("--model_card", choices=MODEL_CARDS,
                        help="size of GPT-2; none: by the shapes of the weights")
    parser.add_argument("--lora_dim", type=at_least(1), help="LoRA's rank r; none: by its shapes")
    parser.add_argument("--lora_alpha", type=at_least(0, float),
                        help="the --lora_alpha of the training")
    parser.add_argument("--lora_dropout", type=share, default=0.0,
                        help="peft: the dropout for those who train on")
    parser.add_argument("--base_model", metavar="HUB_ID",
                        help="peft: the base's name on the Hugging Face Hub, or its folder")
    parser.add_argument("--vocab", metavar="DIR", type=Path, default=Path("vocab"),
                        help="hf: folder of encoder.json and vocab.bpe")
    args = parser.parse_args()
    if args.base_model and args.format != "peft":
        parser.error(f"--base_model does nothing with --format {args.format}")
    if args.lora_dropout and args.format != "peft":
        parser.error(f"--lora_dropout does nothing with --format {args.format}")
    output = args.output_dir.resolve()
    for path in filter(None, (args.init_checkpoint, args.lora_checkpoint)):
        if output in (Path(path).resolve(), *Path(path).resolve().parents):
            parser.error(f"--output_dir {args.output_dir} holds {path}; give another folder")
    return args


def config_of(weights: Weights, path: str, model_card: str | None) -> GPT2Config:
    """The dimensions of a whole GPT-2 by its shapes; the number of heads is that of the card.

    Raises InputError if weights are missing, unknown or misshapen, or if no card fits.
    """
    found = [tuple(weights[name].shape) if name in weights else () for name in
             (EMBEDDING, "transformer.wpe.weight")]
    if any(len(shape) != 2 for shape in found):
        raise InputError(f"{path}: holds no {EMBEDDING}, of (tokens, n_embd), or no "
                         "transformer.wpe.weight; give a GPT-2 as --init_checkpoint")
    (vocab_size, n_embd), (n_positions, _) = found
    n_layer = len({match[1] for match in (re.match(r"transformer\.h\.(\d+)\.", name)
                                          for name in weights) if match})
    cards = {name: card for name, card in MODEL_CARDS.items()
             if (card.n_layer, card.n_embd) == (n_layer, n_embd)}
    if not cards or model_card not in (None, *cards):
        raise InputError(f"{path}: {n_layer} layers of {n_embd} numbers, as in "
                         f"{' and '.join(cards) or 'no --model_card'}"
                         + f", not {model_card}" * bool(model_card))
    card = cards[model_card] if model_card else next(iter(cards.values()))
    config = replace(card, vocab_size=vocab_size, n_positions=n_positions)
    for name, shape in hf_export.shapes(config).items():
        if name not in weights or weights[name].shape != shape:
            is_now = f"is {weights[name].shape}" if name in weights else "is missing"
            raise InputError(f"{path}: {name} {is_now}, it should be {shape}; give a GPT-2 as "
                             "--init_checkpoint")
    return config


def read_lora(args: argparse.Namespace, weights: Weights) -> OurLoRA | Adapter | None:
    """The LoRA of --lora_checkpoint or, without it, that among ``weights``; None if there is none.

    Raises InputError if a flag contradicts it, or if its alpha is not known.
    """
    path = args.lora_checkpoint or args.init_checkpoint
    if args.lora_checkpoint and peft_adapter.folder_of(path):
        if args.lora_dim or args.lora_alpha is not None:
            raise InputError(f"{path}: is an adapter, which says its rank and alpha itself; leave "
                             "--lora_dim and --lora_alpha out")
        return peft_adapter.read(path)
    lora = lora_part(read_weights(path) if args.lora_checkpoint else weights)
    if not lora:
        if args.lora_checkpoint:
            raise InputError(f"{path}: holds no LoRA matrices; give a model.STEP.pt of a training "
                             "with LoRA, or the folder of a PEFT adapter")
        return None
    if args.lora_alpha is None:
        raise InputError(f"{path}: give the --lora_alpha of its training")
    found = peft_adapter.our_lora(lora, args.lora_alpha, path)
    if args.lora_dim not in (None, found.r):
        raise InputError(f"{path}: its LoRA has rank {found.r}, not {args.lora_dim}; leave "
                         "--lora_dim out")
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
    hf_export.write_tokenizer(folder, args.vocab, config.n_positions)
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
    if args.format == "loralib":
        torch_file.save(folder / "lora.pt", {"model_state_dict": lora.weights})
    else:
        peft_adapter.write(folder, lora, args.lora_dropout, args.base_model)
    return (f"LoRA of rank {lora.r} and alpha {lora.alpha:g} on "
            f"{peft_adapter.thirds(lora.enable)}")


def main() -> None:
    args = parse_args()
    with exported(args.output_dir, args.format, {}) as folder:
        weights = read_weights(args.init_checkpoint)
        lora = read_lora(args, weights)
        base = {name: w for name, w in weights.items() if "lora_" not in name}
        config = config_of(base, args.init_checkpoint, args.model_card)
        write = write_hf if args.format == "hf" else write_lora
        what = write(folder, args, config, base, lora)
    log(f"saved {args.output_dir}: {what}")


if __name__ == "__main__":
    run(main)
