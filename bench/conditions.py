"""The conditions that all benchmarks share: their flags, and the processor's instructions."""

from __future__ import annotations

import argparse
import os
import shutil

import quiet
from shared import WORK, InputError, replacing

# What keeps the libraries of other sides from newer instructions than AVX2.
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2",  # PyTorch, also its compiled functions
        "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "CT2_FORCE_CPU_ISA": "AVX2"}


def add_flags(parser: argparse.ArgumentParser, name: str) -> None:
    """The flags of all benchmarks; ``name`` is that of the result."""
    parser.add_argument("--quiet", type=quiet.share, default=quiet.LIMIT, help="largest share of "
                        "the processors that other programs may take in a round; a round in which "
                        "they take more is measured again; 1: every round counts")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to compute")
    parser.add_argument("--isa", choices=["native", "avx2"], default="native", help="instructions "
                        "of the processor that all sides use; avx2: no newer ones, as on a "
                        "processor that has only these")
    parser.add_argument("--name", default=name, help="name of the files in bench/results")


def limit_instructions(isa: str) -> None:
    """Keeps the sides that start from now on to ``isa``, native or avx2.

    Jittor compiles with -march=native, so ours gets a compiler that adds another -march, which
    counts because it is the last.
    """
    if isa == "native":
        return
    compiler = shutil.which(os.environ.get("cc_path", "g++"))
    if not compiler:
        raise InputError("g++ not found; apt-get install g++")
    folder = WORK / isa
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "g++") as file:
        file.write(f'#!/bin/sh\nexec "{compiler}" "$@" -march=haswell\n'.encode())
    (folder / "g++").chmod(0o755)
    os.environ.update(AVX2, cc_path=str(folder / "g++"))
