"""What the PyTorch side imports from ``src/``: helpers of a script, file formats, flags.

Everything else in this folder is written independently of ``src/``. Otherwise, both sides could
have the same mistake, and the comparison would not find it.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "src"))

from runtime import torch_file  # noqa: E402
from runtime.errors import InputError  # noqa: E402
from runtime.flags import ArgumentParser, read_flags  # noqa: E402
from runtime.formats import read_jsonl, replacing, write_jsonl  # noqa: E402
from runtime.progress import Progress, log, progress  # noqa: E402
from runtime.script import run  # noqa: E402

__all__ = ["ROOT", "ArgumentParser", "InputError", "Progress", "log", "progress", "read_flags",
           "read_jsonl", "replacing", "run", "torch_file", "write_jsonl"]
