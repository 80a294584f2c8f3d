"""linear.h compiled for several processors, of those that this one can stand in for.

The words of bfloat16s and bytes are multiplied by other instructions on each, or widened first.
"""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow  # seconds of compiling for each processor

# the flags of /proc/cpuinfo that a processor needs, the compiler's flags
PROCESSORS = {
    "tile registers": ("amx_bf16 amx_int8 avx512_bf16", ("-march=sapphirerapids",)),
    "AVX512_BF16, VNNI": ("avx512_bf16 avx512_vnni", ("-march=cooperlake",)),
    "AVX-512": ("avx512f avx512bw avx512dq avx512vl", ("-march=skylake-avx512",)),
    "AVX-VNNI": ("avx2 avx_vnni fma", ("-march=haswell", "-mavxvnni")),
    "AVX2": ("avx2 fma bmi2", ("-march=haswell",)),
    "SSE": ("sse2", ("-march=x86-64",)),
}
SOURCE = """
#include "linear.h"
#define FORMS(F)                                                                               \\
    F(float32, PACKED, PACKED) F(terms, PACKED, PACKED_IN_TERMS)                               \\
    F(bf16, PACKED_BFLOAT16, PACKED_BFLOAT16) F(int8, PACKED_INT8, PACKED_INT8)
#define FORM(name, packed, layout)                                                             \\
    extern "C" void pack_##name(void* to, const float* w, int n_out, int n_in) {               \\
        pack_weight<gemm::ROWS, gemm::packed>(to, w, n_out, n_in);                             \\
    }                                                                                          \\
    extern "C" void linear_##name(float* y, const float* x, const void* w, const float* bias,  \\
            const float* residual, int rows, int n_out, int n_in) {                            \\
        linear<gemm::layout>(y, x, w, bias, residual, rows, n_out, n_in);                      \\
    }
FORMS(FORM)
extern "C" void grad_float32(float* dx, const float* dy, const void* w, int m, int n, int k) {
    grad_linear_x<gemm::PACKED>(dx, dy, w, m, n, k);
}
extern "C" void grad_terms(float* dx, const float* dy, const void* w, int m, int n, int k) {
    grad_linear_x<gemm::PACKED_IN_TERMS>(dx, dy, w, m, n, k);
}
extern "C" void grad_bf16(float* dx, const float* dy, const void* w, int m, int n, int k) {
    grad_linear_x<gemm::PACKED_BFLOAT16>(dx, dy, w, m, n, k);
}
"""
# rows, n_out, n_in: with and without a remainder in tiles, panels, words and blocks
SHAPES = [(1, 1, 1), (10, 70, 65), (33, 5, 3), (204, 96, 300), (300, 257, 1100), (17, 3000, 64)]


