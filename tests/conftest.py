"""Fixtures for several test files: reference data, vocabulary, and reference implementations.

The reference for the encoding is tiktoken; the reference for all computation is PyTorch. Jittor
runs in this process. PyTorch can conflict with it and runs in a separate process (torch_side.py).
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]

# Waiting threads sleep instead of spinning. The results are the same; when other jobs share the
# machine, the many small operators of these tests run several times as fast.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# libcuda.so.1, which says what STAND_IN_DRIVER holds: "13000 75 89" is a driver for CUDA 13.0 with
# two GPUs, of compute capabilities 7.5 and 8.9.
DRIVER = """
#include <stdlib.h>
#include <string.h>
static char* said(int word) {  /* the word of STAND_IN_DRIVER, or 0 */
    static char text[99];
    strcpy(text, getenv("STAND_IN_DRIVER"));
    char* found = strtok(text, " ");
    while (word--) found = strtok(0, " ");
    return found;
}
int cuInit(unsigned flags) {
    if (!strcmp(said(0), "crash")) abort();
    return said(1) ? 0 : 100;
}
int cuDeviceGetCount(int* count) { for (*count = 0; said(*count + 1); ++*count); return 0; }
int cuDriverGetVersion(int* version) { return *version = atoi(said(0)), *version == 0; }
int cuDeviceGet(int* device, int number) { *device = 1000 + number; return 0; }
int cuDeviceGetAttribute(int* value, int which, int device) {
    int capability = atoi(said(device - 1000 + 1));
    *value = which == 75 ? capability / 10 : which == 76 ? capability % 10 : -1;
    return 0;
}
"""


def pytest_addoption(parser):
    parser.addoption("--nightly", action="store_true", help="also run the tests marked nightly")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--nightly"):
        for item in items:
            if item.get_closest_marker("nightly"):
                item.add_marker(pytest.mark.skip(reason="a minute or more; --nightly runs it"))


@pytest.fixture(scope="session")
def root() -> Path:
    """The top of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data and expected results, which is not part of the repository."""
    folder = Path(os.environ.get("E2E_SHARED") or ROOT.parent / "shared")
    if not (folder / "expected").is_dir():
        pytest.skip("no reference data; set E2E_SHARED to its folder")
    return folder


@pytest.fixture(scope="session")
def vocab() -> Path:
    """The folder with encoder.json and vocab.bpe."""
    folder = ROOT / "vocab"
    if not all((folder / name).is_file() for name in ("encoder.json", "vocab.bpe")):
        pytest.skip("no vocabulary; python vocab/download_vocab.py vocab")
    return folder


@pytest.fixture(scope="session")
def tiktoken_gpt2(vocab):
    """tiktoken's gpt2 encoding, made from our vocabulary files instead of a download."""
    tiktoken = pytest.importorskip("tiktoken")
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    ranks = data_gym_to_mergeable_bpe_ranks(str(vocab / "vocab.bpe"), str(vocab / "encoder.json"))
    pattern = (r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$"""
               r"""|\s+(?!\S)|\s""")
    return tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": 50256}, explicit_n_vocab=50257)


@pytest.fixture(scope="session")
def emulation_folder(tmp_path_factory) -> Path:
    """Where cuda_emulation is built, and what is compiled with it: CUDA_EMULATION, if it is set."""
    folder = Path(os.environ.get("CUDA_EMULATION") or tmp_path_factory.mktemp("cuda_emulation"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()


@pytest.fixture(scope="session")
def jittor():
    """Jittor on the CPU. Request this fixture before importing a module that imports Jittor.

    With TEST_DEVICE=cuda the tests run on the GPU, see test_cuda.py.
    """
    from runtime import backend

    backend.start(os.environ.get("TEST_DEVICE", "cpu"), seed=1)
    import jittor

    return jittor


@pytest.fixture(scope="session")
def torch_side(tmp_path_factory):
    """Calls an operation of torch_side.py with arrays by name and options; returns such arrays."""
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        pytest.skip("no PyTorch; pip install -r requirement-test.txt")
    folder = tmp_path_factory.mktemp("torch_side")
    process = subprocess.Popen([sys.executable, ROOT / "tests/torch_side.py"], text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def call(operation: str, arrays: dict | None = None, **options) -> dict[str, np.ndarray]:
        np.savez(folder / "in.npz", **(arrays or {}))
        request = {"operation": operation, "options": options, "folder": str(folder)}
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        assert answer == "done\n", f"{operation} failed in PyTorch: {answer}"
        with np.load(folder / "out.npz") as results:
            return dict(results)

    yield call
    process.terminate()  # closing its stdin is not enough: Jittor's compiling processes hold it too
    process.wait()


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
    """A folder for LD_LIBRARY_PATH, with a library that stands in for NVIDIA's driver."""
    folder = tmp_path_factory.mktemp("driver")
    (folder / "cuda.c").write_text(DRIVER)
    subprocess.run(["cc", "-shared", "-fPIC", folder / "cuda.c", "-o", folder / "libcuda.so.1"],
                   check=True)
    return folder


@pytest.fixture(scope="session")
def small_model(jittor):
    """Makes a small GPT-2 with random weights, so that none keeps an initial value of 0 or 1."""
    from config import GPT2Config, LoRAConfig
    from model import GPT2LMModel

    def make(seed: int = 0, r: int = 3, alpha: int = 6, dropout: float = 0.0, **card):
        card = {"n_layer": 2, "n_embd": 24, "n_head": 3, "vocab_size": 61, "n_positions": 40,
                **card}
        model = GPT2LMModel(GPT2Config(**card), LoRAConfig(r, alpha, dropout))
        random = np.random.default_rng(seed)
        for name, p in model.named_parameters():
            centre = 1.0 if name.split(".")[-2].startswith("ln_") and "weight" in name else 0.0
            p.assign(jittor.array(random.normal(centre, 0.25, p.shape).astype(np.float32)))
        return model

    return make


@pytest.fixture(scope="module")
def tiny(jittor):
    """Redefines gpt2.nano as a model of a few thousand weights, for scripts in this process."""
    from config import MODEL_CARDS, GPT2Config
    from runtime import backend

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODEL_CARDS, "gpt2.nano", GPT2Config(2, 8, 2, 97, 32))
        patch.setattr(backend, "start", lambda device, seed=1: jittor.set_global_seed(seed))
        yield


def run_main(main, flags, seconds: int = 300) -> tuple[int, str]:
    """Runs a script's ``main`` in this process as a shell would; returns (exit code, stderr)."""
    from runtime.script import run

    def too_slow(*_):
        raise AssertionError(f"the script did not end within {seconds} s")

    said, argv = io.StringIO(), sys.argv
    before = signal.signal(signal.SIGALRM, too_slow)
    signal.alarm(seconds)
    try:
        sys.argv = ["script", *map(str, flags)]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            run(main)
        return 0, said.getvalue()
    except SystemExit as end:
        return end.code, said.getvalue()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        sys.argv = argv


def weights_of(model) -> dict[str, np.ndarray]:
    """A model's parameters as arrays by name."""
    return {name: p.numpy() for name, p in model.named_parameters()}
