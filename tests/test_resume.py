"""Interrupted runs (killed, stopped, out of disk space), their state files and their resumption."""

from __future__ import annotations

import csv
import itertools
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
from conftest import run_main

from dataset import FTDataset
from runtime import torch_file
from runtime.compiling import CRASH

KILLS = int(os.environ.get("KILLS", 6))
COLUMNS = ("step", "epoch", "lr", "loss", "valid_loss")
FLAGS = ["--train_batch_size", 2, "--valid_batch_size", 2, "--grad_acc", 3, "--seq_len", 12,
         "--model_card", "gpt2.nano", "--lr", 0.02, "--max_epoch", 3, "--save_interval", 5,
         "--log_interval", 4, "--eval_interval", 3, "--state_interval", 1, "--lora_dim", 2,
         "--lora_alpha", 8, "--lora_dropout", 0.2, "--label_smooth", 0.1, "--correct_bias",
         "--clip", 1, "--warmup_step", 2]
STEPS, UNIT = 12, 3  # steps; micro-batches that are computed as one, here a whole update


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """FLAGS with data of 7 and 3 samples, which are filled up to whole batches of 2."""
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(1)
    for name, count in (("train", 7), ("valid", 3)):
        with open(folder / f"{name}.jsonl", "w") as file:
            for _ in range(count):
                record = {key: [draw.randrange(97) for _ in range(draw.randint(2, 7))]
                          for key in ("context", "completion")}
                file.write(json.dumps(record) + "\n")
    return ["--train_data", folder / "train.jsonl", "--valid_data", folder / "valid.jsonl", *FLAGS]


def left(folder) -> dict:
    """A run's results: metrics and log without times, checkpoints, and names of the other files."""
    with open(folder / "metrics.csv", newline="") as file:
        rows = [[row[name] for name in COLUMNS] for row in csv.DictReader(file)]
    log = re.sub(r"(ms/batch|time:) +[0-9.]+", r"\1", (folder / "train.log").read_text())
    checkpoints = {path.name: path.read_bytes() for path in folder.glob("model.*")}
    others = {path.name for path in folder.iterdir()} - checkpoints.keys()
    return {"rows": rows, "log": log, "others": others, **checkpoints}


