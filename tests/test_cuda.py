"""Runs the tests of all computation on a GPU, with Jittor's operators and with our kernels."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from runtime import backend

FILES = ["test_ops.py", "test_model.py", "test_lora.py", "test_optimizer.py",
         "test_beam_search.py"]


@pytest.mark.slow
@pytest.mark.parametrize("switch", ["plain", "kernels"])
@pytest.mark.parametrize("file", FILES)
def test_on_a_gpu(root, file, switch):
    cuda, obstacle = backend.find_cuda()
    if cuda is None:
        pytest.skip(obstacle)
    environment = {**os.environ, "TEST_DEVICE": "cuda", "OPS_CUDA": switch}
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", f"tests/{file}"], cwd=root,
                         env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-10000:]
