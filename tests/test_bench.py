"""The benchmarks in bench/: FLOP counts, reports, sides, quiet rounds. No speed is tested."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "bench"))

import bench_beam  # noqa: E402
import bench_train  # noqa: E402
import conditions  # noqa: E402
import flops  # noqa: E402
import model_files  # noqa: E402
import quiet  # noqa: E402
import report  # noqa: E402
import samples  # noqa: E402
import sides  # noqa: E402
import workers  # noqa: E402
from shared import BEAM, TRAIN, FTDataset, GPT2Config, InputError, read_jsonl  # noqa: E402

CARD = {"n_layer": 3, "n_embd": 8, "n_head": 2, "vocab_size": 31}
R = 2
FLAGS = argparse.Namespace(device="cpu", isa="native")
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


def test_ratio_is_that_of_the_medians_of_pairs_of_blocks():
    found = report.ratio([[1.0, 1.0, 9.0], [2.0], [3.0]], [[2.0], [2.0], [12.0]])
    assert found == {"median": 0.5, "q1": 0.375, "q3": 0.75}


def test_ratios_of_speeds_become_ratios_of_times():
    ours, theirs = [[4.0], [5.0], [10.0]], [[1.0], [2.0], [5.0]]  # samples/s
    of_times = report.ratio(*([[1 / pace] for (pace,) in side] for side in (ours, theirs)))
    found = report.inverse(report.ratio(ours, theirs))
    assert found["q1"] <= found["median"] <= found["q3"]
    assert found["median"] == pytest.approx(of_times["median"])
    assert report.inverse(None) is None


def ratio_columns(text: str) -> list[tuple[str, str, str]]:
    """(row, head, cell) of all columns of ratios in the tables of a report."""
    found = []
    for table in text.split("\n\n"):
        head, *rows = (line[2:-2].split(" | ") for line in table.splitlines()
                       if line.startswith("| ")) if table.startswith("|") else ([],)
        for column, title in enumerate(head):
            if title.startswith("our time / their time"):
                found += [(row[0], title, row[column].strip()) for row in rows]
    return found


@pytest.mark.parametrize("name", ["beam", "scale", "train"])
def test_all_tables_have_ratios_in_one_direction(name):
    """Ours is the faster side of equal precision in the results in the repository."""
    text = (ROOT / "bench/results" / f"{name}.md").read_text()
    assert text.count("A ratio is our time / their time: below 1, ours is faster.") == 1
    assert not re.search("speed-up|faster by|ours takes", text)
    ratios = [float(cell.split()[0]) for row, head, cell in ratio_columns(text) if cell
              and not re.search("bf16|int8", row + head)]
    assert ratios and max(ratios) < 1


def test_instructions_can_be_limited_to_avx2(monkeypatch, tmp_path):
    monkeypatch.setattr(conditions, "WORK", tmp_path)
    environment = {**os.environ}
    monkeypatch.setattr(os, "environ", environment)
    conditions.limit_instructions("avx2")
    macros = subprocess.run([environment["cc_path"], "-march=native", "-dM", "-E", "-xc++",
                             os.devnull], capture_output=True, text=True, check=True).stdout
    assert "__AVX2__" in macros and "__AVX512F__" not in macros


def test_every_side_has_a_script_and_a_choice_always_has_ours():
    for programs in (sides.TRAINING, sides.SEARCH):
        for program in programs.values():
            assert (ROOT / "bench" / program.script).is_file()
            assert not program.converter or (ROOT / "bench" / program.converter).is_file()
    assert list(sides.choose(sides.SEARCH, ["ctranslate2", "ours"], ["int8"])) == [
        "ours float32", "ours int8", "ctranslate2 int8"]
    assert sides.some_of("ab")("b,a") == ["b", "a"]
    with pytest.raises(argparse.ArgumentTypeError, match="c is not one of a, b"):
        sides.some_of("ab")("a,c")


SIDE = f"""
import sys
sys.path.insert(0, {str(ROOT / "bench")!r})
from serving import serve

class Side:
    def start(self, device):
        return {{"versions": {{}}, "threads": 1}}
    def load(self, precision):
        if precision == "int8":
            raise ValueError("no int8 here")

