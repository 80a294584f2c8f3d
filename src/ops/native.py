"""Calls our own C++ functions and CUDA kernels on jt.Vars, with arguments bound by name.

An operator NAME keeps its C++ functions in NAME.h and its CUDA kernels (``__global__``) in NAME.cuh
beside its NAME.py. Both have the same names and arguments: the outputs, the inputs, the numbers,
e.g. ``bias_gelu(float* y, const float* x, const float* bias, int rows, int columns)``.
"""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Mapping, Sequence

import jittor as jt

from runtime.errors import InputError

FOLDER = Path(__file__).parent

# On CUDA: "plain" runs Jittor's own operators, "kernels" runs our .cuh files.
OPS_CUDA = os.environ.get("OPS_CUDA", "plain")
if OPS_CUDA not in ("plain", "kernels"):
    raise InputError(f"OPS_CUDA={OPS_CUDA}: neither plain nor kernels; unset it")

# Jittor reports a launch that failed only in its debug build.
_CHECK_LAUNCH = """
if (cudaError_t error = cudaGetLastError()) throw std::runtime_error(cudaGetErrorString(error));
"""


def wants_plain() -> bool:
    """Whether an operator is to run as its plain twin: on CUDA, unless OPS_CUDA=kernels is set."""
    return bool(jt.flags.use_cuda) and OPS_CUDA == "plain"


def run(operator: str, function: str, outputs: Mapping[str, Sequence[int]],
        inputs: Mapping[str, jt.Var | None], launch: str | None = None,
        dtypes: Sequence[str] | None = None, **numbers: int | float) -> list[jt.Var]:
    """Runs ``function`` of OPERATOR.h or OPERATOR.cuh and returns the outputs, which it must fill.

    Its arguments are, in this order, the outputs and inputs (pointers to their numbers; nullptr for
    an input that is None) and the ``numbers`` (an int is an int64_t, a float a float; their values
    are not compiled in). ``outputs`` gives their shapes; without ``dtypes``, they are float32.
    ``launch`` is a kernel's grid and block in C++, in which these names may be used, e.g.
    ``"blocks_for(rows * columns), THREADS"``; without it, the function has no CUDA kernel.
    """
    given = {name: var for name, var in inputs.items() if var is not None}
    sources = _sources(operator, function, launch, tuple(outputs), tuple(inputs), tuple(given),
                       tuple(numbers), tuple(map(type, numbers.values())))
    return jt.code(list(outputs.values()), list(dtypes or ["float32"] * len(outputs)),
                   list(given.values()), data=numbers, **sources)


# Cached, because to build them takes longer than Jittor needs to record the call.
@lru_cache(maxsize=None)
def _sources(operator: str, function: str, launch: str | None, outputs: tuple[str, ...],
             inputs: tuple[str, ...], given: tuple[str, ...], numbers: tuple[str, ...],
             kinds: tuple[type, ...]) -> dict[str, str]:
    """The texts that jt.code compiles, by the names of its arguments; ``given`` are the inputs that
    are not None."""
    names = "".join(
        [f"auto* {name} = out{i}_p;\n" for i, name in enumerate(outputs)]
        + [f"auto* {name} = in{i}_p;\n" for i, name in enumerate(given)]
        + [f'const {"int64_t" if issubclass(kind, int) else "float"} {name} = data["{name}"];\n'
           for name, kind in zip(numbers, kinds)])
    arguments = ", ".join([*outputs, *(name if name in given else "nullptr" for name in inputs),
                           *numbers])
    sources = {"cpu_src": f"{names}{function}({arguments});\n",
               "cpu_header": text_of(f"{operator}.h")}
    if launch:
        sources.update(cuda_src=f"{names}{function}<<<{launch}>>>({arguments});{_CHECK_LAUNCH}",
                       cuda_header=text_of(f"{operator}.cuh"))
    return sources


@lru_cache(maxsize=None)
def text_of(name: str) -> str:
    """The text of a file in this folder, in which each ``#include "FILE"`` is FILE's text.

    Jittor compiles an operator again when its text changes, but does not look into its includes.
    """
    text = (FOLDER / name).read_text(encoding="utf-8")
    return re.sub(r'^#include "(.+)"$', lambda line: text_of(line[1]), text, flags=re.MULTILINE)
