"""The benchmarks in bench/: FLOP counts, statistics and workers. No speed is tested."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "bench"))

import flops  # noqa: E402
import model_files  # noqa: E402
import report  # noqa: E402
import samples  # noqa: E402
import workers  # noqa: E402
from shared import BEAM, TRAIN, FTDataset, GPT2Config, InputError, read_jsonl  # noqa: E402

CARD = {"n_layer": 3, "n_embd": 8, "n_head": 2, "vocab_size": 31}
R = 2
MASK = [[0, 0, 1, 1, 1, 0], [0, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]]


def count_by_torch() -> int:
    """Runs the task in PyTorch and counts the operations of its matrix products.

    The forward pass omits only what flops.py omits; autograd decides which gradients are needed.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    width, heads, vocab = CARD["n_embd"], CARD["n_head"], CARD["vocab_size"]

    def draw(*shape, trained=False):
        return torch.randn(shape, requires_grad=trained)

    def attend(queries, keys, values, positions):
        query, key, value = (x.view(len(x), heads, -1).transpose(0, 1)
                             for x in (queries, keys, values))  # (H, T, D)
        rows = [(query[:, n:n + 1] @ key[:, :p + 1].mT).softmax(-1) @ value[:, :p + 1]
                for n, p in enumerate(positions)]
        return torch.cat(rows, dim=1).transpose(0, 1).reshape(len(queries), width)

    layers = [{"qkv": [draw(width, width) for _ in range(3)],
               "A": [draw(width, R, trained=True) for _ in range(2)],
               "B": [draw(R, width, trained=True) for _ in range(2)],
               "proj": draw(width, width), "fc": draw(width, 4 * width),
               "out": draw(4 * width, width)} for _ in range(CARD["n_layer"])]
    head = draw(width, vocab)
    with FlopCounterMode(display=False) as counter:
        for row in MASK:
            targets = [position for position, counted in enumerate(row) if counted]
            if not targets:
                continue
            x = draw(targets[-1] + 1, width)
            for layer in layers:
                kept = targets if layer is layers[-1] else list(range(len(x)))
                query, value = (
                    rows @ layer["qkv"][which] + rows @ layer["A"][n] @ layer["B"][n]
                    for n, (which, rows) in enumerate(((0, x[kept]), (2, x))))
                mixed = attend(query, x @ layer["qkv"][1], value, kept)
                x = x[kept] + mixed @ layer["proj"]
                x = x + (x @ layer["fc"]).tanh() @ layer["out"]
            (x @ head).square().sum().backward()
    return counter.get_total_flops()


