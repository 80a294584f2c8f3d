"""The training script: its output files, reproducibility and agreement with PyTorch."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import run_main

STEPS = 12  # of the runs below: 3 epochs, in each of which 7 samples make 4 batches of 2
FLAGS = ["--train_batch_size", "2", "--valid_batch_size", "2", "--grad_acc", "2",
         "--seq_len", "24", "--model_card", "gpt2.nano", "--lr", "0.01", "--weight_decay", "0.01",
         "--adam_beta2", "0.999", "--scheduler", "linear", "--warmup_step", "4",
         "--max_epoch", "3", "--save_interval", "5", "--log_interval", "5", "--eval_interval", "6",
         "--lora_dim", "4", "--lora_alpha", "32", "--label_smooth", "0.1", "--random_seed", "2025"]


def run_script(root, script, *flags):
    # The script must find its modules by itself, so it does not get our PYTHONPATH.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run([sys.executable, root / script, *map(str, flags)], cwd=root,
                          env=environment, capture_output=True, text=True)


def weights(path):
    from runtime import torch_file

    return torch_file.load(path)["model_state_dict"]


def rows(work_dir):
    with open(work_dir / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with train.jsonl (7 samples, some longer than seq_len) and valid.jsonl (3)."""
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(1)
    for name, count in (("train", 7), ("valid", 3)):
        with open(folder / f"{name}.jsonl", "w") as file:
            for _ in range(count):
                context, completion = ([draw.randrange(50256) for _ in range(draw.randint(3, 16))]
                                       for _ in range(2))
                record = {"context": [*context, 50256], "completion": [*completion, 50256]}
                file.write(json.dumps(record) + "\n")
    return folder


@pytest.fixture(scope="module")
def base(root, data, tmp_path_factory):
    """A checkpoint of all weights of a random model; its one step has learning rate 0."""
    folder = tmp_path_factory.mktemp("base")
    done = train(root, data, folder, "--lora_dim", 0, "--lr", 0, "--max_step", 1)
    assert done.returncode == 0, done.stderr
    return folder / "model.1.pt"


def flags_of(data, work_dir, *flags):
    return ["--train_data", data / "train.jsonl", "--valid_data", data / "valid.jsonl", *FLAGS,
            "--work_dir", work_dir, "--device", "cpu", *flags]


def train(root, data, work_dir, *flags, script="src/gpt2_ft.py"):
    return run_script(root, script, *flags_of(data, work_dir, *flags))


@pytest.fixture
def here(jittor, monkeypatch):
    """Runs a script's main in this process, where Jittor has started already."""
    from runtime import backend

    monkeypatch.setattr(backend, "start", lambda device, seed=1: jittor.set_global_seed(seed))

    def run(main, *flags):
        code, said = run_main(main, flags)
        return SimpleNamespace(returncode=code, stderr=said)

    return run


@pytest.fixture
def train_here(here, data):
    """Runs the training script's main in this process; takes the work dir and flags."""
    import gpt2_ft

    return lambda work_dir, *flags: here(gpt2_ft.main, *flags_of(data, work_dir, *flags))


@pytest.fixture(scope="module")
def trained(root, data, base, tmp_path_factory):
    """(finished process, work dir) of a run with LoRA's dropout."""
    folder = tmp_path_factory.mktemp("trained")
    done = train(root, data, folder, "--init_checkpoint", base, "--lora_dropout", 0.1)
    assert done.returncode == 0, done.stderr
    return done, folder