@pytest.fixture(scope="module", params=PROCESSORS)
def library(request, tmp_path_factory):
    needed, flags = PROCESSORS[request.param]
    if not set(needed.split()) <= set(Path("/proc/cpuinfo").read_text().split()):
        pytest.skip(f"this processor lacks some of: {needed}")
    folder = tmp_path_factory.mktemp("library")
    (folder / "source.cpp").write_text(SOURCE)
    compiled = subprocess.run(
        ["g++", "-std=c++14", "-Ofast", *flags, "-fopenmp", "-shared", "-fPIC",
         f"-I{ROOT / 'src/ops'}", folder / "source.cpp", "-o", folder / "library.so"],
        capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    library = ctypes.CDLL(folder / "library.so")
    library.rounds_rows = "avx512_bf16" in needed  # x as well as W
    return library


def pointer(array):
    return array if array is None else array.ctypes.data_as(ctypes.c_void_p)


def call(library, precision, x, weight, bias=None, residual=None, dy=None):
    """x W + bias + residual or, with dy, dy W^T; all float32."""
    (n_in, n_out), rows = weight.shape, len(x if dy is None else dy)
    words = np.zeros(-(-n_out // 32) * 32 * (n_in + 70), np.int32)
    getattr(library, f"pack_{precision}")(pointer(words), pointer(weight), n_out, n_in)
    if dy is None:
        y = np.full((rows, n_out), np.nan, np.float32)
        getattr(library, f"linear_{precision}")(
            *map(pointer, (y, x, words, bias, residual)), rows, n_out, n_in)
        return y
    dx = np.full((rows, n_in), np.nan, np.float32)
    getattr(library, f"grad_{precision}")(*map(pointer, (dx, dy, words)), rows, n_out, n_in)
    return dx


def bfloat16(array):
    import torch

    return torch.from_numpy(array).bfloat16().float().numpy()


def draw(*shape):
    return np.random.default_rng(shape).normal(size=shape).astype(np.float32)


def close(ours, truth, tolerance=1e-5):
    assert np.isfinite(ours).all()
    assert np.abs(ours - truth).max() <= tolerance * np.abs(truth).max()


@pytest.mark.parametrize("form", ["float32", "terms"])
@pytest.mark.parametrize("rows, n_out, n_in", SHAPES)
def test_float32(library, rows, n_out, n_in, form):
    x, weight, dy = draw(rows, n_in), draw(n_in, n_out), draw(rows, n_out)
    bias, residual = draw(n_out), draw(rows, n_out)
    truth = x.astype(np.float64) @ weight
    close(call(library, form, x, weight), truth)
    close(call(library, form, x, weight, bias), truth + bias)
    close(call(library, form, x, weight, bias, residual), truth + bias + residual)
    close(call(library, form, None, weight, dy=dy), dy.astype(np.float64) @ weight.T)


def distance(ours, truth):
    """Relative, as the root of the mean square."""
    return np.sqrt(np.square(ours - truth).mean() / np.square(truth).mean())


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_terms_are_as_near_to_float64_as_float32(library, scale):
    """Sums of 3,072 products: float32 adds up blocks of 256, terms blocks of 128."""
    x, weight = scale * draw(150, 3072), draw(3072, 70)
    x, dy = x.astype(np.float32), (scale * draw(150, 70)).astype(np.float32)
    for given, truth in (({"x": x}, x.astype(np.float64) @ weight),
                         ({"x": None, "dy": dy}, dy.astype(np.float64) @ weight.T)):
        ours, theirs = (distance(call(library, form, weight=weight, **given), truth)
                        for form in ("terms", "float32"))
        assert ours <= 1.1 * theirs, (ours, theirs)


@pytest.mark.parametrize("rows, n_out, n_in", SHAPES)
def test_bf16(library, rows, n_out, n_in):
    """Products of PyTorch's bfloat16s; rows are only rounded where there are instructions."""
    pytest.importorskip("torch")
    x, weight, dy = draw(rows, n_in), draw(n_in, n_out), draw(rows, n_out)
    exact = bfloat16(weight).astype(np.float64)
    rounded = bfloat16 if library.rounds_rows else lambda array: array
    close(call(library, "bf16", x, weight), rounded(x) @ exact)
    close(call(library, "bf16", None, weight, dy=dy), rounded(dy) @ exact.T)


@pytest.mark.parametrize("rows, n_out, n_in", SHAPES)
def test_int8(library, rows, n_out, n_in):
    random = np.random.default_rng(rows)
    # integers of which the largest is 127, so that the scales are 1: sums are exact
    x, weight = (random.integers(-127, 128, shape) for shape in ((rows, n_in), (n_in, n_out)))
    x[:, n_in // 2], weight[n_in // 3] = 127, -127
    exact = x @ weight
    ours = call(library, "int8", x.astype(np.float32), weight.astype(np.float32))
    assert np.array_equal(ours, exact.astype(np.float32))
    # scales of rows and columns
    by_row, by_column = (2.0 ** random.integers(-9, 9, n) for n in (rows, n_out))
    ours = call(library, "int8", (x * by_row[:, None]).astype(np.float32),
                (weight * by_column).astype(np.float32))
    assert np.array_equal(ours, (exact * by_row[:, None] * by_column).astype(np.float32))
    # anything else: half a step of either factor at most
    x, weight = draw(rows, n_in), draw(n_in, n_out)
    steps = np.abs(x).max(1, keepdims=True) / 254, np.abs(weight).max(0) / 254
    bound = steps[0] * np.abs(weight).sum(0) + steps[1] * np.abs(x).sum(1, keepdims=True)
    bound += n_in * steps[0] * steps[1]
    assert (np.abs(call(library, "int8", x, weight) - x @ weight) <= 1.001 * bound + 1e-6).all()
