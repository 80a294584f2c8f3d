"""work.sh from end to end: the demo with few steps, and the experiment on a few samples."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(shutil.which("java") is None, reason="scores need Java")


@pytest.fixture
def copy(root, vocab, tmp_path):
    """A copy of the repository's scripts, so that tests do not overwrite the user's files."""
    ignore = shutil.ignore_patterns("__pycache__", "work", "e2e")
    for folder in ("src", "vocab"):
        shutil.copytree(root / folder, tmp_path / "copy" / folder, ignore=ignore)
    shutil.copytree(root / "data", tmp_path / "copy" / "data", ignore=ignore)
    shutil.copytree(root / "eval", tmp_path / "copy" / "eval")
    for file in ("work.sh", "setup.sh", "requirement.txt"):
        shutil.copy(root / file, tmp_path / "copy" / file)
    return tmp_path / "copy"


def work(folder, *words, **variables):
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix, "DEVICE": "cpu",
                   **{name: str(value) for name, value in variables.items()}}
    return subprocess.run(["bash", "work.sh", *words], cwd=folder, env=environment,
                          capture_output=True, text=True)


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
    assert (folder / "loss.png").is_file() and (folder / "base" / "loss.png").is_file()
    assert str(folder.relative_to(copy) / "loss.png") in table[-1]
    assert len((folder / "lora.txt").read_text().splitlines()) == 48
    assert len((folder / "metrics.csv").read_text().splitlines()) == 1 + 40  # 1600 samples


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("mpirun") and shutil.which("mpicc")), reason="no MPI")
def test_demo_of_two_processes(copy):
    done = work(copy, "demo", NPROC=2, BASE_STEPS=3, BATCH_SIZE=40, BEAM_BATCH_SIZE=48)
    assert done.returncode == 0, done.stderr
    folder = copy / "trained_models" / "demo"
    assert len((folder / "metrics.csv").read_text().splitlines()) == 1 + 20
    assert len((folder / "lora.txt").read_text().splitlines()) == 48
    assert done.stdout.count("gpt2.nano: ") == 2  # printed once for the base and once for LoRA


@pytest.mark.slow
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

    done = work(copy, MODEL_CARD="gpt2.nano", INIT_CHECKPOINT=base / "model.1.pt", RESUME="maybe")
    assert done.returncode == 2 and "--resume" in done.stderr
    done = work(copy, MODEL_CARD="gpt2.nano", INIT_CHECKPOINT=base / "model.1.pt", EPOCHS=2)
    assert done.returncode == 0, done.stderr
    predictions = copy / "trained_models/GPT2_M/e2e/predict.10.b10p08r4.jsonl"
    assert [json.loads(line)["id"] for line in predictions.read_text().splitlines()] == [
        0, 1, 2, 3, 4, 5]
    assert (copy / "e2e_ref.txt").read_text().count("\n\n") == 2  # six lines, two inputs
    assert len((copy / "e2e_pred.txt").read_text().splitlines()) == 2
    assert re.search(r"SCORES:\n=+\nBLEU: \d\.\d{4}\nNIST: ", done.stdout)


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


def test_unknown_word(copy):
    done = work(copy, "dart")
    assert done.returncode == 2 and "usage" in done.stderr
