"""The flags that torch_train.py and torch_beam.py share, and the model they describe."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

import torch
from transformers import GPT2LMHeadModel

import torch_model
from common import InputError


def at_least(smallest: int) -> Callable[[str], int]:
    """An argparse type: integers from ``smallest`` on."""
    def integer(text: str) -> int:
        if int(text) < smallest:
            raise argparse.ArgumentTypeError(f"{text} is less than {smallest}")
        return int(text)
    return integer


def add_model_flags(parser: argparse.ArgumentParser, card: str) -> None:
    """Adds the flags for the model, its weights, the device, the precision and the output."""
    parser.add_argument("--model_card", default=card, choices=list(torch_model.CARDS),
                        help="size of the model (default: %(default)s)")
    parser.add_argument("--init_checkpoint", metavar="FILE",
                        help="a whole model: GPT-2 as published, or one of this experiment")
    parser.add_argument("--lora_checkpoint", metavar="FILE",
                        help="LoRA weights to add to the base of --init_checkpoint")
    parser.add_argument("--lora_dim", type=at_least(0), default=0, help="rank r; 0 means no LoRA")
    parser.add_argument("--lora_alpha", type=int, default=128,
                        help="the update is scaled by alpha / r (default: %(default)s)")
    parser.add_argument("--seq_len", type=at_least(1), default=512,
                        help="tokens of a sample; longer ones are cut (default: %(default)s)")
    parser.add_argument("--work_dir", default=os.getenv("PT_OUTPUT_DIR", "gpt2_model"),
                        metavar="DIR", help="where output goes (default: %(default)s)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto",
                        help="where to compute; auto takes a GPU if there is one")
    parser.add_argument("--precision", choices=["float32", "bf16", "float64"], default="float32",
                        help="of the computation; bf16: of matrix products only, by autocast "
                             "(default: %(default)s)")


def make_model(args: argparse.Namespace, lora_dropout: float = 0.0) -> GPT2LMHeadModel:
    """The model that the flags describe, with its weights. Raises InputError for wrong flags."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch finds no usable GPU; use --device cpu")
    on_gpu = args.device != "cpu" and torch.cuda.is_available()
    model = torch_model.build(args.model_card, args.lora_dim, args.lora_alpha, lora_dropout)
    if args.seq_len > model.config.n_positions:
        raise InputError(f"--seq_len {args.seq_len}: {args.model_card} reads "
                         f"{model.config.n_positions} tokens at most")
    if args.init_checkpoint:
        torch_model.load_weights(model, args.init_checkpoint)
    if args.lora_checkpoint:
        torch_model.load_lora(model, args.lora_checkpoint)
    model.to("cuda" if on_gpu else "cpu",
             torch.float64 if args.precision == "float64" else torch.float32)
    return torch_model.with_bf16_products(model) if args.precision == "bf16" else model
