"""The memory that a process can still get, and runs that have too little."""

import os
import resource
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from runtime import memory, torch_file
from runtime.errors import InputError

MIB = 1 << 20
START = ("import sys; sys.path.insert(0, sys.argv[1]); from runtime import backend, script; "
         "script.run(lambda: backend.start('cpu'))")


def limited(command, mebibytes, **options):
    """Runs a command in an address space of this size."""
    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (mebibytes * MIB, mebibytes * MIB))
    return subprocess.run([sys.executable, *map(str, command)], preexec_fn=limit, timeout=120,
                          capture_output=True, text=True, **options)


def test_limits_of_the_process():
    code = ("import sys; sys.path.insert(0, sys.argv[1]); from runtime import memory; "
            "print(memory.available()); memory.require(1 << 40, 'take less')")
    done = limited(["-c", code, ROOT / "src"], 300)
    assert 200 * MIB < int(done.stdout) < 300 * MIB
    assert "not enough memory: at least 1024.00 GiB more are needed, 0.2" in done.stderr


@pytest.mark.parametrize("line, limit, used, root", [
    ("0::/a/b", "memory.max", "memory.current", ""),
    ("4:memory:/a/b", "memory.limit_in_bytes", "memory.usage_in_bytes", "memory"),
])
def test_limits_of_control_groups(monkeypatch, tmp_path, line, limit, used, root):
    """The tightest of a group and those around it counts; files in the cache can be dropped."""
    inner = tmp_path / root / "a/b"
    inner.mkdir(parents=True)
    for folder, most in ((inner, "max"), (inner.parent, 90 * MIB)):
        (folder / limit).write_text(f"{most}\n")
        (folder / used).write_text(f"{60 * MIB}\n")
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file {10 * MIB}\n")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    own = tmp_path / "cgroup"
    own.write_text(f"9:cpu:/c\n{line}\n")
    monkeypatch.setattr(memory, "Path", lambda path: type(own)(
        own if path == "/proc/self/cgroup" else path))
    assert memory.available() == 40 * MIB
    memory.require(40 * MIB, "")
    with pytest.raises(InputError, match="0.04 GiB are available; take less"):
        memory.require(41 * MIB, "take less")


@pytest.mark.parametrize("message, ran_out", [
    ("std::bad_alloc", True), ("cc1plus: out of memory: Cannot allocate memory", True),
    ("libdnnl.so.2: failed to map segment from shared object", True), ("wrong", False)])
def test_errors_that_mean_memory(message, ran_out):
    assert memory.ran_out(RuntimeError(message)) == ran_out


@pytest.mark.slow
def test_a_model_that_does_not_fit(tmp_path, jittor):
    (tmp_path / "data.jsonl").write_text('{"context": [1, 2], "completion": [3, 4]}\n' * 2)
    torch_file.save(tmp_path / "base.pt", {"x": np.zeros(1, np.float32)})
    flags = ["--seq_len", 12, "--model_card", "gpt2.lg", "--work_dir", tmp_path / "out",
             "--device", "cpu"]
    for script, more, remedy in (
            ("src/gpt2_ft.py", ["--train_data", tmp_path / "data.jsonl", "--valid_data",
                                tmp_path / "data.jsonl", "--max_step", 1, "--train_batch_size", 1],
             "--train_batch_size"),
            ("src/gpt2_beam.py", ["--data", tmp_path / "data.jsonl", "--init_checkpoint",
                                  tmp_path / "base.pt", "--eval_len", 4], "--batch_size")):
        done = limited([ROOT / script, *flags, *more], 3000)
        assert done.returncode == 1 and done.stderr.count("\n") == 1
        assert done.stderr.startswith("error: not enough memory: at least ")
        assert f"; take a smaller {remedy}, " in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("mebibytes", [60, 120, 250, 340, 400, 480, 560, 700])
def test_whatever_the_limit_a_start_ends_with_a_line(jittor, mebibytes):
    done = limited(["-c", START, ROOT / "src"], mebibytes,
                   env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode == 0:
        assert done.stdout.startswith("device: CPU") and done.stderr == ""
    else:
        assert done.stderr.splitlines()[-1].startswith("error: ")