def test_log_lines_are_those_of_the_original(trained):
    done, folder = trained
    lines = (folder / "train.log").read_text().splitlines()
    number = r" *[0-9.e+-]+"
    train_line = re.compile(
        rf"\| epoch ( *\d+) step ( *\d+) \| ( *\d+) batches \| lr ({number}) \| ms/batch {number} "
        rf"\| loss ({number}) \| avg loss ({number}) \| ppl ({number})")
    valid_line = re.compile(
        rf"\| Eval ( *\d+) at step ( *\d+) \| time: {number}s \| valid loss ({number}) \| "
        rf"valid ppl ({number}) \| best ppl ({number}) ")
    trains = [match.groups() for match in map(train_line.fullmatch, lines) if match]
    valids = [match.groups() for match in map(valid_line.fullmatch, lines) if match]
    assert [(int(epoch), int(step), int(batch)) for epoch, step, batch, *_ in trains] == [
        (2, 5, 1), (3, 10, 2), (3, 12, 4)]
    assert [len(trains[0][0]), len(trains[0][1]), len(trains[0][2])] == [3, 8, 6]
    assert [(int(nth), int(step)) for nth, step, *_ in valids] == [(1, 6), (2, 12)]
    assert len(lines) == 5 and all(line in done.stdout.splitlines() for line in lines)

    losses = [float(row["loss"]) for row in rows(folder)]
    assert float(trains[1][4]) == pytest.approx(losses[9], abs=0.0051)
    assert float(trains[1][5]) == pytest.approx(np.mean(losses[5:10]), abs=0.0051)
    assert float(trains[1][6]) == pytest.approx(np.exp(np.mean(losses[5:10])), rel=1e-3)
    # the logged learning rate is that of the next micro-batch; 10 of 12 are done, 4 are warm-up
    assert float(trains[1][3]) == pytest.approx(0.01 * 2 / 8, rel=1e-2)


def test_metrics_have_a_row_a_micro_batch(trained):
    _, folder = trained
    table = rows(folder)
    assert list(table[0]) == ["step", "epoch", "lr", "loss", "valid_loss", "ms_per_batch"]
    assert [int(row["step"]) for row in table] == list(range(1, STEPS + 1))
    assert [int(row["epoch"]) for row in table] == [1] * 4 + [2] * 4 + [3] * 4
    assert [row["step"] for row in table if row["valid_loss"]] == ["6", "12"]
    expected = [0.01 * t / 4 if t < 4 else 0.01 * (12 - t) / 8 for t in range(STEPS)]
    assert [float(row["lr"]) for row in table] == pytest.approx(expected)


def test_checkpoints(trained, base):
    _, folder = trained
    assert sorted(path.name for path in folder.iterdir()) == [
        ".training", "finished.json", "loss.png", "metrics.csv", "model.10.pt", "model.12.pt",
        "model.5.pt", "model.best.pt", "train.log"]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    first, last, frozen = (weights(path) for path in
                           (folder / "model.5.pt", folder / "model.12.pt", base))
    assert set(first) == {f"transformer.h.{i}.attn.c_attn.lora_{x}" for i in range(4) for x in "AB"}
    assert set(last) == set(frozen) | set(first)
    assert all(np.array_equal(last[name], frozen[name]) for name in frozen)
    assert all(not np.array_equal(last[name], first[name]) for name in first)
    assert all(last[name].any() for name in first)


def test_checkpoints_know_themselves(trained, base, data):
    from config import MODEL_CARDS
    from runtime import torch_file

    def entry(path):
        content = torch_file.load(path)
        assert content.keys() == {"model_state_dict", "about"}
        return json.loads(content["about"])

    common = {"version": 1, "model_card": "gpt2.nano", "data": data.name,
              "config": vars(MODEL_CARDS["gpt2.nano"])}
    for step in (5, 10, STEPS):
        assert entry(trained[1] / f"model.{step}.pt") == {
            **common, "lora_dim": 4, "lora_alpha": 32, "lora_dropout": 0.1, "step": step}
    assert entry(trained[1] / "model.best.pt")["step"] in (6, 12)
    assert entry(base) == {**common, "lora_dim": 0, "lora_alpha": 32, "lora_dropout": 0.0,
                           "step": 1}


@pytest.mark.parametrize("path, name", [
    ("data/e2e/train.jsonl", "e2e"), ("data/e2e/whole/train.jsonl", "e2e/whole"),
    ("data/demo/work/train.jsonl", "demo/work"), ("/train.jsonl", "/")])
def test_names_of_data_sets(path, name):
    import gpt2_ft

    assert gpt2_ft.name_of(path) == name


