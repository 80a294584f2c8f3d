"""Chooses a GPU, a CUDA toolkit and a compiler for Jittor, and lays out the toolkit for it.

Jittor 1.3.11 compiles with CUDA 11 and 12. It expects ``bin/nvcc``, ``include/`` and ``lib64/`` in
one folder, with libraries named ``.so``. Toolkits by pip (requirement-cuda.txt) and by conda have
other folders and names, and CUDA 13 needs C++17 and lacks two members of a struct.
:meth:`Cuda.environment` makes a folder of links for them in which all of this is as Jittor expects.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Iterator

from runtime import processes
from runtime.errors import InputError

Version = tuple[int, int]

SUPPORTED = (11, 0), (14, 0)  # from, below: the toolkits that are tried
WHEELS: Version = (13, 0)  # the version of requirement-cuda.txt
LEAST_CAPABILITY = {11: (3, 5), 12: (5, 0), 13: (7, 5)}  # that a toolkit compiles for, by version
# The newest capability for which Jittor compiles machine code, by the toolkit's first such version.
NEWEST_CAPABILITY: dict[Version, Version] = {(11, 0): (8, 0), (11, 1): (8, 6), (11, 8): (9, 0)}
PLACES = "/usr/local/cuda/bin/nvcc", "/usr/local/cuda-*/bin/nvcc", "/opt/cuda/bin/nvcc"
COMPILERS = "g++", *(f"g++-{version}" for version in range(15, 8, -1))
LIBRARIES = "cudart", "cublas", "curand"  # what Jittor links
HEADERS = "include/cuda_runtime.h", "targets/*/include/cuda_runtime.h"
LINKED = *LIBRARIES, "nvrtc", "cudadevrt"  # what these load; what nvcc links always

NVCC = """#!/bin/sh
# The C++ of CUDA 13's headers is C++17; Jittor asks for C++14.
for argument; do
    shift
    case $argument in -std=c++14) argument=-std=c++17 ;; esac
    set -- "$@" "$argument"
