"""Writes random weights, drawn by PyTorch, from which both sides start.

    python align/torch_init.py --model_card gpt2.nano --random_seed 0 --output base.pt
    python align/torch_init.py --model_card gpt2.nano --lora_dim 4 --output lora.pt

Without ``--lora_dim`` these are a whole GPT-2; with it, LoRA matrices only, drawn by loralib.
"""

from __future__ import annotations

import torch

import torch_model
from common import ArgumentParser, log, run
from torch_flags import at_least


def main() -> None:
    parser = ArgumentParser("Writes random weights to start from.")
    parser.add_argument("--model_card", required=True, choices=list(torch_model.CARDS))
    parser.add_argument("--lora_dim", type=at_least(0), default=0, help="rank r; 0: a base")
    parser.add_argument("--random_seed", type=at_least(0), default=10)
    parser.add_argument("--output", required=True, metavar="FILE")
    args = parser.parse_args()
    torch.manual_seed(args.random_seed)
    model = torch_model.build(args.model_card, args.lora_dim)
    torch_model.save_weights(model, args.output, lora_only=args.lora_dim > 0)
    log(f"saved {args.output}")


if __name__ == "__main__":
    run(main)