def test_same_seed_same_files(root, data, base, trained, tmp_path):
    _, folder = trained
    assert train(root, data, tmp_path, "--init_checkpoint", base,
                 "--lora_dropout", 0.1).returncode == 0
    for name in ("model.5.pt", "model.12.pt"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    columns = ("step", "epoch", "lr", "loss", "valid_loss")
    assert [[row[c] for c in columns] for row in rows(tmp_path)] == [
        [row[c] for c in columns] for row in rows(folder)]


def test_training_in_bf16(train_here, trained, base, tmp_path):
    """On matrices rounded to bfloat16, which the last checkpoint holds; close to float32."""
    done = train_here(tmp_path, "--init_checkpoint", base, "--lora_dropout", 0.1, "--precision",
                      "bf16")
    assert done.returncode == 0, done.stderr
    ours, plain = ([float(row["loss"]) for row in rows(folder)]
                   for folder in (tmp_path, trained[1]))
    assert ours != plain and ours == pytest.approx(plain, rel=1e-3)
    last, frozen = weights(tmp_path / f"model.{STEPS}.pt"), weights(base)
    assert list(last) == list(weights(trained[1] / f"model.{STEPS}.pt"))
    for name, exact in frozen.items():
        if exact.ndim == 2 and "wpe" not in name:
            assert not (last[name].view(np.uint32) & 0xffff).any()  # 16 bits are enough for it
            assert np.all(np.abs(last[name] - exact) <= 2 ** -8 * np.abs(exact))
            assert not np.array_equal(last[name], exact)
        else:
            assert np.array_equal(last[name], exact)
    refused = train_here(tmp_path, "--init_checkpoint", base, "--precision", "bf16", "--lora_dim",
                         0, "--work_dir", tmp_path / "none")
    assert refused.returncode == 2 and "--lora_dim 0" in refused.stderr
    assert train_here(tmp_path / "none", "--precision", "int8").returncode == 2
    assert not (tmp_path / "none").exists()


def test_a_run_without_precision_is_one_in_float32(trained, base, tmp_path, train_here):
    """Versions before --precision wrote no such setting; their runs are not begun anew."""
    for name in ("finished.json", f"model.{STEPS}.pt"):
        shutil.copy(trained[1] / name, tmp_path)
    assert "precision" not in json.loads((tmp_path / "finished.json").read_text())["settings"]
    flags = ["--init_checkpoint", base, "--lora_dropout", 0.1, "--resume"]
    before = (tmp_path / "finished.json").stat().st_mtime_ns
    assert train_here(tmp_path, *flags).returncode == 0
    assert (tmp_path / "finished.json").stat().st_mtime_ns == before
    assert train_here(tmp_path, *flags, "--precision", "bf16").returncode == 0
    assert (tmp_path / "finished.json").stat().st_mtime_ns > before


@pytest.mark.slow
@pytest.mark.parametrize("flags", [
    [],
    ["--clip", "0.5", "--scheduler", "cosine", "--correct_bias", "--obj", "jlm"],
    ["--lora_dim", "0", "--lr", "0.001", "--no_decay_bias", "--weight_decay", "0.3",
     "--scheduler", "constant", "--label_smooth", "0"],
], ids=["work.sh", "clip-cosine-jlm", "whole-model"])
def test_follows_pytorch(root, data, base, trained, tmp_path, flags):
    pytest.importorskip("transformers")
    common = ["--init_checkpoint", base, *flags]
    if "--lora_dim" not in flags:
        common += ["--lora_checkpoint", trained[1] / "model.5.pt"]
    for side, script in (("jittor", "src/gpt2_ft.py"), ("torch", "align/torch_train.py")):
        done = train(root, data, tmp_path / side, *common, script=script)
        assert done.returncode == 0, done.stderr
    ours, theirs = rows(tmp_path / "jittor"), rows(tmp_path / "torch")
    assert len(ours) == len(theirs) == STEPS
    for column, tolerance in (("loss", 2e-5), ("lr", 1e-12)):
        assert [float(row[column]) for row in ours] == pytest.approx(
            [float(row[column]) for row in theirs], abs=tolerance)
    assert [row["valid_loss"] != "" for row in ours] == [row["valid_loss"] != "" for row in theirs]
    assert [float(row["valid_loss"]) for row in ours if row["valid_loss"]] == pytest.approx(
        [float(row["valid_loss"]) for row in theirs if row["valid_loss"]], abs=2e-5)
    ours, theirs = (weights(tmp_path / side / f"model.{STEPS}.pt") for side in ("jittor", "torch"))
    for name in ours:
        distance = np.linalg.norm(ours[name] - theirs[name])
        assert distance <= 1e-4 * np.linalg.norm(theirs[name]), name


def fails(done, *parts):
    """Asserts exit code 1 and one line on stderr, which contains all ``parts``."""
    assert done.returncode == 1, done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")
    for part in parts:
        assert str(part) in done.stderr


def test_missing_data(train_here, tmp_path):
    fails(train_here(tmp_path / "out", "--train_data", tmp_path / "none.jsonl"),
          tmp_path / "none.jsonl", "create_datasets.sh")
    assert not (tmp_path / "out").exists()


def test_token_outside_the_vocabulary(train_here, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"context": [1], "completion": [2]}\n{"context": [50257], "completion": []}\n')
    fails(train_here(tmp_path / "out", "--train_data", bad), f"{bad}:2:", "50257", "vocab")


def test_completions_beyond_seq_len(train_here, base, tmp_path, monkeypatch):
    import gpt2_ft

    bad, good = tmp_path / "bad.jsonl", tmp_path / "good.jsonl"
    bad.write_text('{"context": [1, 2, 3, 4], "completion": [5]}\n')
    good.write_text('{"context": [1, 2], "completion": [5]}\n')
    fails(train_here(tmp_path / "out", "--train_data", bad, "--seq_len", 4),
          f"{bad}: no sample", "--seq_len 4")
    fails(train_here(tmp_path / "out", "--train_data", good, "--valid_data", bad,
                     "--seq_len", 4), f"{bad}: no sample")
    assert not (tmp_path / "out").exists()
    bad.write_text(bad.read_text() + '{"context": [1, 2], "completion": [5]}\n')
    said = []
    monkeypatch.setattr(gpt2_ft, "log", said.append)
    done = train_here(tmp_path / "out", "--train_data", bad, "--valid_data", bad,
                      "--seq_len", 4, "--max_step", 1, "--init_checkpoint", base)
    assert done.returncode == 0, done.stderr
    # for the training and for the validation data
    assert said.count(f"{bad}: 1 of 2 completions are cut at --seq_len 4, by up to 1 tokens, 1 of "
                      "them wholly; raise it to 5 to learn from all") == 2


def test_a_warm_up_as_long_as_the_run_is_reported(train_here, base, tmp_path, monkeypatch):
    import gpt2_ft

    said = []
    monkeypatch.setattr(gpt2_ft, "log", said.append)
    for flags, reported in ((["--max_step", 4], True), (["--max_step", 5], False),
                            (["--max_step", 4, "--scheduler", "inv_sqrt"], False)):
        said.clear()
        done = train_here(tmp_path, "--warmup_step", 4, "--init_checkpoint", base, *flags)
        assert done.returncode == 0, done.stderr
        assert any(line == "--warmup_step 4: the run has only 4 micro-batches, so its learning "
                   "rate never reaches --lr 0.01; lower it" for line in said) == reported


@pytest.mark.parametrize("flags, steps", [
    (["--max_step", 2], [2]), (["--max_step", 7], [5, 7]), (["--max_epoch", 1], [4])])
def test_the_last_step_is_logged(train_here, base, tmp_path, flags, steps):
    done = train_here(tmp_path, "--init_checkpoint", base, "--eval_interval", 100, *flags)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [int(line.split()[4]) for line in lines] == steps


def test_a_state_after_the_end_of_the_run(train_here, base, tmp_path):
    import train_state
    from runtime import torch_file

    train_here(tmp_path, "--init_checkpoint", base, "--max_step", 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_state, "remove", lambda *_, **__: None)
        assert train_here(tmp_path, "--init_checkpoint", base, "--max_step", 3, "--state_interval",
                          1).returncode == 0
    (tmp_path / "finished.json").unlink()
    state = torch_file.load(tmp_path / "resume.2.pt")
    about = json.loads(state["about"])
    about["counters"]["step"] = 3
    torch_file.save(tmp_path / "resume.3.pt", {**state, "about": json.dumps(about)})
    fails(train_here(tmp_path, "--init_checkpoint", base, "--max_step", 3, "--resume"),
          tmp_path / "resume.3.pt", "after step 3, but the run has 3 steps; remove it")


def test_lora_alone_as_init_checkpoint(train_here, trained, tmp_path):
    fails(train_here(tmp_path, "--init_checkpoint", trained[1] / "model.5.pt"),
          trained[1] / "model.5.pt", "--lora_checkpoint")


def test_wrong_rank_and_wrong_card(train_here, base, trained, tmp_path):
    whole, lora = trained[1] / f"model.{STEPS}.pt", trained[1] / "model.5.pt"
    fails(train_here(tmp_path, "--init_checkpoint", whole, "--lora_dim", 3),
          f"{whole}: trained with --lora_dim 4, not 3; leave the flag out")
    fails(train_here(tmp_path, "--init_checkpoint", base, "--model_card", "gpt2.sm"),
          f"{base}: trained with --model_card gpt2.nano, not gpt2.sm; leave the flag out")
    fails(train_here(tmp_path, "--init_checkpoint", base, "--lora_checkpoint", lora,
                     "--lora_alpha", 16),
          f"{lora}: trained with --lora_alpha 32, not 16; leave the flag out")
    without_entry(whole, tmp_path / "old.pt")
    fails(train_here(tmp_path / "out", "--init_checkpoint", tmp_path / "old.pt", "--lora_dim", 3),
          "old.pt", "misshapen", "--lora_dim")
    fails(train_here(tmp_path / "out", "--init_checkpoint", tmp_path / "old.pt", "--model_card",
                     "gpt2.sm"), "old.pt", "missing", "misshapen", "--model_card")


def without_entry(path, to):
    """A copy as this program wrote it before it had the entry ``about``."""
    from runtime import torch_file

    torch_file.save(to, {"model_state_dict": torch_file.load(path)["model_state_dict"]})


def test_flags_left_out_are_the_checkpoints(here, data, base, trained, tmp_path, monkeypatch):
    """Training goes on as with the flags given, to the same bytes."""
    import gpt2_ft
    import model_flags

    said = []
    monkeypatch.setattr(model_flags, "log", said.append)
    flags = flags_of(data, tmp_path, "--max_step", 2)
    given = [flags.index(flag) for flag in ("--lora_dim", "--lora_alpha", "--model_card")]
    fewer = [word for i, word in enumerate(flags) if i not in given and i - 1 not in given]
    files = ["--init_checkpoint", base, "--lora_checkpoint", trained[1] / "model.5.pt"]
    for name, words in (("given", flags), ("left out", fewer)):
        assert here(gpt2_ft.main, *words, *files, "--work_dir", tmp_path / name).returncode == 0
    assert f"{base}: taken from it: --model_card gpt2.nano" in said
    assert f"{trained[1] / 'model.5.pt'}: taken from it: --lora_dim 4, --lora_alpha 32" in said
    assert (tmp_path / "given/model.2.pt").read_bytes() == (
        tmp_path / "left out/model.2.pt").read_bytes()
    finished = [json.loads((tmp_path / name / "finished.json").read_text())
                for name in ("given", "left out")]
    assert finished[0] == finished[1]


def test_a_folder_of_transformers_from_training_to_text(here, torch_side, tmp_path, monkeypatch):
    """A model that is no card: its dimensions come from config.json, then from the checkpoint."""
    import gpt2_beam
    import gpt2_ft

    torch_side("save_pretrained", {"input_ids": np.zeros((1, 1))}, path=str(tmp_path / "base"),
               dims={"n_layer": 3, "n_embd": 12, "n_head": 3, "vocab_size": 50304,
                     "n_positions": 16})
    (tmp_path / "data.jsonl").write_text('{"context": [1, 50303], "completion": [2, 50300]}\n')
    flags = ["--train_data", tmp_path / "data.jsonl", "--valid_data", tmp_path / "data.jsonl",
             "--train_batch_size", 1, "--seq_len", 16, "--max_step", 2, "--lr", 0.1,
             "--work_dir", tmp_path / "out", "--lora_dim", 2, "--lora_alpha", 2.5,
             "--init_checkpoint", tmp_path / "base"]
    assert here(gpt2_ft.main, *flags).returncode == 0
    fails(here(gpt2_ft.main, *flags, "--model_card", "gpt2.nano"), tmp_path / "base/config.json",
          "n_layer is 3, but 4 in gpt2.nano")
    assert here(gpt2_ft.main, *flags, "--seq_len", 17).returncode == 2
    assert here(gpt2_ft.main, *flags, "--resume").returncode == 0  # it has ended
    config = json.loads((tmp_path / "base/config.json").read_text())
    config["layer_norm_epsilon"] = 1e-4
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    said = []
    monkeypatch.setattr(gpt2_ft, "log", said.append)
    assert here(gpt2_ft.main, *flags, "--resume", "auto").returncode == 0
    assert not any("finished before" in line for line in said)  # another base
    search = ["--data", tmp_path / "data.jsonl", "--seq_len", 16, "--eval_len", 4, "--beam", 2,
              "--work_dir", tmp_path, "--output_file", "out.jsonl"]
    assert here(gpt2_beam.main, *search, "--init_checkpoint", tmp_path / "out/model.2.pt"
                ).returncode == 0
    ours = (tmp_path / "out.jsonl").read_text()
    assert here(gpt2_beam.main, *search, "--init_checkpoint", tmp_path / "out/model.2.pt",
                "--lora_dim", 2, "--lora_alpha", 2.5, "--model_card", "auto").returncode == 0
    assert (tmp_path / "out.jsonl").read_text() == ours
    assert here(gpt2_beam.main, *search, "--init_checkpoint", tmp_path / "base", "--beam", 50305
                ).returncode == 2


@pytest.mark.slow
def test_loss_no_longer_finite(root, data, base, tmp_path):
    fails(train(root, data, tmp_path, "--init_checkpoint", base, "--lora_dim", 0, "--lr", 1e30,
                "--warmup_step", 0), "step 3", "--lr")


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write to any folder")
def test_work_dir_that_cannot_be_written(train_here, tmp_path):
    tmp_path.chmod(0o500)
    fails(train_here(tmp_path / "out"), tmp_path / "out", "--work_dir")


def test_work_dir_that_is_a_file(train_here, tmp_path):
    (tmp_path / "out").write_text("")
    fails(train_here(tmp_path / "out"), tmp_path / "out", "--work_dir")


@pytest.mark.parametrize("flags", [
    ["--fp16"], ["--seq_len", "1025"], ["--lora_dropout", "1"], ["--grad_acc", "0"],
    ["--scheduler", "cycle"], ["--scheduler", "cycle", "--i_steps", "0,x"], ["--lr", "-1"],
    ["--lr", "inf"], ["--lr", "nan"], ["--lora_alpha", "x"], ["--model_card", "auto"],
    ["--resume", "maybe"], ["--keep_last", "0"],
])
def test_wrong_flags(train_here, tmp_path, flags):
    done = train_here(tmp_path / "out", *flags)
    assert done.returncode == 2 and re.fullmatch("error: .+; --help lists the flags\n", done.stderr)
    assert not (tmp_path / "out").exists()


def test_neither_epochs_nor_steps(root):
    done = run_script(root, "src/gpt2_ft.py", "--train_data", "x", "--valid_data", "x")
    assert done.returncode == 2 and "--max_epoch" in done.stderr


@pytest.fixture(scope="module")
def predictions(root, data, trained, tmp_path_factory):
    """Runs beam search on valid.jsonl and a copy of its first line; returns the output."""
    folder = tmp_path_factory.mktemp("beam")
    lines = (data / "valid.jsonl").read_text().splitlines()
    (folder / "test.jsonl").write_text("\n".join([*lines, lines[0]]) + "\n")

    def predict(*flags, script="src/gpt2_beam.py"):
        done = run_script(
            root, script, "--data", folder / "test.jsonl", "--seq_len", 24, "--eval_len", 8,
            "--model_card", "gpt2.nano", "--init_checkpoint", trained[1] / f"model.{STEPS}.pt",
            "--lora_dim", 4, "--lora_alpha", 32, "--beam", 3, "--length_penalty", 0.8,
            "--no_repeat_ngram_size", 2, "--eos_token_id", 628, "--work_dir", folder,
            "--output_file", "out.jsonl", "--device", "cpu", *flags)
        assert done.returncode == 0, done.stderr
        assert re.search(r"[0-9.]+ samples/s", done.stdout) or "align" in script
        return (folder / "out.jsonl").read_text()

    return predict


@pytest.mark.slow
def test_beam_search_output(predictions):
    one = predictions("--batch_size", 1, "--hold_batch_size")
    assert one == predictions("--batch_size", 3, "--hold_batch_size")
    assert one == predictions("--batch_size", 1)
    records = [json.loads(line) for line in one.splitlines()]
    assert [record["id"] for record in records] == [0, 1, 2, 3]
    assert all(len(record["predict"]) == 8 for record in records)
    assert records[0]["predict"] == records[3]["predict"]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [
    [], ["--beam", "5", "--repetition_penalty", "1.3", "--min_length", "4"]])