done
exec {nvcc} "$@"
"""
CUDA_RUNTIME_H = """#pragma once
#include "{header}"
// CUDA 13 took these two out of cudaDeviceProp. Jittor names them in a function that nothing calls.
#define computeMode ECCEnabled
#define clockRate memoryBusWidth
"""
# What Jittor's misc/cuda_limits.h takes from the header of a library that is not needed otherwise.
NPP_H = """#pragma once
#define NPP_MIN_32U 0
#define NPP_MAX_32U 4294967295U
#define NPP_MIN_32S (-2147483647 - 1)
#define NPP_MAX_32S 2147483647
#define NPP_MIN_64U 0
#define NPP_MAX_64U 18446744073709551615ULL
#define NPP_MIN_64S (-9223372036854775807LL - 1)
#define NPP_MAX_64S 9223372036854775807LL
"""


class _Unusable(Exception):
    """Why a toolkit cannot be used, with the remedy."""


@dataclass(frozen=True)
class Gpu:
    """The GPU of this process."""
    name: str  # as CUDA_VISIBLE_DEVICES names it
    capability: Version
    driver: Version  # the newest CUDA that the driver supports


@dataclass(frozen=True)
class Cuda:
    """A GPU, and a toolkit and a compiler with which Jittor can use it."""
    gpu: Gpu
    nvcc: str
    version: Version
    compiler: str

    def environment(self, place: Path) -> dict[str, str]:
        """The variables for Jittor's import. Lays out the toolkit in ``place`` if necessary."""
        variables = {"CUDA_VISIBLE_DEVICES": self.gpu.name, "cc_path": self.compiler,
                     "nvcc_path": self.nvcc if self._suits_jittor() else self._lay_out(place)}
        newest = max(at for since, at in NEWEST_CAPABILITY.items() if since <= self.version)
        if self.gpu.capability > newest:  # the driver compiles PTX for it
            variables["nvcc_flags"] = f"{os.environ.get('nvcc_flags', '')} -code=compute_" \
                                      f"{newest[0]}{newest[1]} "
        return variables

    def check_runtime(self) -> None:
        """Raises InputError if the toolkit's own library finds no GPU. Jittor would crash."""
        library, *_ = _libraries(Path(self.nvcc).resolve().parents[1], ("cudart.so",))
        count = ctypes.c_int(0)
        error = ctypes.CDLL(str(library)).cudaGetDeviceCount(ctypes.byref(count))
        if error or not count.value:
            raise InputError(f"{library}: this library of CUDA {_text(self.version)} finds no GPU "
                             f"(error {error}), though the driver has one; update the driver, or "
                             "use --device cpu")

    def _suits_jittor(self) -> bool:
        if self.version >= (13, 0):
            return False
        root = Path(self.nvcc).resolve().parents[1]
        needed = "include/npp.h", *(f"lib64/lib{name}.so" for name in LIBRARIES)
        # Jittor has a case for Debian's.
        return self.nvcc == "/usr/bin/nvcc" or all((root / name).is_file() for name in needed)

    def _lay_out(self, place: Path) -> str:
        """Makes the folder; returns its nvcc. The folder's name depends on all that is in it."""
        nvcc = Path(self.nvcc).resolve()
        headers, *_ = _files(nvcc.parents[1], *HEADERS)
        links = {f"include/{path.name}": path for path in sorted(headers.parent.iterdir())}
        for path in _libraries(nvcc.parents[1], LINKED):
            links[f"lib64/{path.name}"] = path
            links[f"lib64/{re.sub(r'[.]so[.].*', '.so', path.name)}"] = path
        texts = {"bin/nvcc": NVCC.format(nvcc=shlex.quote(str(nvcc)))}
        if "include/npp.h" not in links:
            texts["include/npp.h"] = NPP_H
        if self.version >= (13, 0):
            header = "include/cuda_runtime.h"
            texts[header] = CUDA_RUNTIME_H.format(header=links.pop(header))
        key = hashlib.sha256(repr((links, texts)).encode()).hexdigest()[:8]
        folder = place / key
        if not folder.is_dir():
            place.mkdir(parents=True, exist_ok=True)
            fresh = Path(tempfile.mkdtemp(dir=place))
            for name, path in links.items():
                (fresh / name).parent.mkdir(parents=True, exist_ok=True)
                (fresh / name).symlink_to(path)
            for name, text in texts.items():
                (fresh / name).parent.mkdir(parents=True, exist_ok=True)
                (fresh / name).write_text(text)
            (fresh / "bin/nvcc").chmod(0o755)
            try:
                fresh.rename(folder)
            except OSError:
                if not folder.is_dir():  # otherwise another process has made it
                    raise
                shutil.rmtree(fresh)
        return str(folder / "bin/nvcc")


def find_cuda() -> tuple[Cuda | None, str]:
    """(what Jittor needs to use a GPU, ""), or (None, the reason why it can use none).

    Each of the processes that mpirun starts on a machine has a GPU of its own.
    """
    gpu, obstacle = _find_gpu()
    return _find_toolkit(gpu) if gpu else (None, obstacle)


def needs_wheels() -> str:
    """The reason why no GPU can be used, where requirement-cuda.txt would help, else ""."""
    gpu, _ = _find_gpu()
    if gpu is None or os.environ.get("nvcc_path") or any(map(os.path.isfile, _wheels())):
        return ""
    try:
        _check_gpu(gpu, WHEELS)
    except _Unusable:
        return ""
    return _find_toolkit(gpu)[1]


def _find_toolkit(gpu: Gpu) -> tuple[Cuda | None, str]:
    obstacles = []
    for nvcc in _candidates():
        try:
            return _examine(nvcc, gpu), ""
        except _Unusable as error:
            obstacles.append(f"{nvcc} {error}")
    return None, "a GPU, but " + (", and ".join(obstacles) or "no nvcc; SETUP_CUDA=1 bash setup.sh "
                                  "installs a toolkit by pip, or install CUDA 12.x")


