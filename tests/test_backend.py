"""The start of Jittor: the choice of device, oneDNN, its output and its signal handlers."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import uuid

import numpy as np
import pytest

from runtime import backend, torch_file
from runtime.errors import InputError
from runtime.flags import add_device_flag


def test_this_machine_says_why_it_has_no_cuda(root, tmp_path):
    cuda, reason = backend.find_cuda()
    assert bool(cuda) != bool(reason)
    if cuda:
        pytest.skip("this machine has a GPU")
    torch_file.save(tmp_path / "base.pt", {"x": np.zeros(1, np.float32)})
    process = subprocess.run(
        [sys.executable, root / "src/gpt2_beam.py", "--data", "none.jsonl", "--init_checkpoint",
         tmp_path / "base.pt", "--device", "cuda"], capture_output=True, text=True)
    assert process.returncode == 1 and process.stdout == ""
    assert process.stderr == f"error: --device cuda: {reason}; use --device cpu, or repair that\n"


QUIET = """
import sys
sys.path.insert(0, sys.argv[1])
from runtime import backend
assert backend.start("cpu", seed=3) == "cpu"
import jittor as jt
import numpy as np
# an operator that was never compiled before
x = jt.code((2,), "float32", [], cpu_header="// " + sys.argv[2], cpu_src="@out(0) = @out(1) = 4;")
assert x.sqrt().numpy().tolist() == [2, 2]
assert jt.flags.use_cuda == 0
jt.set_global_seed(3)
first = jt.rand(3).numpy().tolist()
backend.start("cpu", seed=3)
assert jt.rand(3).numpy().tolist() == first
speak = 'std::cerr << "Compiling Operators(1/1)\\\\r" << "a " << "warning\\\\n"; @out(0) = 1;'
jt.code((1,), "int32", [], cpu_header="#include <iostream>", cpu_src=speak).sync()
"""


@pytest.mark.parametrize("variables", [
    {}, pytest.param({"nvcc": "on the path"}, marks=pytest.mark.slow)])
def test_start_is_quiet_and_needs_no_nvcc(jittor, root, tmp_path, variables):
    """Neither compiling nor an nvcc on PATH without a GPU makes Jittor print anything."""
    environment = dict(os.environ)
    for name in ("nvcc_path", "conv_opt", "log_silent", "cache_name", "use_mkl"):
        environment.pop(name, None)  # the fixture has set it in this process
    if variables:
        nvcc = tmp_path / "nvcc"
        nvcc.write_text("#!/bin/sh\nexit 1\n")
        nvcc.chmod(0o755)
        environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    process = subprocess.run([sys.executable, "-c", QUIET, root / "src", uuid.uuid4().hex],
                             capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert process.stdout == "device: CPU (as asked by --device cpu)\n" * 2
    assert process.stderr == "a warning\n"  # other lines than compiling reports pass


def test_matrix_products_are_onednn_ones(jittor):
    from jittor import compile_extern

    if os.environ["use_mkl"] != "1":
        pytest.skip("oneDNN's wheels are not installed on this machine")
    assert compile_extern.mkl_ops is not None


def test_numpy_2_is_refused(monkeypatch):
    """Jittor copies another number of bytes than its arrays have, without any message."""
    for version in ("2.0.0rc1", "2.2.6"):
        monkeypatch.setattr(backend.importlib.metadata, "version", lambda _, said=version: said)
        with pytest.raises(InputError, match=f"NumPy {version}: .*pip install -r"):
            backend._prepare_environment(None)


def test_what_ends_a_start(root, tmp_path):
    code = "import sys; sys.path.insert(0, sys.argv[1]); from runtime import backend, script; " \
           "script.run(lambda: backend.start('cpu'))"
    def start(**variables):
        return subprocess.run([sys.executable, "-c", code, root / "src"], capture_output=True,
                              text=True, env={**os.environ, **variables})

    (tmp_path / "broken").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "broken").chmod(0o755)
    for compiler, reason in (("none", "not found"), ("broken", "cannot print its version")):
        process = start(cc_path=str(tmp_path / compiler))
        assert process.returncode == 1 and process.stderr.count("\n") == 1
        assert process.stderr.startswith(f"error: {tmp_path / compiler} {reason}, ")
    process = start(OMP_NUM_THREADS="1000000")
    assert process.returncode == 1 and process.stderr.count("\n") == 1
    assert process.stderr.startswith("error: OMP_NUM_THREADS=1000000: more than ")


def test_backend_comes_before_jittor(jittor, root):
    with pytest.raises(ImportError, match="import runtime.backend before jittor"):
        runpy.run_path(str(root / "src/runtime/backend.py"))


def test_flag(capsys):
    import argparse

    parser = argparse.ArgumentParser()
    add_device_flag(parser)
    assert parser.parse_args([]).device == "auto"
    assert parser.parse_args(["--device", "cuda"]).device == "cuda"
    with pytest.raises(SystemExit):
        parser.parse_args(["--device", "tpu"])
    assert "--device" in capsys.readouterr().err


SIGNALS = """
import os, signal, subprocess, sys
sys.path.insert(0, sys.argv[1])
from runtime import backend
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
backend.start("cpu")
child = subprocess.Popen(["sleep", "60"])
child.kill()
child.wait()
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted as usual")
"""


def test_signals_mean_what_python_makes_of_them(jittor, root):
    """Jittor's own handlers end the process when a child is killed and on Ctrl-C."""
    process = subprocess.run([sys.executable, "-c", SIGNALS, root / "src"], capture_output=True,
                             text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.endswith("interrupted as usual\n")


IMPORT = """
import sys
sys.path[:0] = sys.argv[1:]
from pathlib import Path
import jittor_utils
from runtime import backend, script
jittor_utils.cache_path = sys.argv[2]
script.run(lambda: backend._import_jittor(None))
"""


@pytest.mark.parametrize("version", ["GLIBCXX_3.4.99", "CXXABI_9.9"])
def test_a_library_older_than_the_compiler_is_named(root, tmp_path, version):
    """As in a conda environment: what the compiler links with is newer than what Python loads."""
    newer = tmp_path / "newer/libstdc++.so.6"
    newer.parent.mkdir()
    (tmp_path / "map").write_text(f"{version} {{ future; }};\n")
    for output, source, options in (
            (newer, "void future() {}", ["-Wl,-soname,libstdc++.so.6",
                                         f"-Wl,--version-script={tmp_path}/map"]),
            (tmp_path / "jit_utils_core.so", "void future(); void call() { future(); }", [newer])):
        subprocess.run(["g++", "-x", "c", "-", "-x", "none", "-shared", "-fPIC", "-nostdlib",
                        "-o", output, *options], input=source, text=True, check=True)
    (tmp_path / "jittor.py").write_text("assert False")  # as Jittor does then
    process = subprocess.run([sys.executable, "-c", IMPORT, root / "src", tmp_path],
                             capture_output=True, text=True)
    assert process.returncode == 1
    assert re.fullmatch(rf"error: \S*/libstdc\+\+\.so\.6 lacks {version}, it is older than "
                        r"\S*g\+\+ \d[\d.]+, .*set cc_path to an older g.*conda install.*\n",
                        process.stderr)
    (tmp_path / "jit_utils_core.so").unlink()
    process = subprocess.run([sys.executable, "-c", IMPORT, root / "src", tmp_path],
                             capture_output=True, text=True)
    assert process.stderr.startswith("error: Jittor cannot be built on this machine: unknown; see")