def test_beam_search_follows_pytorch(predictions, flags):
    pytest.importorskip("transformers")
    assert predictions("--batch_size", 4, *flags) == predictions(
        "--batch_size", 1, *flags, script="align/torch_beam.py")


@pytest.fixture
def search(here, data, base, tmp_path, monkeypatch):
    """Runs the beam search script in this process, one context a batch.

    ``stop`` interrupts it at that batch; unless ``held``, a batch has more contexts. Returns the
    exit code, stderr, the number of batches searched, and the bytes of the output.
    """
    import beam_search
    import gpt2_beam

    original = beam_search.search

    def run(*flags, stop=None, held=True):
        searched = []

        def one(*arguments):
            if len(searched) == stop:
                raise KeyboardInterrupt
            searched.append(arguments)
            return original(*arguments)

        monkeypatch.setattr(beam_search, "search", one)
        done = here(gpt2_beam.main, "--data", data / "valid.jsonl", "--seq_len", 24, "--eval_len",
                    4, "--model_card", "gpt2.nano", "--init_checkpoint", base, "--batch_size", 1,
                    *(["--hold_batch_size"] if held else []), "--work_dir", tmp_path,
                    "--output_file", "out.jsonl", "--device", "cpu", *flags)
        output = tmp_path / "out.jsonl"
        return (done.returncode, done.stderr, len(searched),
                output.read_bytes() if output.exists() else None)
    return run


