"""Calls our own C++ functions and CUDA kernels on jt.Vars, with arguments bound by name.

An operator NAME keeps its C++ functions in NAME.h beside its NAME.py. CUDA compiles the same file
(see device.h) or, if there is one, NAME.cuh, whose kernels have the same names and arguments: the
outputs, the inputs, the numbers, e.g. ``bias_gelu(float* y, const float* x, const float* bias, int
rows, int columns)``.
"""

from __future__ import annotations

import hashlib
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Mapping, Sequence

import jittor as jt
import numpy as np

from runtime.errors import InputError
from runtime.formats import replacing

FOLDER = Path(__file__).parent

# On CUDA: "kernels" runs our kernels, "plain" runs Jittor's own operators.
OPS_CUDA = os.environ.get("OPS_CUDA", "kernels")
if OPS_CUDA not in ("plain", "kernels"):
    raise InputError(f"OPS_CUDA={OPS_CUDA}: neither plain nor kernels; unset it")

# Jittor reports a launch that failed only in its debug build.
_CHECK_LAUNCH = """
if (cudaError_t error = cudaGetLastError()) throw std::runtime_error(cudaGetErrorString(error));
"""


def wants_plain() -> bool:
    """Whether an operator is to run as its plain twin: on CUDA if OPS_CUDA=plain is set."""
    return bool(jt.flags.use_cuda) and OPS_CUDA == "plain"


def upload(array: np.ndarray) -> jt.Var:
    """An array as a jt.Var, which a GPU gets at once.

    Jittor is lazy, and would copy it between two kernels, after it has waited for the first.
    """
    var = jt.array(np.ascontiguousarray(array))
    if jt.flags.use_cuda:
        var.sync(weak_sync=False)
    return var


@lru_cache(maxsize=64)
def constant(numbers: tuple[int, ...]) -> jt.Var:
    """Integers (n,) int32, the same jt.Var for the same numbers: a GPU then gets them only once."""
    return upload(np.array(numbers, np.int32))


def run(operator: str, function: str, outputs: Mapping[str, Sequence[int]],
        inputs: Mapping[str, jt.Var | None], launch: str | None = None,
        dtypes: Sequence[str] | None = None, **numbers: int | float) -> list[jt.Var]:
    """Runs ``function`` of ``operator`` and returns the outputs, which the function must fill.

    Its arguments are, in this order, the outputs and inputs (pointers to their numbers; nullptr for
    an input that is None), the dimensions, and the ``numbers`` (an int is an int64_t, a float a
    float; their values are not compiled in). A dimension is named behind an output or input that
    has it, ``{"x (rows, columns)": x}``, where ``_`` stands for one that is not wanted. ``outputs``
    gives shapes; without ``dtypes``, they are float32. ``launch`` is a kernel's grid and block in
    C++, in which all these names may be used, e.g. ``"blocks_for(rows * columns), THREADS"``;
    without it, the function has no CUDA kernel.
    """
    given = [var for var in inputs.values() if var is not None]
    key = function if len(given) == len(inputs) else (
        function, *(var is None for var in inputs.values()))
    if key not in _TEXTS:  # building them takes longer than Jittor needs to record the call
        _TEXTS[key] = _texts(operator, function, launch, outputs, inputs, numbers)
    shapes, kinds = list(outputs.values()), dtypes or ["float32"] * len(outputs)
    if len(shapes) == 1:  # jt.code is faster without lists
        return [jt.code(shapes[0], kinds[0], given, data=numbers, **_TEXTS[key])]
    return jt.code(shapes, kinds, given, data=numbers, **_TEXTS[key])


_TEXTS: dict[object, dict[str, str]] = {}  # by function and by which of its inputs are given


def _texts(operator: str, function: str, launch: str | None, outputs: Mapping[str, object],
           inputs: Mapping[str, object], numbers: Mapping[str, object]) -> dict[str, str]:
    """The texts that jt.code compiles, by the names of its arguments."""
    lines, arguments = [], []
    dimensions: dict[str, str] = {}
    for kind, variables in (("out", outputs), ("in", inputs)):
        index = 0
        for notation, var in variables.items():
            name, *axes = re.findall(r"\w+", notation)
            arguments.append("nullptr" if var is None else name)
            if var is not None:
                lines.append(f"auto* {name} = {kind}{index}_p;")
                for axis, dimension in enumerate(axes):
                    dimensions.setdefault(dimension, f"{kind}{index}_shape{axis}")
                index += 1
    dimensions.pop("_", None)
    lines += [f"const int64_t {name} = {shape};" for name, shape in dimensions.items()]
    lines += [f'const {"int64_t" if isinstance(value, int) else "float"} {name} = data["{name}"];'
              for name, value in numbers.items()]
    names, call = "\n".join(lines), ", ".join([*arguments, *dimensions, *numbers])
    texts = {"cpu_src": f"{names}\n{function}({call});\n", "cpu_header": header(f"{operator}.h")}
    if launch:
        texts.update(cuda_src=f"{names}\n{function}<<<{launch}>>>({call});{_CHECK_LAUNCH}",
                     cuda_header=header(cuda_file(operator)))
    return texts


def cuda_file(operator: str) -> str:
    """The name of the file that CUDA compiles for an operator."""
    return f"{operator}.cuh" if (FOLDER / f"{operator}.cuh").is_file() else f"{operator}.h"


@lru_cache(maxsize=None)
def header(name: str) -> str:
    """The line by which an operator includes a file of this folder.

    Jittor copies and hashes an operator's text at each call, and that of a product has 51 KB. So it
    stands in a file beside those that Jittor compiles, which is named by its digest: an operator
    whose file has changed is another operator, and is compiled. Raises InputError if the file
    cannot be written.
    """
    text = text_of(name).encode()
    path = Path(jt.flags.cache_path, "jit", f"{hashlib.sha256(text).hexdigest()[:16]}-{name}")
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(text)
    return f'#include "jit/{path.name}"\n'


@lru_cache(maxsize=None)
def text_of(name: str) -> str:
    """The text of a file in this folder, in which each ``#include "FILE"`` is FILE's text."""
    text = (FOLDER / name).read_text(encoding="utf-8")
    return re.sub(r'^#include "(.+)"$', lambda line: text_of(line[1]), text, flags=re.MULTILINE)