def _find_gpu() -> tuple[Gpu | None, str]:
    try:
        query = subprocess.run([sys.executable, "-I", Path(__file__).with_name("cuda_driver.py")],
                               capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return None, "the NVIDIA driver does not answer; see whether nvidia-smi does"
    if query.returncode == 1:
        return None, (query.stderr.strip().splitlines() or ["the NVIDIA driver fails"])[-1]
    if query.returncode:
        return None, f"the NVIDIA driver crashes (exit code {query.returncode})"
    said = json.loads(query.stdout)
    count, number = len(said["capabilities"]), processes.local_rank()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if count < processes.local_size():
        remedy = ", so let CUDA_VISIBLE_DEVICES name all of them in each" if visible else ""
        return None, (f"{processes.local_size()} processes on this machine, GPUs: {count}; each "
                      f"process takes one of its own{remedy}")
    return Gpu(visible.split(",")[number].strip() if visible else str(number),
               tuple(said["capabilities"][number]),
               (said["version"] // 1000, said["version"] % 1000 // 10)), ""


def _wheels() -> list[str]:
    """Where requirement-cuda.txt may have installed nvcc."""
    return [os.path.join(folder, "nvidia/cu13/bin/nvcc") for folder in sys.path]


def _candidates() -> Iterator[str]:
    """The nvcc to try, one after the other: only nvcc_path, if it is set."""
    asked = os.environ.get("nvcc_path")
    places = [asked] if asked else [
        *_wheels(), shutil.which("nvcc") or "",
        *(path for place in PLACES for path in sorted(glob(place), reverse=True))]
    seen = set()
    for place in places:
        if os.access(place, os.X_OK) and os.path.realpath(place) not in seen:
            seen.add(os.path.realpath(place))
            yield place


def _examine(nvcc: str, gpu: Gpu) -> Cuda:
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", said)
    version = (int(found[1]), int(found[2])) if found else (0, 0)
    if not SUPPORTED[0] <= version < SUPPORTED[1]:
        raise _Unusable(f"is CUDA {_text(version)}, Jittor compiles with 11, 12 and 13; "
                        "install one of these beside it and set nvcc_path")
    _check_gpu(gpu, version)
    root = Path(nvcc).resolve().parents[1]
    for file in (f"lib{name}.so" for name in LIBRARIES):
        if not any(path.name.startswith(file) for path in _libraries(root, LIBRARIES)):
            raise _Unusable(f"has no {file} beside it; install the whole toolkit")
    if not _files(root, *HEADERS):
        raise _Unusable("has no cuda_runtime.h beside it; install the whole toolkit")
    return Cuda(gpu, nvcc, version, _choose_compiler(nvcc))


def _check_gpu(gpu: Gpu, version: Version) -> None:
    least = LEAST_CAPABILITY[version[0]]
    if gpu.capability < least:
        raise _Unusable(f"compiles for GPUs of compute capability {_text(least)} or more, and this "
                        f"one has {_text(gpu.capability)}; install an older CUDA")
    # PTX of a newer version is not accepted; machine code of the same major version is.
    needs_ptx = gpu.capability > max(NEWEST_CAPABILITY.values())
    if gpu.driver < (version if needs_ptx else version[:1]):
        raise _Unusable(f"is CUDA {_text(version)}, and the NVIDIA driver is for CUDA "
                        f"{_text(gpu.driver)}; update the driver (CUDA 13: 580 or newer), or "
                        "install an older CUDA")


def _text(version: Version) -> str:
    return ".".join(map(str, version))


def _choose_compiler(nvcc: str) -> str:
    """cc_path, or the first g++ that nvcc accepts: each nvcc refuses those newer than it knows."""
    asked = os.environ.get("cc_path")
    compilers = [asked] if asked else [name for name in COMPILERS if shutil.which(name)]
    newest = ""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "empty.cu")
        source.touch()
        for compiler in compilers:
            trial = subprocess.run([nvcc, f"-ccbin={compiler}", "-E", source, "-o", f"{source}.ii"],
                                   capture_output=True, text=True)
            if trial.returncode == 0:
                return compiler
            refused = re.search(r"gcc versions later than (\d+) are not supported", trial.stderr)
            newest = newest or (refused[1] if refused else "")
    remedy = f"apt-get install g++-{newest}" if newest else "install another g++"
    raise _Unusable(f"does not work with {', '.join(compilers) or 'g++, which is not installed'}; "
                    f"{remedy}, or set cc_path to a compiler that it accepts")


def _files(root: Path, *patterns: str) -> list[Path]:
    return [path for pattern in patterns for path in sorted(root.glob(pattern))]


def _libraries(root: Path, names: tuple[str, ...]) -> list[Path]:
    """The libraries of a toolkit whose names begin so."""
    return _files(root, *(f"{folder}/lib{name}*" for name in names
                          for folder in ("lib64", "lib", "lib/*-linux-gnu", "targets/*/lib")))
