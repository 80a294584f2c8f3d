"""Runs of several processes, which need mpirun and mpicc, compared with runs of one."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from dataset import FTDataset
from runtime import torch_file
from runtime.compiling import CRASH

needs_mpi = pytest.mark.skipif(
    not (shutil.which("mpirun") and shutil.which("mpicc")),
    reason="no MPI; apt-get install openmpi-bin libopenmpi-dev")
FLAGS = ["--grad_acc", 2, "--seq_len", 12, "--model_card", "gpt2.nano", "--lr", 0.01,
         "--max_epoch", 2, "--save_interval", 3, "--log_interval", 1, "--eval_interval", 2,
         "--state_interval", 1, "--lora_dim", 2, "--lora_alpha", 8, "--label_smooth", 0.1,
         "--clip", 1, "--device", "cpu"]


def write(path, count):
    draw = random.Random(count)
    with open(path, "w") as file:
        for _ in range(count):
            record = {key: [draw.randrange(50257) for _ in range(draw.randint(2, 7))]
                      for key in ("context", "completion")}
            file.write(json.dumps(record) + "\n")


@pytest.mark.parametrize("count, batch_size, world_size", [(12, 2, 2), (7, 2, 2), (7, 3, 4),
                                                           (2, 1, 3), (1, 1, 4)])
def test_samples_are_divided_as_pytorch_does(torch_side, tmp_path, count, batch_size, world_size):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"context": [i], "completion": [0]}) + "\n"
                            for i in range(count)))
    for rank in range(world_size):
        for drop_last in (True, False):
            length = len(FTDataset(path, batch_size, 4))
            truth = torch_side("distributed", length=length, batch_size=batch_size, seed=7,
                               epoch=3, rank=rank, world_size=world_size, drop_last=drop_last)
            data = FTDataset(path, batch_size, 4)
            taken = []
            data.batch = lambda items, taken=taken: taken.append(items.tolist())
            list(data.batches(7, 3, rank, world_size, drop_last))
            assert taken == [truth[str(i)].tolist() for i in range(len(truth))]
            # without the first ``skip`` batches, the others are the same
            for skip in range(len(taken) + 1):
                whole, rest = FTDataset(path, batch_size, 4), FTDataset(path, batch_size, 4)
                expected = list(whole.batches(7, 3, rank, world_size, drop_last))[skip:]
                got = list(rest.batches(7, 3, rank, world_size, drop_last, skip))
                assert [b.input_ids.tolist() for b in got] == [
                    b.input_ids.tolist() for b in expected]


def start(root, script, *flags, processes=2):
    """Starts a script in this number of processes."""
    command = [sys.executable, root / script, *map(str, flags)]
    environment = dict(os.environ)
    if processes > 1:
        command = ["mpirun", "--quiet", "--oversubscribe", "--bind-to", "none", "-np",
                   str(processes), *command]
        environment.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1",
                           OMP_NUM_THREADS="1")
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def finish(process, code=0):
    """Waits for the process, asserts its exit code and returns its stdout and stderr."""
    said = process.communicate(timeout=400)
    assert process.returncode == code, said
    return said


def rows(folder, columns=("step", "epoch", "lr", "loss", "valid_loss")):
    with open(folder / "metrics.csv", newline="") as file:
        return [[row[name] for name in columns] for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write(folder / "train.jsonl", 16)
    write(folder / "valid.jsonl", 8)
    return folder


@pytest.fixture(scope="module")
def trained(root, data, tmp_path_factory):
    """(work dir, stdout) of a run of 1 process, and of 2 with half the batch size each."""
    results = {}
    for processes, batch_size in ((1, 4), (2, 2)):
        folder = tmp_path_factory.mktemp(f"np{processes}")
        said, errors = finish(start(
            root, "src/gpt2_ft.py", "--train_data", data / "train.jsonl", "--valid_data",
            data / "valid.jsonl", *FLAGS, "--train_batch_size", batch_size, "--valid_batch_size",
            batch_size, "--work_dir", folder, processes=processes))
        assert errors == ""
        results[processes] = folder, said
    return results


@pytest.mark.slow
@needs_mpi
def test_two_processes_are_one_with_twice_the_batch(trained):
    one, two = (rows(trained[n][0]) for n in (1, 2))
    assert len(one) == len(two) == 8
    assert [row[:3] for row in one] == [row[:3] for row in two]
    for column in (3, 4):
        values = [[float(row[column]) for row in side if row[column]] for side in (one, two)]
        assert len(values[0]) == (8, 4)[column - 3]
        assert values[1] == pytest.approx(values[0], abs=1e-5)
    ours, theirs = (torch_file.load(trained[n][0] / "model.8.pt")["model_state_dict"]
                    for n in (1, 2))
    assert all(np.abs(ours[name] - theirs[name]).max() < 1e-4 for name in ours)


@pytest.mark.slow
@needs_mpi
def test_one_process_writes_and_speaks(trained):
    for number in (1, 2):
        folder, said = trained[number]
        lines = said.splitlines()
        assert sum(line.startswith("saved ") for line in lines) == 1
        assert sum(line.startswith("| epoch") for line in lines) == 8
        assert [line for line in lines if line.startswith("|")] == (
            folder / "train.log").read_text().splitlines()
    assert {path.name for path in trained[1][0].iterdir()} == {
        path.name for path in trained[2][0].iterdir()}


@pytest.mark.slow
@needs_mpi
def test_two_processes_resume(root, data, trained, tmp_path):
    flags = ["--train_data", data / "train.jsonl", "--valid_data", data / "valid.jsonl", *FLAGS,
             "--train_batch_size", 2, "--valid_batch_size", 2, "--work_dir", tmp_path]
    process = start(root, "src/gpt2_ft.py", *flags)
    for line in process.stdout:
        if re.match(r"\| epoch +1 step +3 ", line):
            break
    process.send_signal(signal.SIGKILL)  # all processes end when mpirun ends
    process.communicate(timeout=100)
    deadline = time.monotonic() + 20
    while subprocess.run(["pgrep", "-f", str(tmp_path)], stdout=subprocess.DEVNULL
                         ).returncode == 0 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert list(tmp_path.glob("resume.*.pt"))
    said, _ = finish(start(root, "src/gpt2_ft.py", *flags, "--resume", processes=1), 1)
    _, errors = finish(start(root, "src/gpt2_ft.py", *flags, "--resume"))
    assert errors == ""
    assert rows(tmp_path) == rows(trained[2][0])
    assert (tmp_path / "model.8.pt").read_bytes() == (trained[2][0] / "model.8.pt").read_bytes()


@pytest.mark.slow
@needs_mpi
def test_predictions_of_two_processes(root, data, trained, tmp_path):
    lines = (data / "valid.jsonl").read_text().splitlines()

    def predict(chosen, processes):
        (tmp_path / "test.jsonl").write_text("\n".join(chosen) + "\n")
        finish(start(root, "src/gpt2_beam.py", "--data", tmp_path / "test.jsonl", "--seq_len",
                     12, "--eval_len", 4, "--model_card", "gpt2.nano", "--init_checkpoint",
                     trained[2][0] / "model.8.pt", "--lora_dim", 2, "--lora_alpha", 8, "--beam",
                     3, "--batch_size", 2, "--work_dir", tmp_path, "--output_file", "out.jsonl",
                     "--device", "cpu", processes=processes))
        return (tmp_path / "out.jsonl").read_text().splitlines()

    alone = predict([*lines, lines[0]], processes=1)
    assert [json.loads(line)["id"] for line in alone] == list(range(9))
    assert predict([*lines, lines[0]], processes=2) == alone
    assert predict(lines[:1], processes=2) == alone[:1]  # the second process has no sample


@pytest.mark.slow
@needs_mpi
def test_a_mistake_ends_all_with_one_line(root, data, tmp_path):
    flags = ["--train_data", data / "none.jsonl", "--valid_data", data / "valid.jsonl", *FLAGS,
             "--work_dir", tmp_path / "out"]
    _, errors = finish(start(root, "src/gpt2_ft.py", *flags), 1)
    assert errors.count("error: ") == 1 and "none.jsonl" in errors and "Traceback" not in errors
    _, errors = finish(start(root, "src/gpt2_ft.py", *flags, "--fp16"), 2)
    assert errors.count("error: unrecognized arguments: --fp16; ") == 1 and "usage" not in errors
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@needs_mpi
@pytest.mark.parametrize("flag", ["lr", "train_data", "init_checkpoint", "save_interval"])
def test_processes_with_other_settings(root, data, trained, tmp_path, flag):
    """Other data has other sizes, too: without a check, each process waits for the other."""
    (tmp_path / "train.jsonl").write_bytes((data / "valid.jsonl").read_bytes() * 4)
    base = trained[1][0] / "model.8.pt"
    other = {"lr": 0.1, "train_data": tmp_path / "train.jsonl", "save_interval": 5,
             "init_checkpoint": tmp_path / "other.pt"}[flag]
    command = [sys.executable, root / "src/gpt2_ft.py", "--train_data", data / "train.jsonl",
               "--valid_data", data / "valid.jsonl", *FLAGS, "--init_checkpoint", base,
               "--work_dir", tmp_path / "out"]
    if flag == "init_checkpoint":  # a whole model that differs in one weight
        state = torch_file.load(base)["model_state_dict"]
        state["transformer.ln_f.bias"] = state["transformer.ln_f.bias"] + np.float32(1)
        torch_file.save(other, {"model_state_dict": state})
    done = subprocess.run(
        ["mpirun", "--quiet", "--oversubscribe", "-np", "1", *map(str, command), ":", "-np", "1",
         *map(str, command), f"--{flag}", str(other)], capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"})
    assert done.returncode == 1
    assert done.stderr == (f"error: --{flag}: process 1 has another value or file than process 0; "
                           "start all with the same flags and files\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@needs_mpi
def test_a_process_that_dies_ends_all(root, data, tmp_path):
    process = start(root, "src/gpt2_ft.py", "--train_data", data / "train.jsonl", "--valid_data",
                    data / "valid.jsonl", *FLAGS, "--max_epoch", 1000, "--work_dir", tmp_path)
    for line in process.stdout:
        if line.startswith("| epoch"):
            break
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True,
                              text=True).stdout.split()
    assert len(children) == 2
    os.kill(max(map(int, children)), signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    assert re.fullmatch(f"error: process [01] of 2 {re.escape(CRASH)}\n", said)


@pytest.mark.slow
@needs_mpi
def test_an_error_in_one_process_alone_is_told(root):
    code = ("from runtime import processes, script\n"
            "from runtime.errors import InputError\n"
            "def main():\n"
            "    if processes.rank() == 1: raise InputError('only here')\n"
            "    import time; time.sleep(100)\n"
            "script.run(main)\n")
    began = time.monotonic()
    process = subprocess.run(
        ["mpirun", "--quiet", "--oversubscribe", "-np", "2", sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(root / "src"), "OMPI_ALLOW_RUN_AS_ROOT": "1",
             "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}, capture_output=True, text=True)
    assert process.returncode == 1 and "error: only here" in process.stderr
    assert time.monotonic() - began < 60


def test_one_process_has_nothing_to_do_with_mpi(root, tmp_path):
    """An mpicc on the PATH is not called, and no MPI library is loaded."""
    stub = tmp_path / "mpicc"
    stub.write_text(f"#!/bin/sh\ntouch {tmp_path}/asked\nexit 1\n")
    stub.chmod(0o755)
    code = ("from runtime import backend; backend.start('cpu')\n"
            "import jittor; assert not jittor.in_mpi\n"
            "assert 'libmpi' not in open('/proc/self/maps').read()\n")
    environment = {name: value for name, value in os.environ.items() if name != "use_mpi"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env={**environment, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
             "PYTHONPATH": str(root / "src")})
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "asked").exists()


@pytest.mark.slow
@needs_mpi
@pytest.mark.parametrize("variables, code", [
    ({"OMPI_COMM_WORLD_SIZE": "x"}, 0), ({"OMPI_COMM_WORLD_SIZE": ""}, 0),
    ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, 1)])
def test_variables_of_mpirun_without_mpirun(root, variables, code):
    start = "from runtime import backend, script; script.run(lambda: backend.start('cpu'))"
    done = subprocess.run([sys.executable, "-c", start], capture_output=True, text=True,
                          timeout=300, env={**os.environ, "PYTHONPATH": str(root / "src"),
                                            **variables})
    assert done.returncode == code
    assert done.stderr == "" or done.stderr == (
        "error: OMPI_COMM_WORLD_SIZE is set, but mpirun did not start this process; unset the "
        "variables whose names begin with OMPI_\n")


def test_mpirun_without_a_compiler_for_it(root, tmp_path):
    (tmp_path / "g++").symlink_to(shutil.which("g++"))
    code = "from runtime import backend, script; script.run(lambda: backend.start('cpu'))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env={"PATH": str(tmp_path), "HOME": str(tmp_path), "PYTHONPATH": str(root / "src"),
             "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"})
    assert done.returncode == 1
    assert done.stderr == ("error: mpicc not found, Jittor compiles its part of MPI with it; "
                           "apt-get install openmpi-bin libopenmpi-dev\n")
