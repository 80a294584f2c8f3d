"""Flags: the values they accept, flag files, and the commands that work.sh builds from them."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import run_main

from runtime.flags import ArgumentParser, at_least, between, number, read_flags, seed, share

# The commands of stages 3 and 4 in the user's document, without the names of files.
FT = shlex.split("""--train_batch_size 2 --grad_acc 2 --valid_batch_size 1 --seq_len 64
    --model_card gpt2.sm --clip 0.0 --lr 0.0002 --weight_decay 0.01 --adam_beta2 0.999
    --scheduler linear --warmup_step 500 --max_epoch 5 --save_interval 1000 --lora_dim 4
    --lora_alpha 32 --lora_dropout 0.1 --label_smooth 0.1 --random_seed 2025""")
BEAM = shlex.split("""--batch_size 1 --seq_len 64 --eval_len 32 --model_card gpt2.sm --lora_dim 4
    --lora_alpha 32 --beam 10 --length_penalty 0.8 --no_repeat_ngram_size 4
    --repetition_penalty 1.0 --eos_token_id 628""")
DOCUMENT = {"gpt2_ft": FT, "gpt2_beam": BEAM}
FT_FILES = ["--train_data", "train.jsonl", "--valid_data", "valid.jsonl"]
BEAM_FILES = ["--data", "test.jsonl", "--init_checkpoint", "model.pt"]


@pytest.mark.parametrize("kind, good, bad", [
    (at_least(1), ["1", "7"], ["0", "-1", "x", "1.5", ""]),
    (at_least(0, float), ["0", "1e-9"], ["-1", "nan", "inf"]),
    (at_least(0, number), ["0", "32", "27.7128", "1e3"], ["-1", "nan", "inf", "1e999", "x", ""]),
    (between(-10, 10), ["-10", "0.8", "10"], ["10.1", "nan", "inf"]),
    (share, ["0", "0.999"], ["1", "-0.1", "nan"]),
    (seed, ["0", "2147483647"], ["-1", "2147483648", "1.0"]),
])
def test_numbers_of_flags(kind, good, bad, capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--n", type=kind)
    for text in good:
        assert parser.parse_args([f"--n={text}"]).n == float(text)
    for text in bad:
        with pytest.raises(SystemExit):
            parser.parse_args([f"--n={text}"])
        assert "--n: " in capsys.readouterr().err


def test_whole_numbers_stay_whole():
    """A state holds the flags as text: 32 and 32.0 must not differ."""
    assert [repr(number(text)) for text in ("32", "32.0", "3.2e1", "27.5", "0")] == [
        "32", "32", "32", "27.5", "0"]


@pytest.fixture
def ini(tmp_path):
    """Writes a file of flags; returns @FILE."""
    def write(text, name="my.ini"):
        (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
        return f"@{tmp_path / name}"
    return write


@pytest.fixture
def parse(monkeypatch):
    """Parses words as a script does; returns the values that differ from the defaults."""
    parser = ArgumentParser("What it does.", "mine")
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--rate", type=float, default=0.5)
    parser.add_argument("--name", default="none")
    parser.add_argument("--switch", action="store_true")
    parser.add_argument("--end", type=int, action="append", default=[0])
    parser.add_argument("--resume", nargs="?", const="yes", default="no")

    def values(*words):
        monkeypatch.setattr("sys.argv", ["script.py", *words])
        changed = vars(parser.parse_args())
        assert changed == vars(parser.parse_args(list(words)))
        return {name: value for name, value in changed.items()
                if value != parser.get_default(name)}
    return values


def test_sections(ini, parse):
    file = ini("# a comment\n[DEFAULT]\nrank = 4\nrate = 0.1\n\n[mine]\nrate = 2e-3\nswitch\n"
               "[other]\nname = x\nno_such_flag = 1\n")
    assert parse(file) == {"rank": 4, "rate": 0.002, "switch": True}
    assert parse() == {}


def test_what_comes_later_overrides(ini, parse):
    file = ini("[mine]\nrank = 4\nname = file\n")
    assert parse(file, "--rank", "5") == {"rank": 5, "name": "file"}
    assert parse("--rank", "5", "--name=first", file) == {"rank": 4, "name": "file"}
    second = ini("[DEFAULT]\nrank = 6\n[mine]\nrate = 3\n", "second.ini")
    assert parse(file, second) == {"rank": 6, "name": "file", "rate": 3.0}
    assert parse(second, file) == {"rank": 4, "name": "file", "rate": 3.0}
    assert parse(file, second, "--rank", "7") == {"rank": 7, "name": "file", "rate": 3.0}


def test_forms_of_a_line(ini, parse):
    assert parse(ini("[mine]\n")) == {}
    assert parse(ini("[mine]\nrank=4\nname : a = b: 100% #c\nresume\nend = 7\n")) == {
        "rank": 4, "name": "a = b: 100% #c", "resume": "yes", "end": [0, 7]}
    assert parse(ini("[mine]\nrate = -1.5\n")) == {"rate": -1.5}
    assert parse(ini(b"\xef\xbb\xbf[mine]\r\nrank = 4\r\nresume = auto\r\n")) == {
        "rank": 4, "resume": "auto"}


def test_read_flags_keeps_the_words_and_their_order(ini):
    file = ini("[DEFAULT]\nb = 1\n[mine]\nrate = 1.50\nswitch\na = x y\n")[1:]
    assert read_flags(file, "mine") == {"rate": "1.50", "switch": None, "a": "x y", "b": "1"}


@pytest.mark.parametrize("text, line", [
    ("rank = 4\n", 1),
    ("\n# flags\nrank = 4\n[gpt2_ft]\n", 3),
    ("[gpt2_ft]\n= 4\n", 2),
    ("[gpt2_ft]\nlr = 1\nseq_len = 4\nlr = 2\n", 4),
    ("[DEFAULT]\nlr = 1\nlr = 2\n[gpt2_ft]\n", 3),
    ("[gpt2_ft]\nlr = 1\n[gpt2_beam]\n[gpt2_ft]\nlr = 2\n", 4),
    (b"[gpt2_ft]\nname = \xe9\n", 2),
])
def test_a_malformed_file_is_one_line_with_its_number(ini, text, line):
    import gpt2_ft

    file = ini(text)
    code, said = run_main(gpt2_ft.main, [file, *FT_FILES])
    assert code == 1
    assert said.startswith(f"error: {file[1:]}:{line}: ") and said.count("\n") == 1
    assert ";" in said  # a remedy


def test_a_missing_file_or_section(ini, tmp_path):
    import gpt2_ft

    for file, found in ((f"@{tmp_path}/none.ini", "none.ini: no such file; "),
                        (f"@{tmp_path}", f"{tmp_path}: cannot be read: "),
                        (ini("[DEFAULT]\nlr = 1\n[gpt2_beam]\n"), "my.ini: no section [gpt2_ft]; "),
                        (ini(""), "my.ini: no section [gpt2_ft]; ")):
        code, said = run_main(gpt2_ft.main, [file, *FT_FILES])
        assert code == 1 and said.startswith("error: ") and said.count("\n") == 1
        assert found in said


def test_a_file_is_checked_as_the_command_line_is(ini):
    import gpt2_ft

    for line, found in (("fp16", "--fp16"), ("no_such = 1", "--no_such"), ("lr = high", "--lr"),
                        ("grad_acc = 0", "--grad_acc"), ("max_epoch", "--max_epoch"),
                        ("correct_bias = 1", ": 1"), ("lr =", "--lr")):
        code, said = run_main(gpt2_ft.main, [ini(f"[gpt2_ft]\n{line}\n"), *FT_FILES,
                                             *([] if "epoch" in line else ["--max_epoch", 1])])
        assert code == 2 and found in said.splitlines()[-1], (line, said)


def test_help_names_the_section(capsys, monkeypatch):
    import gpt2_beam
    import gpt2_ft

    for script, section in ((gpt2_ft, "[gpt2_ft]"), (gpt2_beam, "[gpt2_beam]")):
        monkeypatch.setattr("sys.argv", ["script.py", "--help"])
        with pytest.raises(SystemExit) as end:
            script.parse_args()
        assert end.value.code == 0
        said = " ".join(capsys.readouterr().out.split())
        assert f"@FILE stands for the flags in section {section}" in said


def scripts_in(root):
    """Our scripts with flags, without those that import PyTorch first."""
    paths = [path for folder in ("src", "eval", "align", "bench", "data", "vocab",
                                 "pretrained_checkpoints") for path in (root / folder).rglob("*.py")
             if not path.name.startswith("torch_")]
    return [path for path in paths if "ArgumentParser(" in path.read_text()
            and path.name != "flags.py"]


@pytest.mark.slow
def test_scripts_work_without_docstrings(root):
    """python -OO removes them, and the descriptions of --help are made of them."""
    assert len(scripts_in(root)) >= 15
    for script in scripts_in(root):
        done = subprocess.run([sys.executable, "-OO", script, "--help"], capture_output=True)
        assert done.returncode == 0 and b"usage: " in done.stdout and not done.stderr, done.stderr
        assert not re.search(rb"\(default:\s+(None|False|)\)", done.stdout), done.stdout


def test_wrong_flags_end_with_one_line(root):
    for script in scripts_in(root):
        done = subprocess.run([sys.executable, script, "--no\nsuch"], capture_output=True,
                              text=True)
        assert done.returncode == 2 and not done.stdout
        assert re.fullmatch(r"error: .+; --help lists the flags\n", done.stderr), done.stderr
    for path in (root / "align").glob("torch_*.py"):
        assert "argparse.ArgumentParser(" not in path.read_text()


def test_help_shows_the_defaults_that_say_something():
    parser = ArgumentParser("What it does.", prog="bash it.sh")
    for flag, default in (("zero", 0), ("none", None), ("text", "a"), ("empty", "")):
        parser.add_argument(f"--{flag}", default=default, help="Sets it.")
    parser.add_argument("--switch", action="store_true", help="Sets it.")
    said = parser.format_help()
    assert said.startswith("usage: bash it.sh ")
    assert re.findall(r"\(default: .*", said) == ["(default: 0)", "(default: a)"]


# The experiment

@pytest.mark.parametrize("section", DOCUMENT)
def test_the_experiments_file_holds_the_documents_flags(root, section):
    words = DOCUMENT[section]
    assert read_flags(root / "data/experiment.ini", section) == {
        name[2:]: value for name, value in zip(words[::2], words[1::2])}


def values_of(script: str, words) -> dict:
    """The values that a stage's own parser returns for these words."""
    import gpt2_beam
    import gpt2_ft

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["script.py", *words])
        return vars({"gpt2_ft": gpt2_ft, "gpt2_beam": gpt2_beam}[script].parse_args())