serve(Side())
"""


def test_a_side_that_fails_at_the_start_is_left_out(tmp_path, capsys):
    script, missing = tmp_path / "side.py", tmp_path / "missing.py"
    script.write_text(SIDE)
    missing.write_text("import no_such_package")
    chosen = {f"{name} {precision}": sides.Side(sides.Program(name, file), precision)
              for name, file, precision in (("ours", script, "float32"), ("ours", script, "int8"),
                                            ("peer", missing, "float32"))}

    def prepare(key, worker):
        worker.ask("load", precision=chosen[key].precision)

    with ExitStack() as stack:
        team = sides.Team(stack, chosen)
        team.start("cpu", prepare)
        assert list(team.workers) == list(team.pids) == ["ours float32"] and len(team.starts) == 1
        assert "no int8 here" in team.left_out["ours, int8"]
        assert "No module named 'no_such_package'" in team.left_out["peer, float32"]
        assert team.workers["ours float32"].ask("start", device="cpu")["threads"] == 1
    assert capsys.readouterr().out.count("left out") == 2

    chosen = {"ours float32": sides.Side(sides.Program("ours", missing), "float32")}
    with ExitStack() as stack, pytest.raises(InputError, match="no_such_package"):
        sides.Team(stack, chosen).start("cpu", prepare)


def ticks(monkeypatch, machine: list[tuple[int, int, int]], own: list[int]) -> None:
    """What quiet.py reads, call by call."""
    monkeypatch.setattr(quiet, "_machine", iter(machine).__next__)
    left = iter(own)
    monkeypatch.setattr(quiet, "_own", lambda pid: next(left))


def test_disturbed_rounds_are_measured_again(monkeypatch):
    monkeypatch.setattr(workers, "PAUSE", 0)
    # One turn a round, of 200 ticks of two processors: the side's own 150; 152 busy; 40 stolen;
    # 40 of another program.
    machine, own = [(0, 0, 0)], [0]
    for busy, stolen in ((152, 0), (152, 40), (190, 0), (150, 0)):
        machine += [(machine[-1][0] + busy, machine[-1][1] + 200 - busy - stolen,
                     machine[-1][2] + stolen)] * 2
        own += [own[-1] + 150] * 2
    ticks(monkeypatch, machine, own)
    watch, asked = quiet.Watch({"a": 1}, 0.06), []
    found = list(workers.in_turns(["a"], 2, lambda side, n: asked.append(n) or len(asked), watch))
    assert asked == [0, 1, 1, 1] and found == [{"a": 1}, {"a": 4}]
    assert watch.rounds == pytest.approx([0, 0.2, 0.19, 0])
    assert watch.kept == [0, 3]
    assert watch.summary()["dropped"] == 2


def test_a_machine_that_is_never_quiet_is_an_error(monkeypatch):
    monkeypatch.setattr(workers, "PAUSE", 0)
    watch = quiet.Watch({"a": 1}, 0.06)
    monkeypatch.setattr(watch, "end_round", lambda: False)
    with pytest.raises(InputError, match="disturbed all 6 rounds.*--quiet"):
        list(workers.in_turns(["a"], 2, lambda side, n: None, watch))


def test_fewer_rounds_than_wanted_may_be_quiet(monkeypatch):
    monkeypatch.setattr(workers, "PAUSE", 0)
    watch = quiet.Watch({"a": 1}, 0.06)
    monkeypatch.setattr(watch, "end_round", lambda: len(watch.rounds) == 2)
    assert list(workers.in_turns(["a"], 4, lambda side, n: n, watch)) == [{"a": 0}]
    assert len(watch.rounds) == 4 * quiet.TRIES


@pytest.mark.skipif(not Path("/proc/stat").is_file(), reason="no /proc")
def test_other_work_is_told_from_a_sides_own():
    """A busy loop in another process disturbs; the same in this process does not."""
    shares = {}
    for name, pid in (("own", os.getpid()), ("other", os.getppid())):
        watch = quiet.Watch({"a": pid}, 1.0)
        watch.start_round()
        with watch.turn("a"):
            end = time.process_time() + 0.3
            while time.process_time() < end:
                pass
        shares[name] = watch.rounds[0]
    assert shares["other"] > shares["own"]
    assert quiet.peak_mib(os.getpid()) > 10


def test_report_of_training():
    """Two rounds of an update each: 40 GFLOP take ours 1 s, and the limit is 80 GFLOP/s."""
    chosen = sides.choose({"ours": sides.TRAINING["ours"], "peft": sides.TRAINING["peft"]},
                          ["ours", "peft"], ["float32", "bf16"])
    ms = {"ours float32": [1000.0, 1000.0], "ours bf16": [400.0, 600.0],
          "peft float32": [2000.0, 2000.0], "peft bf16": [900.0, 1100.0]}
    rounds = [{key: {"ms": of_side, "loss": [1.0, 1.0]} for key, of_side in ms.items()}] * 2
    found = bench_train.judge(chosen, rounds, {"float32": [50.0, 80.0]}, [[30e9, 50e9]] * 2,
                              dict.fromkeys(chosen, 1234.5))
    one = found["sides"]
    assert one["ours float32"]["of_limit"] == 0.5 and one["ours bf16"]["of_limit"] is None
    assert one["peft bf16"]["ratios"]["ours bf16"]["median"] == 0.5
    assert one["ours bf16"]["ratios"] == {"ours float32": report.spread([2.0])}
    text = "\n".join(bench_train.describe({
        **report.setting([{"versions": {}, "threads": 2}], FLAGS), **found, "card": "gpt2.sm",
        "block": 2, "warm_up": 2, "data": "DATA", "shapes": [(1, 2, 3), (4, 5, 6)],
        "limits": {"float32": [50.0, 80.0]}, "left_out": {"PEER, int8": "WHY"},
        "quiet": {"limit": 0.06, "kept": 2, "dropped": 5}}))
    assert "Left out: PEER, int8 (WHY)." in text
    assert "Rounds: 2 count; 5 were dropped" in text and "4 micro-batches of each side" in text
    assert "| transformers + peft, bf16 | 1000.0 [1000.0, 1000.0] | 1.000 [1.000, 1.000] | " \
           "0.500 [0.500, 0.500] | 40.0 [40.0, 40.0] |  | 1234 |" in text
    assert len(ratio_columns(text)) == 2 * len(chosen)


def test_report_of_beam_search():
    chosen = sides.choose({name: sides.SEARCH[name] for name in ("ours", "ctranslate2")},
                          ["ours", "ctranslate2"], ["int8"])
    rounds = [{key: {"seconds": seconds, "ids": [[5, 6, 0], [7, 7, n]]} for n, (key, seconds) in
               enumerate((("ours float32", 4.0), ("ours int8", 1.0), ("ctranslate2 int8", 2.0)))}]
    found = bench_beam.judge(chosen, rounds, 2)
    assert found["ctranslate2 int8"]["ratios"] == {
        "ours float32": report.spread([2.0]), "ours int8": report.spread([0.5])}
    assert found["ours int8"]["agree"] == 1 and found["ours float32"]["agree"] == 2
    assert found["ours float32"]["samples_per_s"]["median"] == 0.5
    assert found["ours int8"]["tokens"] == 2.5
    text = "\n".join(bench_beam.describe({
        **report.setting([{"versions": {}, "threads": 2}], FLAGS), "card": "gpt2.sm",
        "weights": "random", "data": "DATA", "left_out": {}, "ours": sides.ours(chosen),
        "quiet": {"limit": 0.06, "kept": 1, "dropped": 0},
        "peak_mib": dict.fromkeys(chosen, None), "tables": {1: found, 16: {}}}))
    assert "| CTranslate2, int8 | 1.000 [1.000, 1.000] | 2.000 [2.000, 2.000] | " \
           "0.500 [0.500, 0.500] | 1 of 2 | 2.5 |  |" in text
    assert "batch size 16" not in text


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
    """Without dropout, the sides that have the task's loss and search agree in them."""
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers", "loralib")):
        pytest.skip("no PyTorch; pip install -r requirement-test.txt")
    import bench_scale

    for module in (samples, model_files):
        monkeypatch.setattr(module, "WORK", tmp_path)
    model = model_files.random_model("gpt2.nano")
    data = samples.of_length(12, 5)
    queries = FTDataset(data, 1, 12, 4).queries()
    flags = {name: value for name, value in TRAIN.items() if name != "lora_dropout"}
    found = {}
    for script in ("side_jittor.py", "side_align.py", "side_minimal.py"):
        with workers.Worker(script) as worker:
            worker.ask("start", device="cpu")
            worker.ask("load", **model)
            ids = worker.ask("search", queries=queries[:2], batch_size=2, **{**BEAM, "eval_len": 4})
            worker.ask("start_training", data=str(data), **{**flags, "seq_len": 12})
            found[script] = ids["ids"], worker.ask("train", steps=8)["loss"]
            if script in bench_scale.SIDES.values():  # it uses a model for all its settings
                worker.ask("start_training", data=str(data), **{**flags, "seq_len": 12})
                worker.ask("search", queries=queries, batch_size=1, **{**BEAM, "eval_len": 4})
    (ids, losses), *others = found.values()
    for other_ids, other_losses in others:
        assert ids == other_ids
        assert losses == pytest.approx(other_losses, abs=1e-4)


if __name__ == "__main__":  # PyTorch in a process without Jittor
    print(json.dumps(count_by_torch()))


def test_every_side_has_all_threads(monkeypatch):
    """OMP_NUM_THREADS counts for Jittor and not for PyTorch, which is told the number."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1000")
    with workers.Worker("side_jittor.py") as worker:
        environment = Path(f"/proc/{worker.process.pid}/environ").read_text().split("\0")
    assert f"OMP_NUM_THREADS={len(os.sched_getaffinity(0))}" in environment
