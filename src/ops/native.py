"""Calls our own C++ and CUDA functions on jt.Vars, with arguments bound by name.

An operator NAME keeps its C++ functions in NAME.h and its CUDA functions in NAME.cuh beside its
NAME.py. A function has the same name and arguments in both files: the outputs, the inputs, the
numbers, e.g. ``bias_gelu(float* y, const float* x, const float* bias, int rows, int columns)``. In
NAME.cuh it is a host function that launches kernels; its pointers are the GPU's.
"""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Mapping, Sequence

import jittor as jt

from runtime.errors import InputError

Shape = Sequence[int]

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


def run(operator: str, call: str, outputs: Mapping[str, Shape | tuple[Shape, str]],
        inputs: Mapping[str, jt.Var], **numbers: int | float) -> list[jt.Var]:
    """Runs ``call``, a call of a function in OPERATOR.h or OPERATOR.cuh, and returns the outputs.

    ``call`` may use the names of outputs and inputs (pointers to their numbers) and of ``numbers``
    (an int is an int64_t, a float a float; their values are not compiled in). ``outputs`` gives the
    shape of each output, or (shape, dtype) where dtype is not float32; the function must fill them.
    """
    shapes, dtypes = [], []
    for output in outputs.values():
        shape, dtype = output if len(output) == 2 and isinstance(output[1], str) \
            else (output, "float32")
        shapes.append(shape)
        dtypes.append(dtype)
    sources = _sources(operator, call, tuple(outputs), tuple(inputs),
                       tuple((name, type(value)) for name, value in numbers.items()))
    return jt.code(shapes, dtypes, list(inputs.values()), data=numbers, **sources)


FOLDER = Path(__file__).parent


# Cached, because to build them takes longer than Jittor needs to record the call.
@lru_cache(maxsize=None)
def _sources(operator: str, call: str, outputs: tuple[str, ...], inputs: tuple[str, ...],
             numbers: tuple[tuple[str, type], ...]) -> dict[str, str]:
    """The texts that jt.code compiles, by the names of its arguments."""
    source = "".join(
        [f"auto* {name} = out{i}_p;\n" for i, name in enumerate(outputs)]
        + [f"auto* {name} = in{i}_p;\n" for i, name in enumerate(inputs)]
        + [f'const {"int64_t" if issubclass(kind, int) else "float"} {name} = data["{name}"];\n'
           for name, kind in numbers] + [f"{call};\n"])
    sources = {"cpu_src": source, "cpu_header": text_of(f"{operator}.h")}
    if (FOLDER / f"{operator}.cuh").is_file():
        sources.update(cuda_src=source + _CHECK_LAUNCH, cuda_header=text_of(f"{operator}.cuh"))
    return sources


@lru_cache(maxsize=None)
def text_of(name: str) -> str:
    """The text of a file in this folder, in which each ``#include "FILE"`` is FILE's text.

    Jittor compiles an operator again when its text changes, but does not look into its includes.
    """
    text = (FOLDER / name).read_text(encoding="utf-8")
    return re.sub(r'^#include "(.+)"$', lambda line: text_of(line[1]), text, flags=re.MULTILINE)
