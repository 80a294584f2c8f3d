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
from pathlib import Path

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
@pytest.mark.nightly
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
@pytest.mark.parametrize("copy", ["copy", "我的 项目's"], indirect=True)
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


def test_missing_files_name_the_command_that_fetches_them(copy):
    done = work(copy)
    assert done.returncode == 1
    line, = done.stderr.splitlines()
    assert "pretrained_checkpoints/gpt2-pytorch_model.bin" in line
    assert "bash download_pretrained_checkpoints.sh sm" in line and "bash work.sh demo" in line
    (copy / "base.pt").touch()
    for name, place in (("e2e", "e2e"), ("webnlg", "webnlg_challenge_2017"), ("dart", "dart")):
        done = work(copy, name, INIT_CHECKPOINT="base.pt")
        assert done.returncode == 1
        line, = done.stderr.splitlines()
        assert f"data/{place}/train.jsonl" in line and f"bash create_datasets.sh {name}" in line
        assert f"bash data/download_data.sh {name}" in line and "bash work.sh demo" in line


# Records its words. Training leaves the checkpoints STEPS and, if LAST is set, metrics.csv up to
# LAST. Decoding leaves references unless the name of their file fits the pattern UNREFERENCED.
# Scoring prints SCORES and ends with exit code SCORED.
# The stage WAITS_IN ends when a line can be read from GATE.
PYTHON = """#!/usr/bin/env bash
[[ "${1:-}" == *.py ]] || exit 0
stage="$(basename "$1" .py)"
printf '%q ' "$stage" "$@" >> "$CALLS"
echo >> "$CALLS"
[[ "$stage" != "${WAITS_IN:-}" ]] || read -r < "$GATE"
[[ "$stage" != @(measure_scores|eval_m) ]] || { printf "${SCORES:-}"; exit "${SCORED:-0}"; }
while [[ "$stage" == gpt2_decode && $# != 0 ]]; do
    [[ "$1" != --output_ref_file || "$2" == ${UNREFERENCED:-} ]] || touch "$2"
    shift
done
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
                     *(path.relative_to(root) for path in root.glob("data/**/*.ini"))):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / file, folder / file)
        for name in ("train", "valid", "test"):
            self.make(f"data/e2e/{name}.jsonl", f"data/e2e/{name}.txt")
        self.make("data/e2e/test_formatted.jsonl")
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

    def make(self, *files, text=""):
        for file in files:
            (self.folder / file).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / file).write_text(text)

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

    def run(self, *words, **variables):  # also script=FILE
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
        [folder, "./data/e2e", "predict.7.b10p08r4.jsonl", "scores.txt"]
        for folder in ("./trained_models/GPT2_M/e2e", str(default))]


@pytest.mark.parametrize("words", [[], ["webnlg"]])
def test_inputs_without_references_have_no_scores(clone, words):
    clone.make(*(f"data/webnlg_challenge_2017/{file}.jsonl" for file in (
        "train", "valid", "test", "test_formatted")))
    done = clone.run(*words, UNREFERENCED="*", WORK_DIR="out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("no references, so no scores; texts: out/")
    assert not clone.called("measure_scores") + clone.called("eval_m") + clone.called(
        "record_scores")


def test_a_part_without_references_has_no_scores(clone):
    clone.make(*(f"data/webnlg_challenge_2017/{file}.jsonl" for file in ("train", "valid", "test")))
    clone.make("data/webnlg_challenge_2017/test_formatted.jsonl", text="".join(
        json.dumps({"context": "a", "cate": cate}) + "\n" for cate in (True, False)))
    done = clone.run("webnlg", UNREFERENCED="*.seen", WORK_DIR="out", SCORES="a table\n")
    assert done.returncode == 0, done.stderr
    assert "no references, so no scores; texts: out/hypothesis.seen" in done.stdout
    assert done.stdout.count("a table") == 2
    words, = clone.called("record_scores")
    assert words[-2:] == ["scores.json", "scores.unseen.json"]


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
    with open(clone.folder / "data/experiment.ini", "a") as file:
        file.write("\n[gpt2_ft]\neval_interval = 100\n")
    assert clone.run().returncode == 0
    assert "--eval_interval" not in clone.called("gpt2_ft")[0]


@pytest.mark.parametrize("words", [[], ["demo"]])
@pytest.mark.parametrize("variables, training, search", [
    ({}, None, None), ({"PRECISION": "bf16"}, "bf16", "bf16"),
    ({"BEAM_PRECISION": "int8"}, None, "int8"),
    ({"PRECISION": "bf16", "BEAM_PRECISION": "float32"}, "bf16", "float32"),
])
def test_precision(clone, words, variables, training, search):
    done = clone.run(*words, **variables)
    assert done.returncode == 0, done.stderr
    *pretraining, lora = clone.called("gpt2_ft")
    searches = clone.called("gpt2_beam")
    for called, wanted in ([(flags, None) for flags in pretraining] + [(lora, training)]
                           + [(flags, search) for flags in searches]):
        given = [value for flag, value in zip(called, called[1:]) if flag == "--precision"]
        assert (given[-1] if given else None) == wanted  # of a flag given twice, the last one
    assert len(pretraining) == len(words) and len(searches) == 1 + len(words)


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


@pytest.mark.parametrize("name, folder", [
    ("e2e", "data/e2e"), ("webnlg", "data/webnlg_challenge_2017"), ("dart", "data/dart")])
@pytest.mark.parametrize("preset", ["", "paper"])
def test_data_sets_and_presets(clone, name, folder, preset):
    """Data, flags and work dir of an experiment; the paper's settings are on the whole data."""
    data = f"{folder}/whole" if preset else folder
    clone.make(*(f"{data}/{file}.jsonl" for file in ("train", "valid", "test", "test_formatted")),
               "pretrained_checkpoints/gpt2-medium-pytorch_model.bin")
    done = clone.run(name, PRESET=preset)
    assert done.returncode == 0, done.stderr
    work_dir = f"./trained_models/paper/{name}" if preset else f"./trained_models/GPT2_M/{name}"
    files = ["@data/experiment.ini"] + ["@data/paper.ini"] * bool(preset) + (
        ["@data/paper_dart.ini"] * (preset == "paper" and name == "dart"))
    for stage, flag, file in (("gpt2_ft", "--train_data", "train"),
                              ("gpt2_beam", "--data", "test")):
        words, = clone.called(stage)
        assert words[1:1 + len(files)] == files and not words[1 + len(files)].startswith("@")
        assert words[words.index(flag) + 1] == f"./{data}/{file}.jsonl"
        assert words[words.index("--work_dir") + 1] == work_dir
    words, = clone.called("gpt2_ft")
    base = "gpt2-medium-pytorch_model.bin" if preset else "gpt2-pytorch_model.bin"
    assert words[words.index("--init_checkpoint") + 1] == f"./pretrained_checkpoints/{base}"