@pytest.fixture(scope="module")
def train(flags, tiny):
    """Trains in this process; raises signal ``number`` in the middle of step ``stop``.

    With ``alone``, each micro-batch is computed alone, as if it had many tokens.
    """
    import gpt2_ft
    import trainer

    def run(work_dir, *more, stop=None, number=signal.SIGINT, alone=False):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored under nohup
        with pytest.MonkeyPatch.context() as patch:
            def seed_dropout(model, seed, steps, original=trainer.lora.seed_dropout):
                if stop in steps:
                    signal.raise_signal(number)
                original(model, seed, steps)

            patch.setattr(trainer.lora, "seed_dropout", seed_dropout)
            if alone:
                patch.setattr(trainer, "TOKENS_AT_ONCE", 1)
            return run_main(gpt2_ft.main, [*flags, "--work_dir", work_dir, *more])

    return run


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """The result of a run without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    assert train(folder) == (0, "")
    return left(folder)


def test_a_finished_run_leaves_no_state(whole):
    assert whole["others"] == {"finished.json", "train.log", "metrics.csv", "loss.png",
                               ".training"}  # the lock's file
    assert {name for name in whole if name.startswith("model")} == {
        "model.5.pt", "model.10.pt", "model.12.pt", "model.best.pt"}
    best = min(range(len(whole["rows"])), key=lambda i: float(whole["rows"][i][4] or "inf"))
    assert whole["rows"][best][4] and len(whole["rows"]) == STEPS


def test_a_finished_run_is_recognised(train, whole, tmp_path):
    assert train(tmp_path, "--lr", 0.01) == (0, "")
    assert train(tmp_path, "--resume", "auto") == (0, "")  # other settings: trains anew
    assert left(tmp_path) == whole
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    for resume in ("yes", "auto"):
        assert train(tmp_path, "--resume", resume, "--state_interval", 4) == (0, "")
        assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    assert train(tmp_path) == (0, "")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} != before
    assert left(tmp_path) == whole
    last = tmp_path / f"model.{STEPS}.pt"
    last.write_bytes(last.read_bytes() + b"changed")
    assert train(tmp_path, "--resume") == (0, "")
    assert left(tmp_path) == whole


def stops_and_resumes(train, whole, folder, stop, end, **options):
    """A run that is stopped in step ``stop`` ends after step ``end``, and resumed as ``whole``."""
    number = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)[stop % 3]
    code, said = train(folder, "--state_interval", 100, stop=stop, number=number, **options)
    assert code == 130
    assert said == f"stopped after step {end}; to continue: the same command with --resume\n"
    assert [path.name for path in folder.glob("resume.*")] == [f"resume.{end}.pt"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert train(folder, "--resume", **options) == (0, "")
    assert left(folder) == whole


@pytest.mark.parametrize("stop", range(1, STEPS - UNIT + 1))
def test_stopped_at_every_step(train, whole, tmp_path, stop):
    stops_and_resumes(train, whole, tmp_path, stop, -(-stop // UNIT) * UNIT)


@pytest.fixture(scope="module")
def whole_alone(train, tmp_path_factory):
    """The result of a run that computes each micro-batch alone."""
    folder = tmp_path_factory.mktemp("whole_alone")
    assert train(folder, alone=True) == (0, "")
    return left(folder)


@pytest.mark.parametrize("stop", [1, 2, 6, 11])
def test_stopped_between_the_micro_batches_of_an_update(train, whole_alone, tmp_path, stop):
    stops_and_resumes(train, whole_alone, tmp_path, stop, stop, alone=True)


def agree(ours, theirs):
    """Asserts that two runs' results are the same but for rounding."""
    assert ours.keys() == theirs.keys() and ours["others"] == theirs["others"]
    assert [row[:2] for row in ours["rows"]] == [row[:2] for row in theirs["rows"]]
    for column in (2, 3, 4):
        values = [[row[column] for row in side["rows"]] for side in (ours, theirs)]
        assert [float(v or 0) for v in values[0]] == pytest.approx(
            [float(v or 0) for v in values[1]], rel=1e-4)
    number = r"\d+\.\d+"
    assert re.sub(number, "", ours["log"]) == re.sub(number, "", theirs["log"])
    assert [float(n) for n in re.findall(number, ours["log"])] == pytest.approx(
        [float(n) for n in re.findall(number, theirs["log"])], abs=0.03)


def test_computed_as_one_or_alone(train, whole, whole_alone, tmp_path):
    """The same log lines, losses and files in the same order, also those of steps in a unit; a
    state between the micro-batches of an update, as older versions left it, is gone on from."""
    agree(whole, whole_alone)
    for folder, stop in ((tmp_path / "4", 4), (tmp_path / "8", 8)):
        assert train(folder, stop=stop, alone=True)[0] == 130
        assert (folder / f"resume.{stop}.pt").is_file()
        assert train(folder, "--resume") == (0, "")
        agree(left(folder), whole)
    for name in ("model.5.pt", "model.10.pt"):  # in the middle of a unit: before its update
        (tmp_path / name).write_bytes(whole[name])
        (tmp_path / f"alone.{name}").write_bytes(whole_alone[name])
        ours, theirs = (torch_file.load(path)["model_state_dict"]
                        for path in (tmp_path / name, tmp_path / f"alone.{name}"))
        assert all(np.allclose(array, theirs[key], atol=1e-4) for key, array in ours.items())


def test_stopped_twice_without_lora(train, tmp_path):
    assert train(tmp_path / "whole", "--lora_dim", 0)[0] == 0
    part = tmp_path / "part"
    assert train(part, "--lora_dim", 0, stop=4)[0] == 130
    assert train(part, "--lora_dim", 0, "--resume", "auto", stop=8)[0] == 130
    assert train(part, "--lora_dim", 0, "--resume")[0] == 0
    assert left(part) == left(tmp_path / "whole")


