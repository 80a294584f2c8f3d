"""Stage 2 compared with the original's output and tiktoken, and its errors for wrong input."""

import json
import subprocess
import sys

import pytest

RECORDS = [{"context": "name : Caf\u00e9 | price : \u00a320", "completion": "It's <|endoftext|> !"},
           {"context": "", "completion": ""}]
END = 50256


@pytest.fixture
def encode(root, vocab, tmp_path):
    """Runs the script on the given bytes; returns the process and the output file."""
    def run(data, *flags, vocab=vocab):
        source, target = tmp_path / "formatted.jsonl", tmp_path / "ids.jsonl"
        if data is not None:
            source.write_bytes(data)
        process = subprocess.run(
            [sys.executable, root / "src/gpt2_encode.py", "--vocab", vocab, "--input", source,
             "--output", target, *flags], capture_output=True, text=True)
        return process, target
    return run


def jsonl(records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


@pytest.mark.parametrize("name", ["train", "valid", "test"])
def test_equals_the_original(encode, shared, name):
    folder = shared / "expected/e2e"
    process, target = encode((folder / f"{name}_formatted.jsonl").read_bytes(),
                             "--add_bos", "--add_eos")
    assert process.returncode == 0, process.stderr
    assert target.read_bytes() == (folder / f"{name}.jsonl").read_bytes()


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_equals_tiktoken(encode, tiktoken_gpt2, bos, eos):
    process, target = encode(jsonl(RECORDS), *["--add_bos"] * bos, *["--add_eos"] * eos)
    assert process.returncode == 0, process.stderr
    text_ids = tiktoken_gpt2.encode_ordinary
    assert [json.loads(line) for line in target.read_text().splitlines()] == [
        {"context": text_ids(record["context"]) + [END] * bos,
         "completion": text_ids(" " + record["completion"]) + [END] * eos} for record in RECORDS]


def test_inputs_without_a_reference(encode, tiktoken_gpt2):
    """None stays none; an empty one is encoded as the original does."""
    process, target = encode(jsonl([{"context": "a b"}, {"context": "a b", "completion": ""},
                                    {"context": "a b", "completion": "c"}]), "--add_bos",
                             "--add_eos")
    assert process.returncode == 0, process.stderr
    context, ids = [*tiktoken_gpt2.encode_ordinary("a b"), END], tiktoken_gpt2.encode_ordinary
    assert [json.loads(line) for line in target.read_text().splitlines()] == [
        {"context": context}, {"context": context, "completion": [*ids(" "), END]},
        {"context": context, "completion": [*ids(" c"), END]}]
    assert process.stdout.endswith(": 3 examples; 2 of 3 inputs have no reference\n")


@pytest.mark.parametrize("data, message", [
    (None, "formatted.jsonl: no such file; make the file with src/format_converting_*.py"),
    (b"", "formatted.jsonl: the file is empty"),
    (jsonl(RECORDS) + b"{", "formatted.jsonl:3: not a JSON object"),
    (jsonl(RECORDS) + b"[]\n", "formatted.jsonl:3: not a JSON object"),
    (jsonl([{"completion": "a"}]), 'formatted.jsonl:1: no "context"; every line must have "con'),
    (jsonl([{"context": "a", "completion": None}]), 'formatted.jsonl:1: "completion" must be a t'),
    (jsonl([{"context": [1], "completion": "a"}]), 'formatted.jsonl:1: "context" must be a text'),
    (jsonl([{"context": "a", "completion": "\ud83d"}]), 'formatted.jsonl:1: "completion" must be'),
    (b'{"context": "\xe9", "completion": "a"}\n', "formatted.jsonl:1: not UTF-8"),
])
def test_mistakes_end_in_one_line(encode, data, message):
    process, target = encode(data)
    assert process.returncode == 1
    assert len(process.stderr.splitlines()) == 1 and message in process.stderr
    assert not target.exists()


def test_missing_vocabulary(encode, tmp_path):
    process, target = encode(jsonl(RECORDS), vocab=tmp_path)
    assert process.returncode == 1
    assert len(process.stderr.splitlines()) == 1
    assert f"encoder.json: no such file; run: python vocab/download_vocab.py {tmp_path}" \
        in process.stderr
    assert not target.exists()


def test_an_error_leaves_the_old_output(encode):
    _, target = encode(jsonl(RECORDS))
    old = target.read_bytes()
    process, _ = encode(jsonl(RECORDS) + b"{")
    assert process.returncode == 1
    assert target.read_bytes() == old


@pytest.mark.parametrize("flag", ["--vocab", "--input", "--output"])
def test_required_flags(root, flag):
    flags = [text for name in ("--vocab", "--input", "--output") if name != flag
             for text in (name, "x")]
    process = subprocess.run([sys.executable, root / "src/gpt2_encode.py", *flags],
                             capture_output=True, text=True)
    assert process.returncode == 2 and flag in process.stderr