def test_the_whole_data_is_made_for_the_paper(clone):
    clone.make("pretrained_checkpoints/gpt2-medium-pytorch_model.bin")
    done = clone.run(PRESET="paper")  # the stand-ins for stages 1 and 2 write nothing
    assert done.returncode == 1 and "data/e2e/whole/train.jsonl: no such file" in done.stderr
    assert [words[1:] for words in clone.called("format_converting_e2e")] == [
        [f"data/e2e/{name}.txt", f"data/e2e/whole/{name}_formatted.jsonl", "--fraction", "1"]
        for name in ("train", "test", "valid")]


@pytest.mark.parametrize("cates, parts", [
    (("true", "false"), ["all", "seen", "unseen"]), (("true",), ["all", "seen"]),
    (("false",), ["all", "unseen"])])
def test_webnlg_is_scored_by_seen_and_unseen_categories(clone, cates, parts):
    clone.make(*(f"data/webnlg_challenge_2017/{file}.jsonl" for file in ("train", "valid", "test")))
    clone.make("data/webnlg_challenge_2017/test_formatted.jsonl", text="".join(
        json.dumps({"context": "a", "completion": "b", "cate": cate == "true"}) + "\n"
        for cate in cates))
    done = clone.run("webnlg", WORK_DIR="out", SCORES="a table\n")
    assert done.returncode == 0, done.stderr
    names = ["" if part == "all" else f".{part}" for part in parts]
    assert [words[words.index("--filter") + 1] for words in clone.called("gpt2_decode")] == parts
    assert [words[words.index("--output_ref_file") + 1] for words in clone.called("gpt2_decode")
            ] == [f"out/references{name}" for name in names]
    assert [words[words.index("-R") + 1] for words in clone.called("eval_m")] == [
        f"out/references{name}/reference" for name in names]
    assert [(clone.folder / f"out/scores{name}.txt").read_text() for name in names] == [
        "a table\n"] * len(names)
    words, = clone.called("record_scores")
    assert words[1:] == ["out", "./data/webnlg_challenge_2017", "predict.7.b10p08r4.jsonl",
                         *(f"scores{name}.json" for name in names)]
    assert done.stdout.count("a table") == len(names)
    for part in {"seen", "unseen"} - set(parts):
        assert f"no test input of a category {part} in training" in done.stdout


