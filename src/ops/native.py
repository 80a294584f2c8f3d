"""Calls of our own C++ from Python."""

from __future__ import annotations

from pathlib import Path

import jittor as jt

HEADER = "#include <algorithm>\n#include <cmath>\n#include <cstdint>\n#include <vector>\n"
GEMM = (Path(__file__).parent / "gemm.h").read_text(encoding="utf-8")


def run(shape, inputs: list[jt.Var], source: str, header: str = "",
        cuda: tuple[str, str] | None = None, **numbers: int | float):
    """Runs C++ and returns its float32 output, or its outputs if ``shape`` is a list of shapes.

    ``source`` knows in0_p, in0_shape0 ... of the inputs, out0_p ... of the outputs, which it must
    fill, and ``numbers`` by name: an int as int64, a float as float, whose value is no part of
    what is compiled. ``cuda`` is (header, source) of the same for a GPU.
    """
    known = "".join(f'const {"int64" if isinstance(value, int) else "float"} {name} = '
                    f'data["{name}"];\n' for name, value in numbers.items())
    dtypes = ["float32"] * len(shape) if isinstance(shape, list) else "float32"
    on_gpu = {"cuda_header": HEADER + cuda[0], "cuda_src": known + cuda[1]} if cuda else {}
    return jt.code(shape, dtypes, inputs, cpu_header=HEADER + header, cpu_src=known + source,
                   data=numbers, **on_gpu)
