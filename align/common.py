"""The code that the PyTorch side shares with ``src/``: file formats and a script's manners.

Everything else in this folder is written apart from ``src/``; only then does it mean something
that the two sides agree. ``src/`` comes last on the module path, for it has a ``loralib`` of its
own (in Jittor) where this side means PyTorch's.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "src"))

import torch_file  # noqa: E402
from cli import InputError, Progress, log, progress, run  # noqa: E402
from formats import read_jsonl, replacing, write_jsonl  # noqa: E402

__all__ = ["InputError", "Progress", "log", "progress", "read_jsonl", "replacing", "run",
           "torch_file", "write_jsonl"]