RAW = {"e2e": ["data/e2e/train.txt", "data/e2e/test.txt", "data/e2e/valid.txt"],
       "webnlg": [f"data/webnlg_challenge_2017/{name}.json" for name in ("train", "test", "dev")],
       "dart": [f"data/dart/dart-v1.1.1-full-{name}.json" for name in ("train", "test", "dev")]}


@pytest.mark.parametrize("there, words, made, said", [
    (["e2e"], [], ["e2e"], ["webnlg: not there", "dart: not there"]),
    (["e2e", "dart"], [], ["e2e", "dart"], ["webnlg: not there"]),
    (["e2e", "webnlg", "dart"], [], ["e2e", "webnlg", "dart"], []),
    (["e2e", "webnlg", "dart"], ["dart", "webnlg"], ["dart", "webnlg"], []),
    (["webnlg"], ["webnlg"], ["webnlg"], []),
])
def test_create_datasets_takes_what_is_there(clone, there, words, made, said):
    shutil.rmtree(clone.folder / "data/e2e")
    for name in there:
        clone.make(*RAW[name])
    done = clone.run(*words, script="create_datasets.sh")
    assert done.returncode == 0, done.stderr
    for name in RAW:
        target = str(Path(RAW[name][0]).parent)
        assert [call[1:3] for call in clone.called(f"format_converting_{name}")] == [
            [raw, f"{target}/{split}_formatted.jsonl"]
            for raw, split in zip(RAW[name], ("train", "test", "valid")) if name in made]
    assert len(clone.called("gpt2_encode")) == 3 * len(made)
    assert [line for line in done.stdout.splitlines() if "not there" in line] == [
        f"{text}, left out; to have it, run: bash data/download_data.sh {text.split(':')[0]}"
        for text in said]


@pytest.mark.parametrize("files, words, variables, code, message", [
    ([], [], {}, 1, "no data set is there; run: bash data/download_data.sh"),
    (RAW["e2e"], ["webnlg"], {}, 1, "data/webnlg_challenge_2017/train.json: no such file; run: "
     "bash data/download_data.sh webnlg"),
    (RAW["e2e"][:2], [], {}, 1, "data/e2e/valid.txt: no such file"),
    (RAW["e2e"] + RAW["dart"][1:], [], {}, 1, "full-train.json: no such file"),
    (RAW["e2e"], ["e2e", "nlg"], {}, 2, "nlg: no data set"),
    (RAW["e2e"], [], {"PRESET": "mine"}, 2, "PRESET=mine"),
    (RAW["e2e"], [], {"PRESET": "paper", "FRACTION": "0.5"}, 2, "FRACTION=0.5: PRESET=paper"),
    (RAW["e2e"], ["e2e", "dart"], {"DATA_DIR": "data/e2e"}, 2, "name only one"),
    (RAW["e2e"], [], {"DATA_DIR": "nowhere"}, 1, "nowhere/train.txt: no such file"),
])
def test_create_datasets_refuses(clone, files, words, variables, code, message):
    shutil.rmtree(clone.folder / "data/e2e")
    clone.make(*files)
    done = clone.run(*words, script="create_datasets.sh", **variables)
    assert done.returncode == code and not clone.calls.read_text()
    line, = done.stderr.splitlines()
    assert line.startswith("error: ") and message in line


def test_create_datasets_in_a_folder_of_the_user(clone):
    clone.make("mine/train.json", "mine/test.json", "mine/dev.json")
    done = clone.run("webnlg", script="create_datasets.sh", DATA_DIR="mine", FRACTION="0.5")
    assert done.returncode == 0, done.stderr
    assert clone.called("format_converting_webnlg")[0][1:] == [
        "mine/train.json", "mine/train_formatted.jsonl", "--fraction", "0.5"]


@pytest.mark.parametrize("words, variables", [
    (["nlg"], {}), (["demo", "e2e"], {}),
    ([], {"PRESET": "user"}), (["demo"], {"PRESET": "paper"}), ([], {"CORRECT_BIAS": "1"}),
    *(([], {name: "x"}) for name in ("SEQ_LEN", "EVAL_LEN", "WEIGHT_DECAY", "LORA_DROPOUT",
                                     "LABEL_SMOOTH")),
    *(([], {"NPROC": value}) for value in ("abc", "0", "-1", "1.5", "2 3", "a[$(touch ran)]")),
    ([], {"PRECISION": "int8"}), (["demo"], {"BEAM_PRECISION": "fp16"}),
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
    ([], {"INIT_CHECKPOINT": "nowhere"}),
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