def test_an_interrupted_beam_search_goes_on(search, tmp_path):
    _, _, contexts, whole = search()
    assert contexts == 3
    (tmp_path / "out.jsonl").unlink()
    code, said, searched, output = search(stop=2)
    assert (code, searched, output) == (130, 2, None)
    assert said == ("stopped after 2 of 3 different contexts; to continue: the same command with "
                    "--resume\n")
    assert search("--resume") == (0, "", 1, whole)
    assert search("--resume", "auto") == (0, "", 0, whole)  # it has ended
    assert search() == (0, "", 3, whole)
    (tmp_path / "out.jsonl").write_bytes(whole + b"changed")
    assert search("--resume") == (0, "", 3, whole)


def test_more_contexts_at_once_give_the_same(search, tmp_path):
    """Whatever --batch_size holds, also if one search is continued by the other."""
    _, _, contexts, whole = search()
    assert contexts == 3 and search(held=False) == (0, "", 1, whole)
    (tmp_path / "out.jsonl").unlink()
    search(stop=1)
    assert search("--resume", held=False) == (0, "", 1, whole)
    assert search("--resume") == (0, "", 0, whole)


@pytest.mark.parametrize("seq_len", [24, 8])
def test_beam_search_reports_what_is_cut(search, tmp_path, monkeypatch, seq_len):
    import gpt2_beam

    said = []
    monkeypatch.setattr(gpt2_beam, "log", said.append)
    lines = [([1] * 3, [2] * 4), ([1] * 4, [2] * 4), ([1] * 5, [2] * 6), ([1] * 2, [2] * 5)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"context": c, "completion": d}) + "\n" for c, d in lines))
    assert search("--data", data, "--seq_len", seq_len)[:2] == (0, "")
    cut = [line for line in said if "longer than" in line]
    assert cut == ([f"{data}: 1 of 4 contexts lose their beginning, being longer than 4 tokens "
                    "(--seq_len 8 less --eval_len 4), by up to 1; 2 of 4 completions are longer "
                    "than --eval_len 4, by up to 2; raise --eval_len to 6 and --seq_len to 11 to "
                    "cut none"] if seq_len == 8 else
                   [f"{data}: 2 of 4 completions are longer than --eval_len 4, by up to 2; raise "
                    "--eval_len to 6 and --seq_len to 11 to cut none"])


