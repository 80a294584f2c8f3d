"""Calls of our own C++ and CUDA from Python."""

from __future__ import annotations

import os
from pathlib import Path

import jittor as jt

from cli import InputError

HEADER = "#include <algorithm>\n#include <cmath>\n#include <cstdint>\n#include <vector>\n"
GEMM, VECTORS, BLOCK, ATTENTION = (
    (Path(__file__).parent / name).read_text(encoding="utf-8")
    for name in ("gemm.h", "vectors.h", "block.cuh", "attention.cuh"))

# Jittor itself looks for a launch that failed only in its debug build.
_CHECK_LAUNCH = """
    if (cudaError_t error = cudaGetLastError()) throw std::runtime_error(cudaGetErrorString(error));
"""
# The one switch between the operators' two forms on CUDA.
OPS_CUDA = os.environ.get("OPS_CUDA", "plain")
if OPS_CUDA not in ("plain", "kernels"):
    raise InputError(f"OPS_CUDA={OPS_CUDA}: neither plain nor kernels; unset it")


def wants_plain() -> bool:
    """Whether an operator is to be its plain twin: on CUDA, unless OPS_CUDA=kernels is set."""
    return bool(jt.flags.use_cuda) and OPS_CUDA == "plain"


def run(shape, inputs: list[jt.Var], source: str, header: str = "",
        cuda: tuple[str, str] | None = None, dtypes: list[str] | None = None,
        **numbers: int | float):
    """Runs C++ and returns its output, or its outputs if ``shape`` is a list of shapes.

    ``source`` knows in0_p, in0_shape0 ... of the inputs, out0_p ... of the outputs, which it must
    fill, and ``numbers`` by name: an int as int64, a float as float, whose value is no part of
    what is compiled. ``cuda`` is (kernels, the code that launches them) for a GPU; the latter
    knows the same names, the pointers being the GPU's. Outputs are float32 if no ``dtypes`` are
    given.
    """
    known = "".join(f'const {"int64" if isinstance(value, int) else "float"} {name} = '
                    f'data["{name}"];\n' for name, value in numbers.items())
    if dtypes is None:
        dtypes = ["float32"] * len(shape) if isinstance(shape, list) else "float32"
    on_gpu = {"cuda_header": BLOCK + cuda[0],
              "cuda_src": known + cuda[1] + _CHECK_LAUNCH} if cuda else {}
    return jt.code(shape, dtypes, inputs, cpu_header=HEADER + header, cpu_src=known + source,
                   data=numbers, **on_gpu)