def test_the_state_serves_as_lora_checkpoint(train, tmp_path):
    import checkpoint

    assert train(tmp_path, stop=6)[0] == 130
    names = set(checkpoint.read_weights(tmp_path / "resume.6.pt"))
    assert names == {f"transformer.h.{i}.attn.c_attn.lora_{x}" for i in (0, 1) for x in "AB"}


@pytest.mark.parametrize("damage", [lambda data: data[:len(data) // 2], lambda data: b"",
                                    lambda data: data[:3000] + b"x" + data[3001:]])
def test_the_newest_whole_state(train, whole, tmp_path, damage):
    assert train(tmp_path, stop=7)[0] == 130
    assert sorted(path.name for path in tmp_path.glob("resume.*")) == [
        "resume.6.pt", "resume.9.pt"]
    newest = tmp_path / "resume.9.pt"
    newest.write_bytes(damage(newest.read_bytes()))
    assert train(tmp_path, "--resume") == (0, "")
    assert left(tmp_path) == whole
    assert train(tmp_path, stop=2)[0] == 130
    for path in tmp_path.glob("resume.*"):
        path.write_bytes(b"")
    code, said = train(tmp_path, "--resume")
    assert code == 1 and said.startswith(f"error: {tmp_path / 'resume.3.pt'}: no state")


def test_a_state_holds_the_generators_that_fill_up_batches(train, flags, tmp_path):
    """The run stops after step 6: an epoch has 4 steps, and validations followed steps 3 and 6.

    10 is the default seed.
    """
    assert train(tmp_path, stop=5)[0] == 130
    about = json.loads(torch_file.load(tmp_path / "resume.6.pt")["about"])
    data, valid = (FTDataset(path, 2, 12) for path in flags[1:4:2])
    unused = valid.fill_state
    for number, _ in enumerate([*data.batches(10, 1), *itertools.islice(data.batches(10, 2), 2)]):
        assert number < 6
    for _ in (3, 6):
        list(valid.batches(10, 0))
    assert about["train_fill"] == [data.fill_state]
    assert about["valid_fill"] == [valid.fill_state] != [unused]


@pytest.fixture(scope="module")
def stopped(train, tmp_path_factory):
    """A work dir whose only state is that after step 6."""
    folder = tmp_path_factory.mktemp("stopped")
    assert train(folder, stop=4)[0] == 130
    (folder / "resume.3.pt").unlink()
    return folder


@pytest.mark.parametrize("key", ["train_fill", "valid_fill"])
@pytest.mark.parametrize("change", [
    lambda states: None, lambda states: [], lambda states: states * 2, lambda states: states[0],
    lambda states: [states[0][:-1]], lambda states: [[*states[0][:-1], 625]],
    lambda states: [[-1, *states[0][1:]]], lambda states: [[2**32, *states[0][1:]]],
    lambda states: [["1", *states[0][1:]]], lambda states: [[True, *states[0][1:]]],
], ids=["none", "no process", "two processes", "flat", "short", "index", "negative", "large",
        "text", "bool"])
def test_a_malformed_state_of_fillers_is_refused(train, stopped, tmp_path, key, change):
    raw = torch_file.load(stopped / "resume.6.pt")
    about = json.loads(raw["about"])
    about[key] = change(about[key])
    path = tmp_path / "resume.6.pt"
    torch_file.save(path, {**raw, "about": json.dumps(about)})
    assert train(tmp_path, "--resume") == (
        1, f"error: {path}: no state of a training run; remove it\n")


def test_other_settings_are_refused(train, whole, flags, tmp_path):
    assert train(tmp_path, stop=4)[0] == 130
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = tmp_path / "other.jsonl"
    other.write_text('{"context": [1, 2], "completion": [3, 4]}\n')
    for more, named in ((["--lr", 0.03], "--lr 0.02, not 0.03"), (["--no_decay_bias"],
                        "--no_decay_bias False, not True"), (["--max_epoch", 4], "--max_epoch"),
                        (["--train_data", other], "another --train_data")):
        code, said = train(tmp_path, *more, "--resume")
        assert code == 1 and len(said.splitlines()) == 1 and named in said, said
        assert str(tmp_path / "resume.6.pt") in said and "--resume" in said
    other.unlink()
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    # flags without effect on the result may differ; if others differ, auto starts a new run
    assert train(tmp_path, "--lr", 0.03, "--resume", "auto", stop=3)[0] == 130
    assert not (tmp_path / "resume.6.pt").exists()
    assert train(tmp_path, stop=4)[0] == 130
    assert train(tmp_path, "--state_interval", 2, "--keep_last", 9, "--resume") == (0, "")
    assert left(tmp_path) == whole


def test_without_a_state_it_begins_and_says_so(train, whole, tmp_path, capsys):
    import gpt2_ft

    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpt2_ft, "log", said.append)
        assert train(tmp_path / "new", "--resume")[0] == 0
    assert f"{tmp_path / 'new'}: no state to resume from; starting from the beginning" in said
    assert left(tmp_path / "new") == whole