@pytest.mark.parametrize("section, files", [("gpt2_ft", FT_FILES), ("gpt2_beam", BEAM_FILES)])
def test_the_experiments_file_means_the_documents_command(root, monkeypatch, section, files):
    monkeypatch.chdir(root)
    assert values_of(section, ["@data/experiment.ini", *files]) == values_of(
        section, [*DOCUMENT[section], *files])


# Records the words of each command, and creates a checkpoint where training would.
PYTHON = """#!/usr/bin/env bash
case "${1:-}" in *.py) printf '%q ' "$@" >> "$CALLS"; echo >> "$CALLS" ;; esac
while (( $# )); do
    if [[ "$1" == --work_dir ]]; then mkdir -p "$2"; touch "$2/model.7.pt"; fi
    if [[ "$1" == @(--output_file|--output_ref_file) ]]; then touch "$2"; fi
    shift
done
"""


@pytest.fixture
def work(root, tmp_path, monkeypatch):
    """Runs work.sh with this stand-in for Python; returns each stage's words by script."""
    for file in ("work.sh", "setup.sh", "requirement.txt"):
        shutil.copy(root / file, tmp_path / file)
    (tmp_path / "data/demo").mkdir(parents=True)
    for file in ("data/experiment.ini", "data/demo/demo.ini", "data/demo/base.ini"):
        shutil.copy(root / file, tmp_path / file)
    names = ("train", "valid", "test", "test_formatted")
    for file in (*(f"data/e2e/{name}.jsonl" for name in names), "base.bin",
                 *(f"pretrained_checkpoints/gpt2{size}-pytorch_model.bin"
                   for size in ("", "-medium", "-large"))):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    for file, text in (("python", PYTHON), ("mpirun", PYTHON), ("mpicc", "#!/bin/sh\n"),
                       ("java", "#!/bin/sh\n"), ("g++", "#!/bin/sh\necho 12\n")):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / file).write_text(text)
        (tmp_path / "bin" / file).chmod(0o755)
    kept = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
    monkeypatch.chdir(root)

    def run(*words, **variables):
        calls = tmp_path / "calls"
        calls.write_text("")
        done = subprocess.run(
            ["bash", "work.sh", *words], cwd=tmp_path, capture_output=True, text=True, env={
                **kept, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "CALLS": str(calls),
                "VIRTUAL_ENV": str(tmp_path),
                **{name: str(value) for name, value in variables.items()}})
        assert done.returncode == 0, done.stderr
        found = {}
        for line in calls.read_text().splitlines():
            script, *words = shlex.split(line)
            found.setdefault(script.rpartition("/")[2].removesuffix(".py"), []).append(words)
        return found

    return run


