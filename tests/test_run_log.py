"""What a training run shows: loss.png, the notes at the bar, the pace in the log."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
from conftest import run_main

import run_log


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draws loss.png; returns (title, {label: y values}) and fails at a warning."""
    from matplotlib import pyplot

    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)

    def draw(rows, *words):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run_log.draw_losses(tmp_path / "loss.png", rows, run_log.captions(*words))
        assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
        axes, = figures.pop().axes
        assert [text.get_text() for text in axes.get_legend().get_texts()] == [
            line.get_label() for line in axes.get_lines()]
        return axes.get_title(), {line.get_label(): list(line.get_ydata())
                                  for line in axes.get_lines()}

    return draw


def test_running_mean_is_centred():
    line = [3.0 - 0.01 * i for i in range(50)]
    for half in (0, 1, 7, 80):  # a mean that lags behind lies above a falling line
        assert run_log.centred_means(line, half) == pytest.approx(line)
    assert run_log.centred_means([0.0, 0.0, 9.0, 0.0, 0.0], 1) == pytest.approx([0, 3, 3, 3, 0])
    assert run_log.centred_means([2.0], 3) == [2.0] and run_log.centred_means([], 3) == []


def test_loss_curve_has_a_title_and_says_what_differs(drawn):
    rows = [(step, 5.0 - step / 100, 4.0 if step % 100 == 0 else None) for step in range(1, 301)]
    title, curves = drawn(rows, "gpt2.sm, LoRA rank 4, data/e2e/train.jsonl", 0.1, False)
    assert title == "gpt2.sm, LoRA rank 4, data/e2e/train.jsonl"
    assert list(curves) == ["training (label smoothing 0.1 raises it)",
                            "training, centred mean of 7", "validation"]
    assert curves["validation"] == [4.0, 4.0, 4.0]
    assert curves["training, centred mean of 7"] == pytest.approx([row[1] for row in rows])
    _, curves = drawn(rows, "", 0.0, False)
    assert list(curves)[0] == "training" and list(curves)[2] == "validation"
    _, curves = drawn(rows[:9], "", 0.0, True)
    assert list(curves) == ["training (jlm: every token is a target)"]
    _, curves = drawn(rows[:100], "", 0.2, True)
    assert list(curves)[0] == ("training (jlm: every token is a target, label smoothing 0.2 raises "
                               "it)")
    assert list(curves)[2] == "validation (clm: the completion's tokens)"


def test_any_path_may_be_in_the_title(drawn):
    for path in ("a$b$c_{^", "数据/训练.jsonl", "\ud800\n\x1b", "$\\frac$", "x/" * 200):
        title, _ = drawn([(1, 5.0, None)], path, 0.0, False)
        assert title.count("$") == path.count("$")
        assert all(len(line) <= 100 for line in title.split("\n"))


def test_nothing_is_said_of_a_home_that_cannot_be_written(root, tmp_path):
    """matplotlib stores its list of fonts there, or else in a temporary folder."""
    draw = ("import sys; sys.path.insert(0, sys.argv[1]); import run_log; run_log.draw_losses("
            "run_log.Path(sys.argv[2]), [(1, 5.0, None)], run_log.captions('', 0.0, False))")
    environment = {name: value for name, value in os.environ.items()
                   if name not in ("MPLCONFIGDIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME")}
    process = subprocess.run([sys.executable, "-c", draw, root / "src", tmp_path / "loss.png"],
                             env={**environment, "HOME": "/proc"}, capture_output=True, text=True)
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")


def test_notes_and_pace(tiny, tmp_path, monkeypatch):
    """Loss and perplexity are of the same mean; the first ms/batch is without compiling."""
    import gpt2_ft
    import trainer

    for name in ("train", "valid"):
        (tmp_path / f"{name}.jsonl").write_text(
            json.dumps({"context": [1, 2, 3], "completion": [4, 5, 6]}) + "\n")
    clock, notes, backward = [0.0], [], trainer.Trainer.backward

    def slow_backward(self, batches):
        assert len(batches) in (1, 3)  # a whole update, and what is left of the last one
        # all is compiled after the first update
        clock[0] += (60 if self.steps < 3 else 0.25) * len(batches)
        return backward(self, batches)

    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(trainer.Trainer, "backward", slow_backward)
    monkeypatch.setattr(gpt2_ft.Progress, "update", lambda self, n=1, note="": notes.append(note))
    flags = ["--train_data", tmp_path / "train.jsonl", "--valid_data", tmp_path / "valid.jsonl",
             "--work_dir", tmp_path / "out", "--model_card", "gpt2.nano", "--seq_len", "16",
             "--train_batch_size", "1", "--grad_acc", "3", "--lr", "0.5", "--max_step", "10"]
    code, said = run_main(gpt2_ft.main, [*flags, "--log_interval", "5"])
    assert code == 0, said
    lines = (tmp_path / "out/train.log").read_text().splitlines()
    assert [re.search(r"ms/batch (.*?) \|", line)[1] for line in lines] == ["250.00", "250.00"]
    for line, note in zip(lines, notes[4::5]):
        average, ppl = re.search(r"avg loss +(.*?) \| ppl +(.*)", line).groups()
        assert note == f"avg loss {average}, ppl {ppl}"
    # A line before the first update has no other pace
    code, said = run_main(gpt2_ft.main, [*flags, "--log_interval", "2"])
    assert code == 0, said
    lines = (tmp_path / "out/train.log").read_text().splitlines()
    assert re.search(r"ms/batch (.*?) \|", lines[-1])[1] == "250.00"