def test_a_shortened_log_is_refused(train, tmp_path):
    assert train(tmp_path, stop=6)[0] == 130
    (tmp_path / "metrics.csv").write_text("step\n")
    code, said = train(tmp_path, "--resume")
    assert code == 1 and str(tmp_path / "metrics.csv") in said and "--resume" in said


def test_a_new_run_removes_an_old_state(train, whole, tmp_path):
    assert train(tmp_path, "--seq_len", 11, stop=8)[0] == 130
    assert train(tmp_path, stop=3)[0] == 130
    assert [path.name for path in tmp_path.glob("resume.*")] == ["resume.3.pt"]
    (tmp_path / "model.5.pt").unlink(missing_ok=True)
    (tmp_path / "model.10.pt").unlink(missing_ok=True)
    assert train(tmp_path, "--resume") == (0, "")
    assert left(tmp_path) == whole


@pytest.mark.parametrize("stop", [None, 7])
def test_keep_last(train, tmp_path, stop):
    more = ["--save_interval", 2, "--keep_last", 2]
    (tmp_path / "model.99.pt").write_bytes(b"another run's")
    if stop:
        assert train(tmp_path, *more, stop=stop)[0] == 130
    assert train(tmp_path, *more, "--resume")[0] == 0
    assert {path.name for path in tmp_path.glob("model.*")} == {
        "model.8.pt", "model.10.pt", "model.12.pt", "model.best.pt", "model.99.pt"}


def test_best_by_validation(train, tmp_path):
    """model.best.pt holds the weights after the validation with the lowest loss."""
    assert train(tmp_path, "--save_interval", 3, "--lr", 0.5)[0] == 0
    losses = {int(row[0]): float(row[4]) for row in left(tmp_path)["rows"] if row[4]}
    best = min(losses, key=losses.get)
    assert list(losses) == [3, 6, 9, 12]
    best_weights, saved = (torch_file.load(tmp_path / name)["model_state_dict"]
                           for name in ("model.best.pt", f"model.{best}.pt"))
    assert all(np.array_equal(array, saved[name]) for name, array in best_weights.items())


def test_loss_no_longer_finite(train, tmp_path):
    code, said = train(tmp_path, "--lora_dim", 0, "--lr", 1e30, "--clip", 0, "--warmup_step", 6,
                       "--grad_acc", 1)
    assert code == 1 and "--lr" in said and len(said.splitlines()) == 1
    at, step = re.search(r"(at|after) step (\d+)", said).groups()
    states = [int(path.name.split(".")[1]) for path in tmp_path.glob("resume.*")]
    for good in states:  # the loss of its weights was finite
        assert good < int(step) - (at == "at")
        state = torch_file.load(tmp_path / f"resume.{good}.pt")
        assert all(np.isfinite(array).all() for array in state["model_state_dict"].values())
    if states:
        assert f"--init_checkpoint {tmp_path / f'resume.{max(states)}.pt'}" in said


