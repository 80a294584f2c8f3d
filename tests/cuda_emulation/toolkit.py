"""Builds a folder that stands for a CUDA toolkit and a driver: ``--device cuda`` without a GPU.

``bin/nvcc`` compiles kernels for the CPU, ``include`` and ``lib64`` have the parts of CUDA that
Jittor uses (see cudart.cpp). No file is NVIDIA's or Jittor's.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).parent
LIBRARIES = ("libcudart.so", "libcublas.so", "libcurand.so", "libcuda.so", "libcuda.so.1")
COUNTS = ("launches", "syncs", "to_device", "to_host", "bytes_to_device", "bytes_to_host")


def kernel_header(name: str = "emulation_kernel.h") -> str:
    """What bin/nvcc includes before a source, as one text."""
    text = (SOURCE / "include" / name).read_text().replace("#pragma once\n", "")
    return re.sub(r'^#include "(.+)"$', lambda line: kernel_header(line[1]), text,
                  flags=re.MULTILINE)


def with_calls(text: str) -> str:
    """C++ in which each launch has become a call, as bin/nvcc makes it."""
    loader = importlib.machinery.SourceFileLoader("nvcc", str(SOURCE / "bin" / "nvcc"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("nvcc", loader))
    loader.exec_module(module)
    return module.with_calls(text)


def load(folder: Path) -> ctypes.CDLL:
    """Loads the emulation's library, for kernels that g++ compiles and that run on host memory."""
    place = Path(build(folder)["nvcc_path"]).parents[1]
    return ctypes.CDLL(str(place / "lib64" / LIBRARIES[0]), ctypes.RTLD_GLOBAL)


def counts(library: ctypes.CDLL) -> dict[str, int]:
    """What has been counted so far, see cudart.cpp."""
    numbers = (ctypes.c_long * len(COUNTS))()
    library.emulation_counts(numbers)
    return dict(zip(COUNTS, numbers))


def build(folder: Path) -> dict[str, str]:
    """Builds the toolkit below ``folder``, unless it is there; the environment to use it in."""
    files = [SOURCE / "cudart.cpp", SOURCE / "bin" / "nvcc", *sorted(SOURCE.glob("include/*.h"))]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:8]
    place = folder / f"emulation-{digest}"
    if not place.is_dir():
        fresh = folder / f".emulation-{digest}.{os.getpid()}"
        for name in ("bin", "include"):
            shutil.copytree(SOURCE / name, fresh / name)
        (fresh / "lib64").mkdir()
        subprocess.run(["g++", "-std=c++17", "-O2", "-shared", "-fPIC", SOURCE / "cudart.cpp",
                        "-o", fresh / "lib64" / LIBRARIES[0]], check=True)
        for name in LIBRARIES[1:]:
            (fresh / "lib64" / name).symlink_to(LIBRARIES[0])
        fresh.rename(place)
    paths = [str(place / "lib64"), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return {"nvcc_path": str(place / "bin" / "nvcc"), "LD_LIBRARY_PATH": os.pathsep.join(paths)}
