"""work.sh from end to end: the demo with few steps, and the experiment on a few samples.

Locks, the choice of the checkpoint and wrong values are tested with a stand-in for Python.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

scores = pytest.mark.skipif(shutil.which("java") is None, reason="scores need Java")


@pytest.fixture
def copy(root, vocab, tmp_path, request):
    """A copy of the repository's scripts, so that tests do not overwrite the user's files.

    The test may give the name of its folder as a parameter.
    """
    copy = tmp_path / getattr(request, "param", "copy")
    ignore = shutil.ignore_patterns("__pycache__", "work", "e2e")
    for folder in ("src", "vocab", "data"):
        shutil.copytree(root / folder, copy / folder, ignore=ignore)
    shutil.copytree(root / "eval", copy / "eval")
    for file in ("work.sh", "setup.sh", "requirement.txt"):
        shutil.copy(root / file, copy / file)
    return copy


def work(folder, *words, **variables):
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix, "DEVICE": "cpu",
                   **{name: str(value) for name, value in variables.items()}}
    return subprocess.run(["bash", "work.sh", *words], cwd=folder, env=environment,
                          capture_output=True, text=True)


@scores
@pytest.mark.slow
def test_demo_in_a_miniature(copy):
    done = work(copy, "demo", BASE_STEPS=6, BATCH_SIZE=40, BEAM_BATCH_SIZE=48)
    assert done.returncode == 0, done.stderr
    table = done.stdout[done.stdout.rindex("BLEU"):].splitlines()
    assert re.fullmatch(r"frozen base alone( +\d+\.\d{4}){5}", table[1])
    assert re.fullmatch(r"with LoRA( +\d+\.\d{4}){5}", table[2])
    assert sum(line.startswith("input ") for line in table) == 3
    assert sum(line.startswith("reference ") for line in table) == 12
    assert sum(line.startswith("LoRA ") for line in table) == 3
    folder = copy / "trained_models" / "demo"
    row, = csv.DictReader(open(folder / "results.csv"))
    assert (row["card"], row["steps"]) == ("gpt2.nano", "40")
    assert row["CIDEr"] == table[2].split()[-1]
    assert (folder / "loss.png").is_file() and (folder / "base" / "loss.png").is_file()
    assert str(folder.relative_to(copy) / "loss.png") in table[-1]
    assert len((folder / "lora.txt").read_text().splitlines()) == 48
    assert len((folder / "metrics.csv").read_text().splitlines()) == 1 + 40  # 1600 samples


@scores
@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("mpirun") and shutil.which("mpicc")), reason="no MPI")
def test_demo_of_two_processes(copy):
    done = work(copy, "demo", NPROC=2, BASE_STEPS=3, BATCH_SIZE=40, BEAM_BATCH_SIZE=48)
    assert done.returncode == 0, done.stderr
    folder = copy / "trained_models" / "demo"
    assert len((folder / "metrics.csv").read_text().splitlines()) == 1 + 20
    assert len((folder / "lora.txt").read_text().splitlines()) == 48
    assert done.stdout.count("gpt2.nano: ") == 2  # printed once for the base and once for LoRA


@scores
@pytest.mark.slow
@pytest.mark.parametrize("copy", ["copy", "My Projects", "我的 项目's"], indirect=True)
def test_experiment(copy):
    """work.sh runs all four stages, finds the last checkpoint and writes the documented files."""
    subprocess.run([sys.executable, "data/demo/generate.py", "data/e2e"], cwd=copy, check=True,
                   stdout=subprocess.DEVNULL)
    folder = copy / "data" / "e2e"
    for name, count in (("train", 10), ("valid", 2), ("test", 6)):
        path = folder / f"{name}_formatted.jsonl"
        lines = path.read_text().splitlines()[:count]
        path.write_text("".join(f"{line}\n" for line in lines))
        subprocess.run([sys.executable, "src/gpt2_encode.py", "--vocab", "vocab", "--input", path,
                        "--output", folder / f"{name}.jsonl", "--add_bos", "--add_eos"],
                       cwd=copy, check=True, stdout=subprocess.DEVNULL)
    base = copy / "base"
    subprocess.run([sys.executable, "src/gpt2_ft.py", "--train_data", folder / "train.jsonl",
                    "--valid_data", folder / "valid.jsonl", "--model_card", "gpt2.nano",
                    "--seq_len", "64", "--max_step", "1", "--work_dir", base, "--device", "cpu"],
                   cwd=copy, check=True, stdout=subprocess.DEVNULL)

    out = copy / "trained_models/GPT2_M/e2e"
    out.mkdir(parents=True)
    (out / "model.2000.pt").write_text("of an earlier, longer run")
    os.utime(out / "model.2000.pt", (2**32, 2**32))
    done = work(copy, MODEL_CARD="gpt2.nano", INIT_CHECKPOINT=base / "model.1.pt", EPOCHS=2)
    assert done.returncode == 0, done.stderr
    predictions = out / "predict.10.b10p08r4.jsonl"
    assert [json.loads(line)["id"] for line in predictions.read_text().splitlines()] == [
        0, 1, 2, 3, 4, 5]
    assert (copy / "e2e_ref.txt").read_text().count("\n\n") == 2  # six lines, two inputs
    assert len((copy / "e2e_pred.txt").read_text().splitlines()) == 2
    assert re.search(r"SCORES:\n=+\nBLEU: \d\.\d{4}\nNIST: ", done.stdout)
    assert (out / "scores.txt").read_text() in done.stdout
    row, = csv.DictReader(open(out / "results.csv"))
    assert (row["data"], row["card"], row["rank"], row["alpha"], row["seed"], row["steps"]) == (
        "./data/e2e", "gpt2.nano", "4", "32", "2025", "10")
    assert f"BLEU: {row['BLEU']}\n" in done.stdout and f"CIDEr: {row['CIDEr']}\n" in done.stdout
    assert f" {float(row['samples_per_s']):.2f} samples/s; saved " in done.stdout
    assert (out / "model.best.pt").is_file() and done.stdout.count("| valid loss ") == 2


def test_missing_files_name_the_command_that_fetches_them(copy, tmp_path):
    done = work(copy)
    assert done.returncode == 1
    line, = done.stderr.splitlines()
    assert "data/e2e/train.jsonl" in line and "bash create_datasets.sh" in line
    assert "bash data/download_data.sh" in line and "bash work.sh demo" in line
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.jsonl").write_text("")
    done = work(copy, DATA=tmp_path)
    assert done.returncode == 1
    line, = done.stderr.splitlines()
    assert "pretrained_checkpoints/gpt2-pytorch_model.bin" in line
    assert "bash download_pretrained_checkpoints.sh sm" in line


# Records its words. Training leaves the checkpoints STEPS and, if LAST is set, metrics.csv up to
# LAST. Scoring prints SCORES and ends with exit code SCORED.
# The stage WAITS_IN ends when a line can be read from GATE.
PYTHON = """#!/usr/bin/env bash
[[ "${1:-}" == *.py ]] || exit 0
stage="$(basename "$1" .py)"
printf '%q ' "$stage" "$@" >> "$CALLS"
echo >> "$CALLS"
[[ "$stage" != "${WAITS_IN:-}" ]] || read -r < "$GATE"
[[ "$stage" != measure_scores ]] || { printf "${SCORES:-}"; exit "${SCORED:-0}"; }
[[ "$stage" == gpt2_ft ]] || exit 0
while [[ "$1" != --work_dir ]]; do shift; done
mkdir -p "$2"
for step in ${STEPS:-7}; do touch "$2/model.$step.pt"; done
[[ -z "${LAST:-}" ]] || printf 'step,epoch,loss\n1,1,9.5\n%s,1,9.5\n' "$LAST" > "$2/metrics.csv"
"""


class Clone:
    """work.sh, setup.sh and create_datasets.sh in a folder, with stand-ins for all programs."""

    def __init__(self, root, folder):
        self.folder, self.gate, self.calls = folder, folder / "gate", folder / "calls"
        for file in ("work.sh", "setup.sh", "create_datasets.sh", "requirement.txt",
                     "data/e2e.ini", "data/demo/demo.ini", "data/demo/base.ini"):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / file, folder / file)
        for file in ("train.jsonl", "valid.jsonl", "test.jsonl", "train.txt", "valid.txt",
                     "test.txt"):
            (folder / "data/e2e").mkdir(exist_ok=True)
            (folder / "data/e2e" / file).touch()
        (folder / "pretrained_checkpoints").mkdir()
        (folder / "pretrained_checkpoints/gpt2-pytorch_model.bin").touch()
        (folder / "bin").mkdir()
        for file, text in (("python", PYTHON), ("java", "#!/bin/sh\n"),
                           ("g++", "#!/bin/sh\necho 12\n")):
            (folder / "bin" / file).write_text(text)
            (folder / "bin" / file).chmod(0o755)
        os.mkfifo(self.gate)
        self.calls.touch()
        self.processes = []

    def popen(self, *words, script="work.sh", **variables):
        kept = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
        process = subprocess.Popen(
            ["bash", script, *words], cwd=self.folder, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={
                **kept, "PATH": f"{self.folder}/bin:{os.environ['PATH']}", "GATE": str(self.gate),
                "CALLS": str(self.calls), "VIRTUAL_ENV": str(self.folder),
                **{name: str(value) for name, value in variables.items()}})
        self.processes.append(process)
        return process

    def run(self, *words, **variables):
        process = self.popen(*words, **variables)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def called(self, stage):
        """The words of each call of a stage so far."""
        calls = map(shlex.split, self.calls.read_text().splitlines())
        return [words for name, *words in calls if name == stage]

    def running_in(self, stage, *words, **variables):
        """A process of work.sh that waits in ``stage`` for the gate."""
        before = len(self.called(stage))
        process = self.popen(*words, WAITS_IN=stage, **variables)
        while len(self.called(stage)) == before:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        return process

    def go_on(self, *processes):
        """Opens the gate for one process and waits for all; returns their exit codes."""
        self.gate.write_text("go on\n")
        for process in processes:
            process.communicate(timeout=60)
        return [process.returncode for process in processes]


@pytest.fixture
def clone(root, tmp_path):
    clone = Clone(root, tmp_path)
    yield clone
    for process in clone.processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def assert_refused(done, folder, holder, *remedy):
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    for word in (f"error: {folder}: ", f"process {holder.pid} on {os.uname().nodename}", *remedy):
        assert word in line, line
    assert sum(text.startswith("error") for text in done.stderr.splitlines()) == 1


def test_only_one_run_in_a_work_dir(clone):
    first = clone.running_in("gpt2_ft", WORK_DIR="out")
    (clone.folder / "link").symlink_to("out")
    for same in ("out", "./out/", "link", clone.folder / "out"):
        assert_refused(clone.run(WORK_DIR=same), same, first, "wait", "set WORK_DIR")
    assert len(clone.called("gpt2_ft")) == 1
    assert clone.run(WORK_DIR="another").returncode == 0
    assert clone.go_on(first) == [0]
    assert clone.run(WORK_DIR="out").returncode == 0


def test_only_one_demo_with_one_data_folder(clone):
    first = clone.running_in("gpt2_encode", "demo")
    assert_refused(clone.run("demo"), "./trained_models/demo", first)
    assert_refused(clone.run("demo", WORK_DIR="out"), "./data/demo/work", first,
                   "set WORK_DIR and DATA")
    assert clone.run("demo", WORK_DIR="out", DATA="out").returncode == 0  # one folder for both


def test_only_one_create_datasets_in_a_folder(clone):
    first = clone.running_in("gpt2_encode", script="create_datasets.sh")
    assert_refused(clone.run(script="create_datasets.sh"), "data/e2e", first, "set DATA_DIR")


def test_the_lock_stays_while_a_program_of_a_killed_run_is_alive(clone):
    first = clone.running_in("gpt2_ft", WORK_DIR="out")
    first.kill()
    first.wait()
    lock = ["flock", "-n", clone.folder / "out/.work.lock", "true"]
    assert subprocess.run(lock).returncode == 1
    second = clone.popen(WORK_DIR="out")  # waits some seconds, as the program may be ending
    assert clone.go_on(first, second) == [-signal.SIGKILL, 0]

    third = clone.running_in("gpt2_ft", WORK_DIR="out")
    os.killpg(third.pid, signal.SIGKILL)
    third.wait()
    assert clone.run(WORK_DIR="out").returncode == 0


def test_texts_and_scores_stay_in_their_work_dir(clone):
    """The names in the root belong to the default folder, whatever it is called."""
    default = clone.folder / "trained_models/GPT2_M/e2e"
    (clone.folder / "link").symlink_to(default)
    first = clone.running_in("measure_scores")
    assert clone.run(WORK_DIR="out", SCORES="BLEU: 0.5\n").returncode == 0  # at the same time
    assert clone.go_on(first) == [0]
    for same in (default, "trained_models//GPT2_M/e2e/", "link"):
        assert clone.run(WORK_DIR=same).returncode == 0
    assert clone.run(WORK_DIR="my out/").returncode == 0
    root, out, my_out = (["e2e_ref.txt", "e2e_pred.txt"], ["out/e2e_ref.txt", "out/e2e_pred.txt"],
                         ["my out/e2e_ref.txt", "my out/e2e_pred.txt"])
    texts = [root, out, root, root, root, my_out]
    assert [words[1:3] for words in clone.called("measure_scores")] == texts
    assert [[words[words.index(flag) + 1] for flag in ("--output_ref_file", "--output_pred_file")]
            for words in clone.called("gpt2_decode")] == texts
    assert (clone.folder / "out/scores.txt").read_text() == "BLEU: 0.5\n"
    assert [words[1:] for words in clone.called("record_scores")][1:3] == [
        [folder, "./data/e2e", "scores.txt", "predict.7.b10p08r4.jsonl"]
        for folder in ("./trained_models/GPT2_M/e2e", str(default))]


@pytest.mark.parametrize("words, name", [([], "scores.txt"), (["demo"], "lora_scores.txt")])
def test_scores_without_meteor_are_kept(clone, words, name):
    scores = clone.folder / "out" / name
    done = clone.run(*words, WORK_DIR="out", DATA="data/e2e", SCORED=1)  # none at all
    assert done.returncode == 1 and not clone.called("record_scores")
    assert not list(scores.parent.glob("*scores.txt*"))
    done = clone.run(*words, WORK_DIR="out", DATA="data/e2e", SCORES="BLEU: 0.5\n", SCORED=1)
    assert done.returncode == 1 and scores.read_text() == "BLEU: 0.5\n"
    assert len(clone.called("record_scores")) == 1
    assert words or "BLEU: 0.5" in done.stdout and "out/scores.txt" in done.stdout


@pytest.mark.parametrize("samples, words, variables, interval", [
    (420, [], {}, 210), (421, [], {}, 211), (3, [], {"BATCH_SIZE": 8}, 1),
    (420, [], {"BATCH_SIZE": 5}, 84), (420, [], {"EVAL_INTERVAL": 9}, 9),
    (4000, [], {}, None), (3998, [], {}, 1999), (0, [], {}, None), (1600, ["demo"], {}, 200),
])
def test_validates_at_least_once_an_epoch(clone, samples, words, variables, interval):
    (clone.folder / "data/e2e/train.jsonl").write_text("{}\n" * samples)
    done = clone.run(*words, DATA="data/e2e", **variables)
    assert done.returncode == 0, done.stderr
    flags = clone.called("gpt2_ft")[-1]
    found = flags[flags.index("--eval_interval") + 1] if "--eval_interval" in flags else None
    assert found == (interval and str(interval))


def test_flag_file_that_validates_more_often_decides(clone):
    (clone.folder / "data/e2e/train.jsonl").write_text("{}\n" * 420)
    with open(clone.folder / "data/e2e.ini", "a") as file:
        file.write("\n[gpt2_ft]\neval_interval = 100\n")
    assert clone.run().returncode == 0
    assert "--eval_interval" not in clone.called("gpt2_ft")[0]


@pytest.mark.parametrize("files, variables, chosen", [
    ([], {"STEPS": "9 1000 999"}, 1000),
    (["model.best.pt", "model.12.pt.old", "model.x13.pt", "model.3.pt"], {"STEPS": "9 10"}, 10),
    (["model.2000.pt"], {"STEPS": "1000 1050", "LAST": 1050}, 1050),
    (["model.1050.pt", "model.2000.pt"], {"STEPS": "1050", "LAST": 1050}, 1050),
])
def test_last_checkpoint(clone, files, variables, chosen):
    """By its step and not by time; not that of an earlier, longer run."""
    (clone.folder / "out").mkdir()
    for file in files:
        (clone.folder / "out" / file).touch()
        os.utime(clone.folder / "out" / file, (2**32, 2**32))
    done = clone.run(WORK_DIR="out", **variables)
    assert done.returncode == 0, done.stderr
    words, = clone.called("gpt2_beam")
    assert words[words.index("--init_checkpoint") + 1] == f"out/model.{chosen}.pt"
    assert f"predict.{chosen}.b10p08r4.jsonl" in words


@pytest.mark.parametrize("words, variables", [
    (["dart"], {}), (["demo", "e2e"], {}),
    *(([], {"NPROC": value}) for value in ("abc", "0", "-1", "1.5", "2 3", "a[$(touch ran)]")),
    ([], {"RESUME": "maybe"}), ([], {"RESUME": "YES"}), ([], {"DEVICE": "tpu"}),
    (["demo"], {"DEVICE": "gpu"}), ([], {"MODEL_CARD": "gpt2"}),
    *((["demo"], {name: value}) for name in ("EPOCHS", "BATCH_SIZE", "BEAM_BATCH_SIZE",
                                             "LOG_INTERVAL", "BASE_STEPS", "GRAD_ACC",
                                             "EVAL_INTERVAL")
      for value in ("0", "x", "-1")),
    *((["demo"], {name: value}) for name in ("SEED", "WARMUP_STEPS", "LORA_DIM")
      for value in ("-1", "1.5")),
    *((["demo"], {"LORA_ALPHA": value}) for value in ("-1", "x", "1.", ".5")),
    *((["demo"], {"LEARNING_RATE": value}) for value in ("fast", "-1", "nan", "e5", ".")),
    ([], {"WORK_DIR": "-x"}), (["demo"], {"WORK_DIR": "@x"}), (["demo"], {"DATA": "--data"}),
    ([], {"WORK_DIR": "work.sh"}), ([], {"WORK_DIR": "work.sh/out"}), ([], {"DATA": "nowhere"}),
    ([], {"INIT_CHECKPOINT": "-m"}),
])
def test_wrong_values_are_refused_before_anything_happens(clone, words, variables):
    (clone.folder / "setup.sh").write_text("touch ran\n")
    done = clone.run(*words, **variables)
    assert done.returncode in (1, 2)
    line, = done.stderr.splitlines()
    for name, value in variables.items():
        assert value in line and (name in line or value == "nowhere"), line
    assert variables or "usage" in line
    assert not (clone.folder / "ran").exists() and not clone.calls.read_text()


def test_usual_values_are_taken(clone):
    for folder in ("a folder", "out/", "out/in/it", str(clone.folder / "whole")):
        done = clone.run(WORK_DIR=folder, LEARNING_RATE="2e-4", SEED=0, WARMUP_STEPS=0, NPROC=1,
                         INIT_CHECKPOINT="pretrained_checkpoints/gpt2-pytorch_model.bin")
        assert done.returncode == 0, done.stderr
        words = clone.called("gpt2_beam")[-1]
        assert words[words.index("--work_dir") + 1] == folder
    for rate in ("1", ".5", "0.0002", "1E-3", "5."):
        assert clone.run("demo", LEARNING_RATE=rate, DATA="a folder").returncode == 0