def test_predictions_end_with_the_sequence(search):
    """One beam is a greedy search: with further end tokens, it ends at the first of them."""
    free = [json.loads(line) for line in search()[3].splitlines()]
    ends = {record["predict"][1] for record in free}
    _, _, _, output = search(*(word for token in ends for word in ("--eos_token_id", token)))
    for record, before in zip(map(json.loads, output.splitlines()), free):
        length = next(i for i, token in enumerate(before["predict"], start=1) if token in ends)
        assert record["length"] == length <= 2
        assert record["predict"] == before["predict"][:length] + [0] * (4 - length)


def test_an_empty_prediction_is_an_answer(search, tmp_path):
    _, _, contexts, whole = search()
    state = tmp_path / "out.jsonl.state"
    header = json.dumps({"settings": json.loads(state.read_text())["settings"]})
    state.write_text("\n".join([header, *(f"[{n}, []]" for n in range(contexts)), ""]))
    code, said, searched, output = search("--resume")
    assert (code, said, searched) == (0, "", 0)
    assert all(json.loads(line)["length"] == 0 for line in output.splitlines()) and whole


def test_a_state_of_another_beam_search(search, tmp_path):
    whole = search("--beam", 2)[3]
    (tmp_path / "out.jsonl").unlink()
    search(stop=2)
    code, said, searched, output = search("--resume", "--beam", 2)
    assert (code, searched, output) == (1, 0, None)
    assert said.startswith(f"error: {tmp_path}/out.jsonl.state: of a search with other flags or ")
    assert search("--resume", "auto", "--beam", 2) == (0, "", 3, whole)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_beam_search_in_other_precisions(search, tmp_path, precision):
    whole = search()[3]
    (tmp_path / "out.jsonl").unlink()
    search(stop=2)
    code, said, searched, output = search("--resume", "--precision", precision)
    assert (code, searched, output) == (1, 0, None) and "of a search with other flags" in said
    code, said, searched, output = search("--precision", precision)
    assert (code, said, searched) == (0, "", 3)
    assert len(output.splitlines()) == len(whole.splitlines())


