"""The alignment experiment: a short strict run of both sides, and reports of broken bounds."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = [
    pytest.mark.skipif(shutil.which("java") is None, reason="scores need Java"),
]

DOCUMENTS = ("README.md", "README.cn.md", "align/README.md", "align/README.cn.md")
STEPS, INPUTS = 60, 8
# The demo's texts with the experiment's flags, but with a higher learning rate, so that 60 steps
# change the weights enough.
FLAGS = ["--strict", "--card", "gpt2.nano", "--base", "random", "--steps", STEPS, "--inputs",
         INPUTS, "--train_flags", "--lr 0.002 --warmup_step 10", "--name", "short"]


def align(root, *flags):
    return subprocess.run(["bash", root / "align" / "run.sh", *map(str, flags)],
                          env={**os.environ, "VIRTUAL_ENV": sys.prefix}, capture_output=True,
                          text=True)


@pytest.fixture(scope="module")
def data(root, vocab, tmp_path_factory):
    """A data folder for run.sh, made from the demo's corpus."""
    folder = tmp_path_factory.mktemp("corpus")
    for command in (["data/demo/generate.py", folder], *(
            ["src/gpt2_encode.py", "--vocab", vocab, "--input", folder / f"{name}_formatted.jsonl",
             "--output", folder / f"{name}.jsonl", "--add_bos", "--add_eos"]
            for name in ("train", "valid", "test"))):
        subprocess.run([sys.executable, *command], cwd=root, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def run(root, data, tmp_path_factory):
    """(the finished process, its work dir, its results) of a strict run."""
    pytest.importorskip("transformers")
    out = tmp_path_factory.mktemp("align")
    work, results = out / "work", out / "results"
    done = align(root, data, *FLAGS, "--float64", "--work_dir", work, "--results", results)
    return done, work, results


@pytest.mark.slow
def test_strict_run_agrees(run):
    done, _, results = run
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    report = json.loads((results / "short" / "results.json").read_text())
    one, = report["seeds"].values()
    assert report["broken"] == []
    assert one["steps"] == STEPS
    assert 0 < one["loss"]["largest"] <= 1e-4  # 0 would mean that a side was compared to itself
    assert len(one["lora"]) == 8 and all(0 < far <= 1e-3 for far in one["lora"].values())
    assert one["samples"] >= INPUTS
    assert one["identical"] == {"1": one["samples"], "8": one["samples"]}
    assert one["scores"]["torch"] == one["scores"]["jittor"]
    assert one["last_losses"]["torch"] < one["mean_loss"]["torch"]  # training reduced the loss


@pytest.mark.slow
def test_float32_is_as_near_to_float64_as_pytorchs(run):
    _, _, results = run
    one, = json.loads((results / "short" / "results.json").read_text())["seeds"].values()
    torch, jittor = one["float64"]["torch"], one["float64"]["jittor"]
    assert 0 < jittor["loss"]["rms"] <= 1.5 * torch["loss"]["rms"] < 1e-5
    assert 0 < jittor["lora_all"] <= 1.5 * torch["lora_all"] < 1e-4
    assert "| Jittor to PyTorch in float64: " in (results / "short" / "table.md").read_text()


@pytest.mark.slow
def test_results_of_a_strict_run(run):
    done, _, results = run
    assert sorted(path.name for path in (results / "short").iterdir()) == [
        "jittor.2025.train.log", "losses.csv", "losses.png", "results.json", "table.md",
        "torch.2025.train.log"]
    table = (results / "short" / "table.md").read_text()
    assert "**All bounds hold.**" in table and table.strip() in done.stdout
    assert "bash align/run.sh" in table and "jittor 1." in table
    with open(results / "short" / "losses.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, STEPS + 1))
    assert all(abs(float(row["torch"]) - float(row["jittor"])) <= 1e-4 for row in rows)
    assert (results / "short" / "losses.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def bf16(root, data, tmp_path_factory):
    """(the finished process, its work dir, its results) of a strict run in bf16."""
    pytest.importorskip("transformers")
    out = tmp_path_factory.mktemp("bf16")
    done = align(root, data, *FLAGS, "--precision", "bf16", "--work_dir", out / "work",
                 "--results", out / "results")
    return done, out / "work", out / "results"


@pytest.mark.slow
@pytest.mark.nightly
def test_bf16_is_judged_by_float64(bf16):
    done, _, results = bf16
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    report = json.loads((results / "short" / "results.json").read_text())
    one, = report["seeds"].values()
    assert report["judged"] and report["broken"] == []
    torch, jittor = one["float64"]["torch"], one["float64"]["jittor"]
    # Beyond the rounding of float32: each side did compute in bf16, and not far beyond that.
    assert 1e-4 < jittor["loss"]["rms"] <= torch["loss"]["rms"] < 0.05
    assert 1e-3 < jittor["lora_all"] <= torch["lora_all"] < 0.5
    assert sorted(one["scores"]) == sorted(one["mean_loss"]) == ["float64", "jittor", "torch"]
    table = (results / "short" / "table.md").read_text()
    assert "**All bounds hold.**" in table and "| PyTorch in float64 |" in table
    assert f"{jittor['lora_all']:.2e} |" in table
    with open(results / "short" / "losses.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for side, far in one["float64"].items():
        apart = [float(row[side]) - float(row["float64"]) for row in rows]
        assert far["loss"]["rms"] == pytest.approx((sum(x * x for x in apart) / STEPS) ** 0.5)


@pytest.mark.slow
@pytest.mark.nightly
def test_bf16_farther_than_pytorch_is_broken(root, data, bf16, tmp_path):
    _, work, _ = bf16
    shutil.copytree(work, tmp_path / "work")

    def again():
        return align(root, data, *FLAGS, "--precision", "bf16", "--report_only", "--work_dir",
                     tmp_path / "work", "--results", tmp_path / "results")

    from runtime import torch_file

    path = tmp_path / "work/short/seed2025/jittor" / f"model.{STEPS}.pt"
    state = torch_file.load(path)["model_state_dict"]
    torch_file.save(path, {"model_state_dict": {
        name: value * 2 if "lora_A" in name else value for name, value in state.items()}})
    done = again()
    assert done.returncode == 1 and "all matrices together: Jittor is " in done.stderr
    (tmp_path / "work/short/seed2025/float64/scores.json").unlink()
    done = again()
    assert done.returncode == 1 and "float64: has no scores.json; run " in done.stderr


def _shift_loss(jittor):
    path = jittor / "metrics.csv"
    lines = path.read_text().splitlines()
    cells = lines[17].split(",")  # step 17: line 0 is the header
    cells[3] = repr(float(cells[3]) + 2e-4)
    path.write_text("\n".join([*lines[:17], ",".join(cells), *lines[18:]]) + "\n")


def _shift_rate(jittor):
    path = jittor / "metrics.csv"
    lines = path.read_text().splitlines()
    cells = lines[5].split(",")
    cells[2] = repr(float(cells[2]) * (1 + 1e-6))
    path.write_text("\n".join([*lines[:5], ",".join(cells), *lines[6:]]) + "\n")


def _shift_matrix(jittor):
    from runtime import torch_file

    path = jittor / f"model.{STEPS}.pt"
    state = torch_file.load(path)["model_state_dict"]
    name = "transformer.h.2.attn.c_attn.lora_B"
    torch_file.save(path, {"model_state_dict": {**state, name: state[name] * 1.002}})


def _change_token(jittor):
    path = jittor / "predict.8.jsonl"
    first, *rest = path.read_text().splitlines()
    record = json.loads(first)
    record["predict"][3] += 1
    path.write_text("\n".join([json.dumps(record), *rest]) + "\n")


@pytest.mark.slow
@pytest.mark.parametrize("change, found", [
    (_shift_loss, "loss of step 17 differs"), (_shift_rate, "learning rates differ"),
    (_shift_matrix, "h.2.attn.c_attn.lora_B differs by 0.002"),
    (_change_token, "batch size 8: the ids of only")])
def test_report_says_what_is_broken(root, data, run, tmp_path, change, found):
    done, work, _ = run
    assert done.returncode == 0
    shutil.copytree(work, tmp_path / "work")
    change(tmp_path / "work" / "short" / "seed2025" / "jittor")
    done = align(root, data, *FLAGS, "--report_only", "--work_dir", tmp_path / "work",
                 "--results", tmp_path / "results")
    assert done.returncode == 1
    line, = done.stderr.splitlines()
    assert line.startswith("error: short, seed 2025: ") and found in line
    assert "**Broken:** seed 2025: " in (tmp_path / "results/short/table.md").read_text()


def publish(root):
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import pathlib, common, summary; "
            "common.run(lambda: summary.publish(pathlib.Path(sys.argv[2])))")
    return subprocess.run([sys.executable, "-c", code, ROOT / "align", root],
                          capture_output=True, text=True)


@pytest.mark.slow
def test_table_of_all_runs(root, run, tmp_path):
    """Each document gets one row per result and no other change; a second call changes nothing."""
    shutil.copytree(run[2], tmp_path / "align" / "results")
    short = tmp_path / "align/results/short/results.json"
    short.write_text(short.read_text().replace(" --float64", ""))  # the READMEs show no such run
    paper = json.loads((run[2] / "short" / "results.json").read_text())
    one, = paper["seeds"].values()
    paper.update(name="dropout", command="bash align/run.sh demo",
                 seeds={seed: json.loads(json.dumps(one)) for seed in "123"})
    for bleu, seed in zip((0.1, 0.2, 0.3), "123"):
        paper["seeds"][seed]["scores"]["jittor"]["BLEU"] = bleu
    (tmp_path / "align/results/dropout").mkdir()
    (tmp_path / "align/results/dropout/results.json").write_text(json.dumps(paper))
    far = {"loss": {"rms": 0.002}, "lora_all": 0.03, "identical": 7}
    judged = json.loads((run[2] / "short" / "results.json").read_text())
    judged.update(name="rounded", judged=True, seeds={"1": {**one, "float64": {
        "torch": far, "jittor": {**far, "lora_all": 0.02}}}})
    (tmp_path / "align/results/rounded").mkdir()
    (tmp_path / "align/results/rounded/results.json").write_text(json.dumps(judged))
    documents = [tmp_path / name for name in DOCUMENTS]
    for path in documents:
        path.write_text("before\n<!-- align: written by align/run.sh -->\nold\n"
                        "<!-- align: end -->\nafter\n")
    for _ in range(2):
        assert publish(tmp_path).returncode == 0
        for path in documents:
            text = path.read_text()
            folder = "results" if path.parent.name == "align" else "align/results"
            assert text.startswith("before\n<!--") and text.endswith("-->\nafter\n")
            assert "old" not in text and text.count(f"({folder}/short/table.md)") == 1
            strict, = (line for line in text.splitlines() if "[short]" in line)
            assert f"| {STEPS} | {one['loss']['largest']:.1e} |" in strict
            if folder != "results":  # a short table
                assert "[rounded]" not in text and "[dropout]" not in text
                continue
            rounded, = (line for line in text.splitlines() if "[rounded]" in line)
            assert f"| {STEPS} | 2.0e-03 | 2.0e-03 | 3.0e-02 | 2.0e-02 | 7 " in rounded
            dropout, = (line for line in text.splitlines() if "[dropout]" in line)
            assert "| 3 |" in dropout and "| 0.2000 ± 0.1000 |" in dropout
    documents[0].write_text("no place\n")
    done = publish(tmp_path)
    assert done.returncode == 1 and "README.md: has no place" in done.stderr
    assert documents[0].read_text() == "no place\n"


def test_documents_have_a_place_for_the_results(root):
    for name in DOCUMENTS:
        text = (root / name).read_text()
        assert text.count("<!-- align: written by align/run.sh -->\n") == 1
        assert text.count("<!-- align: end -->") == 1


@pytest.mark.parametrize("flags, code, found", [
    (["none"], 1, "none"), (["demo", "--seeds", "2025"], 2, "three seeds"),
    (["e2e", "--ref_type", "dart", "--strict"], 2, "is for a FOLDER"),
    (["demo", "--strict", "--steps", "0"], 2, "1"),
    (["demo", "--strict", "--batch_sizes", "1,8"], 2, "blanks")])
def test_refusals(root, tmp_path, flags, code, found):
    if flags == ["none"]:
        flags = [tmp_path / "none", "--strict", "--base", "random"]
    done = align(root, *flags, "--work_dir", tmp_path, "--results", tmp_path)
    assert done.returncode == code and found in done.stderr.splitlines()[-1]
    assert not list(tmp_path.rglob("*.pt"))