@pytest.mark.slow
def test_flops_are_those_that_pytorch_counts():
    if not importlib.util.find_spec("torch"):
        pytest.skip("no PyTorch; pip install -r requirement-test.txt")
    process = subprocess.run([sys.executable, __file__], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    counted = json.loads(process.stdout)
    assert flops.micro_batch(np.array(MASK), GPT2Config(**CARD), R) == counted


def test_flops_of_a_matrix_product():
    assert flops.matmul(3, 5, 7) == 3 * 7 * (5 + 5)


def test_ratio_is_of_medians_and_its_spread_over_blocks():
    found = report.ratio([[1.0, 1.0, 9.0], [2.0], [3.0]], [[2.0], [2.0], [12.0]])
    assert found == {"of_medians": 1.0, "median": 0.5, "q1": 0.375, "q3": 0.75}


def test_ratios_of_speeds_become_ratios_of_times():
    ours, theirs = [[4.0], [5.0], [10.0]], [[1.0], [2.0], [5.0]]  # samples/s
    of_times = report.ratio(*([[1 / pace] for (pace,) in side] for side in (ours, theirs)))
    found = report.inverse(report.ratio(ours, theirs))
    assert found["q1"] <= found["median"] <= found["q3"]
    assert found["median"] == pytest.approx(of_times["median"])
    assert found["of_medians"] == pytest.approx(of_times["of_medians"])
    assert report.inverse(None) is None


@pytest.mark.parametrize("name", ["beam", "scale", "train"])
def test_all_tables_have_ratios_in_one_direction(name):
    """Ours is the faster side in the results in the repository: every ratio is below 1."""
    text = (ROOT / "bench/results" / f"{name}.md").read_text()
    assert text.count("A ratio is our time / their time: below 1, ours is faster.") == 1
    tables = [table.splitlines() for table in text.split("\n\n") if "our time" in table
              and table.startswith("|")]
    assert tables and not re.search("speed-up|faster by|ours takes", text)
    for head, _, *rows in tables:
        column = [cell.startswith(" our time / their time") for cell in head.split("|")].index(True)
        ratios = [float(row.split("|")[column].split()[0]) for row in rows
                  if row.split("|")[column].strip()]
        assert ratios and max(ratios) < 1


def test_every_panel_of_the_figure_has_a_legend(monkeypatch):
    from matplotlib import pyplot

    import bench_scale

    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    results = json.loads((ROOT / "bench/results/scale.json").read_text())
    assert bench_scale.figure(results).startswith(b"\x89PNG")
    for axes in figures[-1].axes:
        assert [text.get_text() for text in axes.get_legend().get_texts()] == [
            f"{card}, {side}" for card in results["training"]
            for side in ("ours (Jittor)", "PyTorch (align)")]


def test_every_side_has_one_turn_a_round_in_changing_order(monkeypatch):
    monkeypatch.setattr(workers, "PAUSE", 0)
    asked = []
    rounds = list(workers.in_turns(["a", "b", "c"], 8, lambda side, n: asked.append(side) or n))
    assert rounds == [{"a": n, "b": n, "c": n} for n in range(8)]
    orders = {tuple(asked[n:n + 3]) for n in range(0, 24, 3)}
    assert all(sorted(order) == ["a", "b", "c"] for order in orders) and len(orders) > 2


def test_worker_answers_and_reports_errors(tmp_path):
    script = tmp_path / "side.py"
    script.write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT / "bench")!r})
from serving import serve

class Side:
    def double(self, x):
        os.system("echo noise")
        return 2 * x
    def fail(self):
        raise ValueError("not today")
    def die(self):
        sys.exit("gone")

serve(Side())
""")
    with workers.Worker(script) as worker:
        assert worker.ask("double", x=[1]) == [1, 1]
        with pytest.raises(InputError, match="not today"):
            worker.ask("fail")
        with pytest.raises(InputError, match="gone"):
            worker.ask("die")


def test_samples_of_a_length_fill_it(tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "WORK", tmp_path)
    for sample in read_jsonl(samples.of_length(64, 3), {"context": list, "completion": list}):
        assert len(sample["context"]) == 34 and len(sample["completion"]) == 30


@pytest.mark.slow
def test_sides_do_the_same_task(tmp_path, monkeypatch):
    """Without dropout, our side and align's have the same losses and find the same sequences."""
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers", "loralib")):
        pytest.skip("no PyTorch; pip install -r requirement-test.txt")
    for module in (samples, model_files):
        monkeypatch.setattr(module, "WORK", tmp_path)
    model = model_files.random_model("gpt2.nano")
    data = samples.of_length(12, 5)
    queries = FTDataset(data, 1, 12, 4).queries()
    flags = {name: value for name, value in TRAIN.items() if name != "lora_dropout"}
    found = {}
    for script in ("side_jittor.py", "side_align.py"):
        with workers.Worker(script) as worker:
            worker.ask("start", device="cpu")
            worker.ask("load", **model)
            ids = worker.ask("search", queries=queries[:2], batch_size=2, **{**BEAM, "eval_len": 4})
            worker.ask("start_training", data=str(data), **{**flags, "seq_len": 12})
            found[script] = ids["ids"], worker.ask("train", steps=8)["loss"]
    (ids, losses), (other_ids, other_losses) = found.values()
    assert ids == other_ids
    assert losses == pytest.approx(other_losses, abs=1e-4)


if __name__ == "__main__":  # PyTorch in a process without Jittor
    print(json.dumps(count_by_torch()))
