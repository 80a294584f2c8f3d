"""What the parent processes of all benchmarks import from ``src/``, and the experiment's flags.

A parent computes nothing that is timed and imports neither Jittor nor PyTorch.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "src"))

from config import MODEL_CARDS, GPT2Config  # noqa: E402
from dataset import FTDataset  # noqa: E402
from runtime import torch_file  # noqa: E402
from runtime.errors import InputError  # noqa: E402
from runtime.flags import ArgumentParser, at_least, read_flags  # noqa: E402
from runtime.formats import read_jsonl, replacing, write_jsonl  # noqa: E402
from runtime.progress import Progress, log  # noqa: E402
from runtime.script import run  # noqa: E402

WORK = ROOT / "trained_models" / "bench"  # generated weights and data, kept for the next run
RESULTS = ROOT / "bench" / "results"
FLAGS = ROOT / "data" / "experiment.ini"
SAMPLES = 420  # size of E2E's training set, as create_datasets.sh draws it

_ft, _beam = read_flags(FLAGS, "gpt2_ft"), read_flags(FLAGS, "gpt2_beam")
LORA = {"r": int(_ft["lora_dim"]), "alpha": int(_ft["lora_alpha"])}
TRAIN = {"batch_size": int(_ft["train_batch_size"]), "seq_len": int(_ft["seq_len"]),
         "grad_acc": int(_ft["grad_acc"]), "lora_dropout": float(_ft["lora_dropout"]),
         "label_smooth": float(_ft["label_smooth"]), "lr": float(_ft["lr"]),
         "warmup_step": int(_ft["warmup_step"]),
         "max_step": int(_ft["max_epoch"]) * SAMPLES // int(_ft["train_batch_size"]),
         "weight_decay": float(_ft["weight_decay"]), "beta2": float(_ft["adam_beta2"]),
         "seed": int(_ft["random_seed"])}
BEAM = {"beam": int(_beam["beam"]), "eval_len": int(_beam["eval_len"]),
        "length_penalty": float(_beam["length_penalty"]),
        "no_repeat_ngram_size": int(_beam["no_repeat_ngram_size"]),
        "eos": [50256, int(_beam["eos_token_id"])]}

__all__ = ["BEAM", "FLAGS", "LORA", "MODEL_CARDS", "RESULTS", "ROOT", "SAMPLES", "TRAIN", "WORK",
           "ArgumentParser", "FTDataset", "GPT2Config", "InputError", "Progress", "at_least", "log",
           "read_jsonl", "replacing", "run", "torch_file", "write_jsonl"]