def test_work_runs_the_documents_commands(work):
    called = work()
    train, = called["gpt2_ft"]
    assert train[0] == "@data/experiment.ini"
    assert not [word for word in train[1:] if word.startswith("@")]
    assert values_of("gpt2_ft", train) == values_of("gpt2_ft", [
        *FT, "--train_data", "./data/e2e/train.jsonl", "--valid_data", "./data/e2e/valid.jsonl",
        "--init_checkpoint", "./pretrained_checkpoints/gpt2-pytorch_model.bin", "--work_dir",
        "./trained_models/GPT2_M/e2e", "--resume", "auto"])
    beam, = called["gpt2_beam"]
    assert values_of("gpt2_beam", beam) == values_of("gpt2_beam", [
        *BEAM, "--data", "./data/e2e/test.jsonl", "--init_checkpoint",
        "./trained_models/GPT2_M/e2e/model.7.pt", "--work_dir", "./trained_models/GPT2_M/e2e",
        "--output_file", "predict.7.b10p08r4.jsonl", "--resume", "auto"])
    assert called["gpt2_decode"] == [shlex.split(
        "--vocab ./vocab --sample_file ./trained_models/GPT2_M/e2e/predict.7.b10p08r4.jsonl "
        "--input_file ./data/e2e/test_formatted.jsonl --output_ref_file e2e_ref.txt "
        "--output_pred_file e2e_pred.txt")]
    assert called["measure_scores"] == [["e2e_ref.txt", "e2e_pred.txt", "-p"]]


