"""Text for inputs without references: the same as by the stages, streams, n best, wrong input.

The model is tiny and reads bytes: its vocabulary has 256 of them and <|endoftext|>.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

import pytest
from conftest import run_main

import gpt2_beam
import gpt2_decode
import gpt2_encode
import gpt2_generate as stage
from encoder import END_OF_TEXT, byte_symbols
from runtime.errors import InputError

CONTEXTS = ["name : Swan", "name : A | food : B", "x", "name : Swan", "caf\u00e9 : \u00a3 | y : z"]
SEARCH = ["--seq_len", 40, "--eval_len", 12, "--model_card", "gpt2.nano", "--device", "cpu",
          "--eos_token_id", 256, "--eos_token_id", 10]


@pytest.fixture(scope="module")
def byte_vocab(tmp_path_factory):
    """A vocabulary without merges."""
    folder = tmp_path_factory.mktemp("vocab")
    tokens = [*sorted(byte_symbols()), END_OF_TEXT]
    (folder / "encoder.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "vocab.bpe").write_text("#version: 0.2\n")
    return folder


@pytest.fixture(scope="module")
def model(jittor, tiny, tmp_path_factory):
    """The checkpoint of a random model, whose size gpt2.nano has meanwhile."""
    import numpy as np

    from config import MODEL_CARDS, GPT2Config
    from model import GPT2LMModel
    from runtime import torch_file

    with pytest.MonkeyPatch.context() as patch:
        card = GPT2Config(1, 16, 2, 257, 48)
        patch.setitem(MODEL_CARDS, "gpt2.nano", card)
        random = np.random.default_rng(3)
        path = tmp_path_factory.mktemp("model") / "model.pt"
        torch_file.save(path, {"model_state_dict": {
            name: random.normal(0, 0.5, p.shape).astype(np.float32)
            for name, p in GPT2LMModel(card).named_parameters()}})
        yield path


@pytest.fixture
def generate(model, byte_vocab, capfd):
    """Runs the script in this process; returns exit code, stdout and stderr."""
    def run(*flags):
        capfd.readouterr()
        code, said = run_main(stage.main, [*SEARCH, "--vocab", byte_vocab, "--init_checkpoint",
                                           model, *flags])
        return code, capfd.readouterr().out, said
    return run


def lines(text: str) -> list[str]:
    """The lines of an output; its texts may hold other line separators of Unicode."""
    return text.split("\n")[:-1]


@pytest.fixture
def inputs(tmp_path):
    """Writes CONTEXTS as lines and as JSON lines; returns both paths."""
    plain, records = tmp_path / "inputs.txt", tmp_path / "inputs.jsonl"
    plain.write_text("".join(f"{context}\n" for context in CONTEXTS), encoding="utf-8")
    records.write_text("".join(json.dumps({"context": c}) + "\n" for c in CONTEXTS))
    return plain, records


@pytest.mark.parametrize("flags", [
    ["--beam", 3, "--length_penalty", 0.8, "--no_repeat_ngram_size", 2],
    ["--seq_len", 20, "--repetition_penalty", 1.3, "--min_length", 4]])
def test_the_same_as_by_the_stages(generate, model, byte_vocab, inputs, tmp_path, flags):
    """Encoding, beam search and decoding; with the shorter seq_len, contexts are cut."""
    names = [tmp_path / name for name in ("ids.jsonl", "out.jsonl", "ref.txt", "pred.txt")]
    ids, predicted, references, texts = names
    for main, words in (
            (gpt2_encode.main, ["--vocab", byte_vocab, "--input", inputs[1], "--output", ids,
                                "--add_bos", "--add_eos"]),
            (gpt2_beam.main, [*SEARCH, "--data", ids, "--init_checkpoint", model, "--work_dir",
                              tmp_path, "--output_file", predicted.name, *flags]),
            (gpt2_decode.main, ["--vocab", byte_vocab, "--sample_file", predicted, "--input_file",
                                inputs[1], "--output_ref_file", references, "--output_pred_file",
                                texts])):
        assert run_main(main, words) == (0, "")
    assert not references.exists()
    expected = dict(zip(dict.fromkeys(CONTEXTS), lines(texts.read_text(encoding="utf-8"))))
    assert len(set(expected.values())) > 2
    for path in inputs:
        for size in (1, 2, 10):
            code, printed, said = generate("--input", path, "--batch_size", size,
                                           "--hold_batch_size", *flags)
            assert (code, said) == (0, "")
            assert printed == "".join(f"{expected[context]}\n" for context in CONTEXTS)
    code, printed, _ = generate(CONTEXTS[1], *flags)
    assert (code, printed) == (0, f"{expected[CONTEXTS[1]]}\n")
    _, printed, _ = generate("--input", inputs[0], "--json", *flags)
    for number, (line, before) in enumerate(zip(
            map(json.loads, lines(printed)),
            map(json.loads, predicted.read_text().splitlines()))):
        assert line["id"] == number and line["context"] == CONTEXTS[number]
        found, = line["predictions"]
        assert found["predict"] == before["predict"][:before["length"]]


def test_n_best(generate, inputs):
    flags = ["--input", inputs[0], "--beam", 4]
    best = lines(generate(*flags)[1])
    records = list(map(json.loads, lines(generate(*flags, "--n_best", 3, "--json")[1])))
    assert [record["predictions"][0]["text"] for record in records] == best
    for record in records:
        scores = [found["score"] for found in record["predictions"]]
        assert len(scores) == 3 and scores == sorted(scores, reverse=True)
        assert len({tuple(found["predict"]) for found in record["predictions"]}) == 3
    assert generate(*flags, "--n_best", 3)[1] == "".join(
        f"{text}\n" for record in records
        for text in [*(found["text"] for found in record["predictions"]), ""])


def test_samples(generate, inputs):
    flags = ["--input", inputs[0], "--sample", "--top_p", 0.9, "--n_best", 2, "--json"]
    code, printed, _ = generate(*flags, "--batch_size", 1, "--hold_batch_size")
    assert code == 0
    assert generate(*flags, "--batch_size", 4)[1] == printed
    assert generate(*flags, "--random_seed", 11)[1] != printed
    predictions = [[found["predict"] for found in json.loads(line)["predictions"]]
                   for line in lines(printed)]
    assert predictions[0] != predictions[3]  # the same input


class Pipe:
    """Standard input whose writer is the test."""

    def __init__(self, monkeypatch):
        reader, self.writer = os.pipe()
        self.file = os.fdopen(reader)
        monkeypatch.setattr(sys, "stdin", self.file)

    def write(self, data: bytes):
        os.write(self.writer, data)


def test_lines_are_read_as_they_come(monkeypatch):
    pipe = Pipe(monkeypatch)
    groups = stage.read_stream(lambda where, text: (where, text))
    for data, wanted in (
            (b"\xef\xbb\xbfone\n", [("standard input:1", "one")]),
            (b"two\r\nthree\nfo", [("standard input:2", "two"), ("standard input:3", "three")]),
            (b"ur\n\n", [("standard input:4", "four"), ("standard input:5", "")]),
            (b"l\xc3\xa4st", [("standard input:6", "l\u00e4st")])):
        pipe.write(data)
        if data.endswith(b"st"):
            os.close(pipe.writer)
        assert next(groups) == wanted
    assert list(groups) == []


@pytest.mark.parametrize("line, message", [
    (b"caf\xe9", "standard input:3: not UTF-8"), (b"a\rb", "standard input:3: a carriage return"),
    (b" ", "standard input:3: an empty input")])
def test_a_mistake_comes_after_the_answers_before_it(generate, monkeypatch, line, message):
    pipe = Pipe(monkeypatch)
    threading.Thread(target=lambda: (pipe.write(b"x\nname : Swan\n" + line + b"\ny\n"),
                                     os.close(pipe.writer))).start()
    code, printed, said = generate()
    assert code == 1 and printed == "".join(generate(text)[1] for text in ("x", "name : Swan"))
    assert said.startswith(f"error: {message}") and said.count("\n") == 1


def test_on_a_terminal_a_mistake_is_not_the_end(generate, monkeypatch):
    pipe = Pipe(monkeypatch)
    monkeypatch.setattr(sys, "stdin", Terminal(pipe.file.fileno()))
    pipe.write(b"\nx\n")
    os.close(pipe.writer)
    code, printed, said = generate()
    assert code == 0 and printed == generate("x")[1]
    assert said.startswith("error: standard input:1: an empty input; ") and said.count("\n") == 1


class Terminal:
    """Standard input as a terminal, which gets a line of explanation."""

    def __init__(self, number):
        self.fileno, self.isatty = lambda: number, lambda: True


def test_no_input_at_all(generate, monkeypatch):
    pipe = Pipe(monkeypatch)
    os.close(pipe.writer)
    assert generate() == (0, "", "")


def test_what_is_not_read_is_said(generate, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(stage, "log", said.append)
    path = tmp_path / "raw.txt"
    path.write_text(" name : Swan||A swan .\nname : Swan||\nname : Swan\n" + "y" * 40 + "\n")
    code, printed, _ = generate("--input", path)
    assert code == 0 and len(set(lines(printed)[:3])) == 1
    assert said == [
        '1 of 4 inputs have a reference behind "||", which is not read',
        "1 of 4 contexts lose their beginning, being longer than 28 tokens (--seq_len 40 less "
        "--eval_len 12), by up to 13; raise --eval_len to 12 and --seq_len to 53 to cut none"]


@pytest.mark.parametrize("name, data, message", [
    ("a.txt", b"", "a.txt: the file is empty"),
    ("a.txt", b"x\n\ny\n", "a.txt:2: an empty input; write one such as name : Blue"),
    ("a.txt", b"x\n||A swan\n", "a.txt:2: an empty input"),
    ("a.txt", b"x\ncaf\xe9\n", "a.txt:2: not UTF-8"),
    ("a.txt", b"x" * 48 + b"\n", "a.txt:1: a context of 49 tokens, the model has 48 positions"),
    ("a.jsonl", b"x\n", "a.jsonl:1: not a JSON object"),
    ("a.jsonl", b'{"context": "x"}\n{"text": "x"}\n', 'a.jsonl:2: no "context"'),
    ("a.jsonl", b'{"context": " "}\n', "a.jsonl:1: an empty input"),
    ("a.jsonl", b'{"context": "\\ud83d"}\n', 'a.jsonl:1: "context" must be a text'),
])
def test_mistakes_in_a_file(generate, tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    code, printed, said = generate("--input", tmp_path / name)
    assert (code, printed) == (1, "")
    assert said.startswith(f"error: {tmp_path}/{message}") and said.count("\n") == 1


def test_other_mistakes(generate, tmp_path, monkeypatch):
    for flags, message in (([""], "TEXT: an empty input"), (["\udce9"], "TEXT: not UTF-8"),
                           (["--input", tmp_path / "none"], f"{tmp_path}/none: no such file"),
                           (["x", "--vocab", tmp_path], f"{tmp_path}/encoder.json: no such file")):
        code, printed, said = generate(*flags)
        assert (code, printed) == (1, "") and message in said and said.count("\n") == 1
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(InputError, match="one process; start it without mpirun"):
        monkeypatch.setattr(sys, "argv", ["x", "x", "--init_checkpoint", "x"])
        stage.main()


def test_a_token_that_is_no_text(generate, byte_vocab, monkeypatch):
    """A model can have more tokens than the vocabulary, for example 50,304."""
    from encoder import Encoder

    def decode(self, ids):
        raise ValueError("token id 300 is outside the vocabulary (0 to 256)")

    monkeypatch.setattr(Encoder, "decode", decode)
    code, printed, said = generate("x")
    assert (code, printed) == (1, "") and "TEXT: predicts a token that is no text" in said


@pytest.mark.parametrize("flags", [
    ["x", "--input", "y"], ["--n_best", 2], ["--n_best", 4, "--beam", 3], ["--n_best", 0],
    ["--top_k", 5], ["--top_p", 0.9], ["--temperature", 2], ["--random_seed", 1],
    ["--sample", "--top_p", 1.1], ["--sample", "--temperature", 0], ["--seq_len", 12],
    ["name", ":", "Swan"]])
def test_wrong_flags(generate, flags):
    code, printed, said = generate(*flags)
    assert (code, printed) == (2, "") and said.startswith("error: ") and said.count("\n") == 1


def test_flags_of_the_search_come_from_its_section(generate, tmp_path, inputs):
    ini = tmp_path / "my.ini"
    ini.write_text("[gpt2_beam]\nbeam = 3\neval_len = 5\nwork_dir = here\nno_such = 1\nresume\n")
    code, printed, said = generate(f"@{ini}", "--input", inputs[0], "--n_best", 3, "--json")
    assert code == 0
    assert said == "note: not for this script, and left out: --work_dir, --no_such, --resume\n"
    assert all(len(found["predict"]) <= 5 for line in lines(printed)
               for found in json.loads(line)["predictions"])


@pytest.mark.slow
def test_answers_come_while_the_input_goes_on(root, vocab, tmp_path):
    """In a process of its own: standard output has the texts alone, one before the next input."""
    base = tmp_path / "base.pt"
    script = ("import sys; sys.path.insert(0, 'src')\n"
              "from runtime import backend, torch_file\nbackend.start('cpu', 1)\n"
              "from config import MODEL_CARDS\nfrom model import GPT2LMModel\n"
              "torch_file.save(sys.argv[1], {n: p.numpy() for n, p in "
              "GPT2LMModel(MODEL_CARDS['gpt2.nano']).named_parameters()})")
    subprocess.run([sys.executable, "-c", script, base], cwd=root, check=True)
    command = [sys.executable, "src/gpt2_generate.py", "@data/experiment.ini", "--model_card",
               "gpt2.nano", "--lora_dim", "0", "--init_checkpoint", base, "--device", "cpu"]
    process = subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    answers = []
    for text in (b"name : Swan\n", b"name : Blue Spice | Type : pub\n"):
        process.stdin.write(text)
        process.stdin.flush()
        answers.append(process.stdout.readline())
    rest, said = process.communicate()
    assert process.returncode == 0 and rest == b"" and b"device: CPU" in said
    done = subprocess.run([*command, "name : Swan"], cwd=root, capture_output=True)
    assert done.stdout == answers[0] != b""