def test_a_full_disk_leaves_the_old_files(train, whole, tmp_path):
    """A limit on the file size makes writing fail, as on a full disk; then the run is resumed."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    assert train(tmp_path, stop=3)[0] == 130
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, limits[1]))
        code, said = train(tmp_path, "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert code == 1 and said.startswith(f"error: {tmp_path}") and len(said.splitlines()) == 1
    assert "cannot be written" in said and not list(tmp_path.glob(".*.part"))
    assert train(tmp_path, "--resume") == (0, "")
    assert left(tmp_path) == whole


@pytest.fixture
def script(root, flags, tmp_path):
    """Starts src/gpt2_ft.py in its own process, with the real gpt2.nano."""
    def start(*more, **options):
        return subprocess.Popen(
            [sys.executable, root / "src/gpt2_ft.py", *map(str, flags), "--device", "cpu",
             "--log_interval", "1", "--work_dir", tmp_path / "out", *map(str, more)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    return start


@pytest.mark.slow
def test_ctrl_c_on_a_terminal(script, tmp_path):
    """A terminal sends Ctrl-C to the whole process group, including Jittor's processes."""
    process = script("--max_epoch", 1000, start_new_session=True,
                     preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    try:
        for line in process.stdout:
            if line.startswith("| epoch"):
                break
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=20)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    assert re.fullmatch(r"stopped after step \d+; .*\n", said)
    step = said.split()[3].rstrip(";")
    assert (tmp_path / "out" / f"resume.{step}.pt").is_file()


@pytest.mark.slow
def test_killed_at_random_moments(script, tmp_path):
    """A run that is killed and resumed many times writes the same files as an uninterrupted run."""
    out = tmp_path / "out"

    def until_training(process):
        for line in process.stdout:
            if "weights train" in line:
                return time.monotonic()
        raise AssertionError(process.stderr.read())

    process = script()
    began = until_training(process)
    assert process.wait() == 0
    took, expected = time.monotonic() - began, left(out)
    shutil.rmtree(out)
    draw, killed = random.Random(os.environ.get("KILLS_SEED", 0)), 0
    while killed < KILLS:
        process = script("--resume")
        until_training(process)
        time.sleep(draw.uniform(0, took / 2))
        process.kill()
        _, said = process.communicate()
        assert said in ("", f"error: process 0 of 1 {CRASH}\n")
        killed += 1
    process = script("--resume")
    _, said = process.communicate()
    assert process.returncode == 0, said
    assert left(out) == expected


@pytest.mark.slow
def test_a_reader_that_goes_away(script):
    process = script()
    process.stdout.close()
    assert process.wait() == 141 and process.stderr.read() == ""


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_a_work_dir_of_two_megabytes(script, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", out],
                             capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        process = script()  # its LoRA states fit, but its last checkpoint has 26 MB
        _, said = process.communicate()
        assert process.returncode == 1
        assert re.fullmatch(rf"error: {out}/model.12.pt: cannot be written: No space.*\n", said)
        assert {path.name for path in out.iterdir()} >= {"resume.6.pt", "resume.9.pt"}
        assert not list(out.glob("model.12.pt")) and not list(out.glob(".*.part"))
        subprocess.run(["mount", "-o", "remount,size=80m", out], check=True)
        process = script("--resume")
        _, said = process.communicate()
        assert process.returncode == 0, said
        subprocess.run(["mount", "-o", "remount,ro", out], check=True)
        process = script()
        _, said = process.communicate()
        assert process.returncode == 1
        assert re.fullmatch(rf"error: {out}: cannot be written: Read-only.*\n", said)
    finally:
        subprocess.run(["umount", out], check=True)
