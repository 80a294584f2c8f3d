"""What the parents of all benches share with ``src/``: data, weights, manners of a script.

A parent computes nothing that is timed and imports neither Jittor nor PyTorch.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "src"))

import torch_file  # noqa: E402
from cli import InputError, Progress, at_least, log, run  # noqa: E402
from config import MODEL_CARDS, GPT2Config  # noqa: E402
from dataset import FTDataset  # noqa: E402
from formats import read_jsonl, replacing, write_jsonl  # noqa: E402

WORK = ROOT / "trained_models" / "bench"  # weights and data made here, kept for the next run
RESULTS = ROOT / "bench" / "results"

# The flags of work.sh.
LORA = {"r": 4, "alpha": 32}
TRAIN = {"batch_size": 2, "seq_len": 64, "grad_acc": 2, "lora_dropout": 0.1, "label_smooth": 0.1,
         "lr": 0.0002, "warmup_step": 500, "max_step": 1050, "weight_decay": 0.01,
         "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-6, "seed": 2025}
BEAM = {"beam": 10, "eval_len": 32, "length_penalty": 0.8, "no_repeat_ngram_size": 4,
        "eos": [50256, 628]}

__all__ = ["BEAM", "LORA", "MODEL_CARDS", "RESULTS", "ROOT", "TRAIN", "WORK", "FTDataset",
           "GPT2Config", "InputError", "Progress", "at_least", "log", "read_jsonl", "replacing",
           "run", "torch_file", "write_jsonl"]
