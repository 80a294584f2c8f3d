"""What several tests share: the reference material, the vocabulary, and the judges.

The judges are tiktoken for the encoding and PyTorch for all that computes. Jittor runs in this
process and PyTorch, with which it can clash, in one of its own (torch_side.py).
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

# Threads that wait for others sleep instead of spinning. Results are the same; beside other work on
# the machine, the many small operators of these tests are several times as fast.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture(scope="session")
def root() -> Path:
    """The top of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data and expected results, which is not part of the repository."""
    folder = Path(os.environ.get("E2E_SHARED") or ROOT.parent / "shared")
    if not (folder / "expected").is_dir():
        pytest.skip("no reference material; E2E_SHARED=DIR names its folder")
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
def jittor():
    """Jittor on the CPU; what imports it is imported after asking for this fixture.

    TEST_DEVICE=cuda tests on the GPU instead, see test_cuda.py.
    """
    from runtime import backend

    backend.start(os.environ.get("TEST_DEVICE", "cpu"), seed=1)
    import jittor

    return jittor


@pytest.fixture(scope="session")
def torch_side(tmp_path_factory):
    """Calls an operation of torch_side.py: arrays by name and options in, arrays by name out."""
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
def small_model(jittor):
    """Makes a random GPT-2 small enough for tests, all of its weights away from 0 and 1."""
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
    """Makes gpt2.nano a model of a few thousand weights, which scripts in this process train."""
    from config import MODEL_CARDS, GPT2Config
    from runtime import backend

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODEL_CARDS, "gpt2.nano", GPT2Config(2, 8, 2, 97, 32))
        patch.setattr(backend, "start", lambda device, seed=1: jittor.set_global_seed(seed))
        yield


def run_main(main, flags, seconds: int = 300) -> tuple[int, str]:
    """(exit code, stderr) of a script's ``main``, run in this process as a shell would."""
    from runtime.script import run

    def too_slow(*_):
        raise AssertionError(f"no end after {seconds} s")

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