VARIABLES = [  # and the values that they change in stages 3 and 4
    ({"EPOCHS": 1}, {"max_epoch": 1}, {}),
    ({"BATCH_SIZE": 3}, {"train_batch_size": 3}, {}),
    ({"GRAD_ACC": 1}, {"grad_acc": 1}, {}),
    ({"LEARNING_RATE": 0.5}, {"lr": 0.5}, {}),
    ({"WARMUP_STEPS": 0}, {"warmup_step": 0}, {}),
    ({"LOG_INTERVAL": 7}, {"log_interval": 7}, {}),
    ({"SEED": 11}, {"random_seed": 11}, {}),
    ({"LORA_DIM": 8}, {"lora_dim": 8}, {"lora_dim": 8}),
    ({"LORA_ALPHA": 16}, {"lora_alpha": 16}, {"lora_alpha": 16}),
    ({"LORA_ALPHA": 27.5}, {"lora_alpha": 27.5}, {"lora_alpha": 27.5}),
    ({"BEAM_BATCH_SIZE": 16}, {}, {"batch_size": 16}),
    ({"SEQ_LEN": 128}, {"seq_len": 128}, {"seq_len": 128}),
    ({"EVAL_LEN": 48}, {}, {"eval_len": 48}),
    ({"WEIGHT_DECAY": 0.1}, {"weight_decay": 0.1}, {}),
    ({"LORA_DROPOUT": 0}, {"lora_dropout": 0}, {}),
    ({"LABEL_SMOOTH": 0.2}, {"label_smooth": 0.2}, {}),
    ({"EVAL_INTERVAL": 7}, {"eval_interval": 7}, {}),
    ({"CORRECT_BIAS": "yes"}, {"correct_bias": True}, {}),
    ({"CORRECT_BIAS": "no"}, {}, {}),
    ({"DEVICE": "cpu"}, {"device": "cpu"}, {"device": "cpu"}),
    ({"RESUME": "no"}, {"resume": "no"}, {"resume": "no"}),
    ({"BASE_STEPS": 3}, {}, {}),
    ({"EPOCHS": ""}, {}, {}),
    ({"EPOCHS": 2, "LORA_DIM": 2, "LORA_ALPHA": 2}, {"max_epoch": 2, "lora_dim": 2,
                                                     "lora_alpha": 2},
     {"lora_dim": 2, "lora_alpha": 2}),
]