@pytest.mark.parametrize("lines", [
    [], [b"{"], [b"null"], [b"{}"], [b'{"settings": 1}', b"[9, [1, 1, 1, 1]]"],
    [b"HEADER", b"[0, [1, 1, 1, 1, 1]]"], [b"HEADER", b"[3, [1, 1, 1, 1]]"], [b"HEADER", b"[0]"],
    [b"HEADER", b'[0, [1, 1, 1, "x"]]'], [b"HEADER", b"[0, [1, 1, 1, -1]]"], [b"HEADER", b"7"],
    [b"HEADER", b"\xff"], [b"[" * 100000]])
def test_a_damaged_state_of_a_beam_search(search, tmp_path, lines):
    whole = search()[3]
    (tmp_path / "out.jsonl").unlink()
    search(stop=2)
    state = tmp_path / "out.jsonl.state"
    header = state.read_bytes().split(b"\n")[0]
    state.write_bytes(b"".join(line.replace(b"HEADER", header) + b"\n" for line in lines))
    assert search("--resume") == (0, "", 3, whole)


def test_a_state_that_ends_in_the_middle_of_a_line(search, tmp_path):
    whole = search()[3]
    (tmp_path / "out.jsonl").unlink()
    search(stop=2)
    state = tmp_path / "out.jsonl.state"
    state.write_bytes(state.read_bytes()[:-3])
    assert search("--resume") == (0, "", 2, whole)


def test_beam_search_refuses(root, here, data, base, tmp_path):
    import gpt2_beam

    flags = ["--data", data / "valid.jsonl", "--seq_len", 24, "--eval_len", 8, "--model_card",
             "gpt2.nano", "--lora_dim", 4, "--work_dir", tmp_path, "--device", "cpu"]

    def beam(*more):
        return here(gpt2_beam.main, *flags, *more)

    fails(beam("--init_checkpoint", base), base, "--lora_checkpoint", "--lora_dim 0")
    fails(beam("--init_checkpoint", tmp_path / "none.pt"), tmp_path / "none.pt",
          "download_pretrained_checkpoints.sh")
    fails(beam("--init_checkpoint", base, "--data", tmp_path / "none.jsonl"), "none.jsonl")
    for more in (["--eval_len", 24], ["--beam", 50258], ["--length_penalty", "nan"]):
        assert beam("--init_checkpoint", base, *more).returncode == 2
    if shutil.which("nvidia-smi") is None:
        fails(run_script(root, "src/gpt2_beam.py", *flags, "--init_checkpoint", base, "--device",
                         "cuda"), "--device cuda", "--device cpu")
    assert not any(tmp_path.iterdir())