@pytest.mark.parametrize("variables, train, beam", VARIABLES)
def test_variables_override_the_file(work, variables, train, beam):
    plain, called = work(), work(**variables)
    for script, changes in (("gpt2_ft", train), ("gpt2_beam", beam)):
        before, after = (values_of(script, words[script][0]) for words in (plain, called))
        assert {name: value for name, value in after.items() if value != before[name]} == changes


def test_variables_for_files(work, tmp_path):
    base = "./pretrained_checkpoints/gpt2-medium-pytorch_model.bin"
    called = work(MODEL_CARD="gpt2.md")
    train, beam = (values_of(name, called[name][0]) for name in ("gpt2_ft", "gpt2_beam"))
    assert train["init_checkpoint"] == base
    assert train["model_card"] == beam["model_card"] == "gpt2.md"
    called = work(MODEL_CARD="gpt2.nano", INIT_CHECKPOINT="base.bin", WORK_DIR="out",
                  DATA="data/e2e")
    train, beam = (values_of(name, called[name][0]) for name in ("gpt2_ft", "gpt2_beam"))
    assert train["init_checkpoint"] == "base.bin" and train["model_card"] == "gpt2.nano"
    assert train["valid_data"] == "data/e2e/valid.jsonl" and beam["data"] == "data/e2e/test.jsonl"
    assert beam["init_checkpoint"] == "out/model.7.pt" and str(train["work_dir"]) == "out"


def test_a_folder_as_base(work, tmp_path):
    (tmp_path / "my gpt2").mkdir()
    called = work(MODEL_CARD="auto", INIT_CHECKPOINT="my gpt2")
    train, beam = (values_of(name, called[name][0]) for name in ("gpt2_ft", "gpt2_beam"))
    assert train["init_checkpoint"] == "my gpt2"
    assert train["model_card"] == beam["model_card"] == "auto"


def test_several_processes_through_mpirun(work, tmp_path):
    (tmp_path / "bin/mpirun").write_text(PYTHON.replace(
        'case "${1:-}" in *.py)', 'case "$*" in *.py*)'))
    called = work(NPROC=3, MPI_FLAGS="--hostfile my hosts")
    words = [call for calls in called.values() for call in calls if "python" in call]
    assert len(words) == 2
    for call, script in zip(words, ("src/gpt2_ft.py", "src/gpt2_beam.py")):
        assert "3 --bind-to none --oversubscribe" in " ".join(call)
        python = call.index("python")
        assert call[python - 3:python] == ["--hostfile", "my", "hosts"]
        assert call[python + 1:python + 3] == [script, "@data/experiment.ini"]


def test_demo_takes_both_files(work):
    called = work("demo", MODEL_CARD="gpt2.lg", BASE_STEPS=5, BATCH_SIZE=40, SEED=3)
    pretrain, train = called["gpt2_ft"]
    assert pretrain[0] == "@data/demo/base.ini"
    assert not [word for word in pretrain[1:] if word.startswith("@")]
    base = values_of("gpt2_ft", pretrain)
    assert (base["max_step"], base["lora_dim"], base["obj"], base["correct_bias"]) == (
        5, None, "jlm", True)  # None: 0, without --init_checkpoint
    both = ["@data/experiment.ini", "@data/demo/demo.ini"]
    assert train[:2] == both
    assert values_of("gpt2_ft", train) == values_of("gpt2_ft", [
        *FT, "--model_card", "gpt2.nano", "--train_batch_size", "40", "--grad_acc", "1", "--lr",
        "0.001", "--warmup_step", "50", "--max_epoch", "1", "--random_seed", "3",
        "--train_data", "./data/demo/work/train.jsonl",
        "--valid_data", "./data/demo/work/valid.jsonl",
        "--init_checkpoint", "./trained_models/demo/base/model.7.pt",
        "--work_dir", "./trained_models/demo", "--resume", "auto"])
    frozen, tuned = called["gpt2_beam"]
    assert frozen[:2] == tuned[:2] == both
    assert values_of("gpt2_beam", frozen)["lora_dim"] == 0
    assert values_of("gpt2_beam", tuned) == values_of("gpt2_beam", [
        *BEAM, "--model_card", "gpt2.nano", "--batch_size", "16",
        "--data", "./data/demo/work/test.jsonl",
        "--init_checkpoint", "./trained_models/demo/model.7.pt",
        "--work_dir", "./trained_models/demo", "--output_file", "lora.jsonl", "--resume", "auto"])
