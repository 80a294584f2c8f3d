"""Damaged input to every stage: it succeeds or prints one error line; no output is incomplete.

In CI, each test uses the same 40 to 200 damaged files in every run. ``FUZZ_EXAMPLES=10000 bash
run_tests.sh tests/test_fuzz.py`` uses that many new random ones in each test.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import run_main
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime import torch_file
from runtime.errors import InputError

NIGHTLY = int(os.environ.get("FUZZ_EXAMPLES", 0))
PIECES = [b"", b"{", b"}", b"[", b"]", b'"', b":", b",", b"\n", b"\r\n", b"\n\n", b"\t", b"||",
          b"\\", b"\\ud800", b"\\u0000", b"\0", b"\xff", b"\xc3", b"\xef\xbb\xbf", b" ", b"-1",
          b"|", b"1.5", b"1e999", b"NaN", b"null", b"true", b"50256", b"50257", b"9" * 30,
          b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b'"context"', b'"id"',
          b"PK\x03\x04", b"\x80\x02", b"}R."]


def fuzz(*strategies, examples: int):
    """``given`` with this run's number of examples; in CI they are the same in every run."""
    def decorate(test):
        return settings(max_examples=NIGHTLY or examples, deadline=None, database=None,
                        derandomize=not NIGHTLY,
                        suppress_health_check=list(HealthCheck))(given(*strategies)(test))
    return decorate


@st.composite
def damage(draw):
    """A function of bytes that damages them in one to four places."""
    places = draw(st.lists(st.tuples(
        st.sampled_from(["cut", "drop", "double", "insert", "change"]),
        st.integers(0, 1000), st.integers(1, 40), st.sampled_from(PIECES), st.integers(0, 255)),
        min_size=1, max_size=4))

    def apply(data: bytes) -> bytes:
        for what, where, length, piece, byte in places:
            at = where * len(data) // 1000
            data = {"cut": data[:at],
                    "drop": data[:at] + data[at + length:],
                    "double": data[:at] + data[at:at + length] * 2 + data[at + length:],
                    "insert": data[:at] + piece + data[at:],
                    "change": data[:at] + bytes([byte]) * (at < len(data)) + data[at + 1:]}[what]
        return data

    return apply


class Stage:
    """Runs a script's ``main`` in this process, as a shell would."""

    def __init__(self, module: str, folder: Path, files: dict[str, bytes], flags: list,
                 outputs: list[str]):
        self.main = importlib.import_module(module).main
        self.folder, self.files, self.flags, self.outputs = folder, files, flags, outputs

    def __call__(self, name: str, data: bytes) -> int:
        """Runs it with ``data`` as the file ``name``; checks the outputs, returns the exit code."""
        for path in self.folder.iterdir():
            if path.is_file():
                path.unlink()
        for other, content in {**self.files, name: data}.items():
            (self.folder / other).write_bytes(content)
        for output in self.outputs:
            (self.folder / output).write_bytes(b"old")
        before = {path.name for path in self.folder.iterdir()}
        code, said = run_main(self.main, self.flags)
        assert code in (0, 1), said
        lines = said.splitlines()
        assert code == 0 or (len(lines) == 1 and lines[0].startswith("error: ")), said
        after = {path.name: path for path in self.folder.iterdir()}
        assert code == 0 or after.keys() == before
        for output in self.outputs:
            assert (after[output].read_bytes() == b"old") == (code != 0)
        assert not [part for part in after if part.endswith(".part")]
        return code


def jsonl(*records) -> bytes:
    return "".join(f"{json.dumps(record)}\n" for record in records).encode()


FORMATTED = jsonl({"context": "name : Ivory Swan", "completion": "Ivory Swan is a pub ."},
                  {"context": "name : Blue Lamp", "completion": "Blue Lamp , a tea room ."})
ENCODED = jsonl({"context": [3, 5, 7, 96], "completion": [11, 13, 17, 96]},
                {"context": [2, 4, 96], "completion": [8, 16, 32, 64, 96]})


RAW = {
    "e2e": "name : Ivory Swan||Ivory Swan is a pub .\nname : Caf\u00e9||The caf\u00e9 .\n",
    "webnlg": json.dumps({"entries": [{"1": {
        "category": "Airport", "modifiedtripleset": [{"subject": "A", "property": "p",
                                                      "object": "B"}],
        "lexicalisations": [{"lex": "A .", "comment": "good"}]}}]}, indent=1),
    "dart": json.dumps([{"tripleset": [["A", "P", "B"]], "annotations": [{"text": "A ."}]}])}


@pytest.fixture(scope="module", params=RAW)
def convert(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("convert")
    return Stage(f"format_converting_{request.param}", folder,
                 {"in.txt": RAW[request.param].encode()},
                 [folder / "in.txt", folder / "out.jsonl", "--fraction", "1"], ["out.jsonl"])


@pytest.fixture(scope="module")
def encode(tmp_path_factory, vocab):
    folder = tmp_path_factory.mktemp("encode")
    once = importlib.import_module("encoder").get_encoder(vocab)
    module = importlib.import_module("gpt2_encode")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "get_encoder", lambda _: once)  # reading the vocabulary is slow
        yield Stage("gpt2_encode", folder, {"in.jsonl": FORMATTED},
                    ["--vocab", vocab, "--input", folder / "in.jsonl", "--output",
                     folder / "out.jsonl", "--add_bos", "--add_eos"], ["out.jsonl"])


@pytest.fixture(scope="module")
def decode(tmp_path_factory, vocab):
    folder = tmp_path_factory.mktemp("decode")
    once = importlib.import_module("encoder").get_encoder(vocab)
    module = importlib.import_module("gpt2_decode")
    files = {"in.jsonl": FORMATTED, "keys": b"4\n7\n",
             "predict.jsonl": jsonl({"id": 0, "predict": [318, 257, 50256, 0]},
                                    {"id": 1, "predict": [4518, 628, 1, 0]})}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "get_encoder", lambda _: once)
        yield Stage("gpt2_decode", folder, files,
                    ["--vocab", vocab, "--sample_file", folder / "predict.jsonl", "--input_file",
                     folder / "in.jsonl", "--ref_unique_file", folder / "keys",
                     "--output_ref_file", folder / "ref.txt", "--output_pred_file",
                     folder / "pred.txt"], ["ref.txt", "pred.txt"])


@pytest.fixture(scope="module")
def score(tmp_path_factory):
    folder = tmp_path_factory.mktemp("score")
    coco = importlib.import_module("metrics.coco")
    files = {"ref.txt": b"A pub .\nThe pub .\n\nA tea room .\n", "pred.txt": b"A pub\nTea room .\n",
             "pred.tsv": b'source\toutput\nswan\t"A pub"\nlamp\tTea room .\n',
             "ref.csv": b"mr,ref\nswan,A pub .\nswan,The pub .\nlamp,A tea room .\n"}
    with pytest.MonkeyPatch.context() as patch:  # its Java programs take seconds
        patch.setattr(coco, "require", lambda: None)
        patch.setattr(coco, "scores", lambda references, predictions: {
            name: (0.0, [0.0] * len(predictions)) for name in ("METEOR", "ROUGE_L", "CIDEr")})
        yield {name: Stage("measure_scores", folder, files,
                           [folder / reference, folder / prediction, "-l", folder / "scores.tsv"],
                           ["scores.tsv"])
               for reference, prediction in (("ref.txt", "pred.txt"), ("ref.csv", "pred.tsv"))
               for name in (reference, prediction)}


@pytest.fixture(scope="module")
def score_webnlg(tmp_path_factory):
    folder = tmp_path_factory.mktemp("score_webnlg")
    coco = importlib.import_module("metrics.coco")
    files = {"ref0": b"a pub .\na tea room .\n", "ref1": b"the pub .\na tea room .\n",
             "hyp": b"a pub\ntea room . a\n"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coco, "require", lambda: None)
        patch.setattr(coco, "meteor", lambda references, predictions, _: (0.0, []))
        yield Stage("eval_m", folder, files,
                    ["-R", folder / "ref", "-nr", 2, "-H", folder / "hyp", "--json",
                     folder / "scores.json"], ["scores.json"])


@fuzz(damage(), examples=60)
def test_convert(convert, damaged):
    convert("in.txt", damaged(convert.files["in.txt"]))


@fuzz(damage(), examples=60)
def test_encode(encode, damaged):
    encode("in.jsonl", damaged(FORMATTED))


@fuzz(damage(), st.sampled_from(["in.jsonl", "keys", "predict.jsonl"]), examples=60)
def test_decode(decode, damaged, name):
    decode(name, damaged(decode.files[name]))


@fuzz(damage(), st.sampled_from(["ref.txt", "pred.txt", "pred.tsv", "ref.csv"]), examples=60)
def test_score(score, damaged, name):
    score[name](name, damaged(score[name].files[name]))


@fuzz(damage(), st.sampled_from(["ref0", "ref1", "hyp"]), examples=60)
def test_score_webnlg(score_webnlg, damaged, name):
    score_webnlg(name, damaged(score_webnlg.files[name]))


def checkpoints(folder: Path) -> dict[str, bytes]:
    """A small file of each format, as bytes by name."""
    import safetensors.numpy

    arrays = {f"layer.{i}.weight": np.arange(6 * i, dtype=np.float32).reshape(i, 6)
              for i in range(3)}
    torch_file.save(folder / "m.pt", {"model_state_dict": arrays})
    with zipfile.ZipFile(folder / "m.pt") as archive:
        structure = archive.read("m/data.pkl")
    legacy = b"".join(pickle.dumps(part, 2) for part in (
        torch_file.LEGACY_MAGIC, 1001, {"little_endian": True})) + structure
    legacy += pickle.dumps([str(i) for i in range(3)], 2) + b"".join(
        array.size.to_bytes(8, "little") + array.tobytes() for array in arrays.values())
    jittors = pickle.dumps({"model_state_dict": arrays, "losses": [0.5]}, 4)
    return {"m.pkl": jittors + hashlib.sha1(jittors).digest() + torch_file.JITTOR_MAGIC,
            "plain.pkl": jittors, "m.pt": (folder / "m.pt").read_bytes(), "legacy.bin": legacy,
            "m.safetensors": safetensors.numpy.save(arrays)}


@pytest.fixture(scope="module")
def weight_files(tmp_path_factory, jittor):
    folder = tmp_path_factory.mktemp("weights")
    return folder, checkpoints(folder), importlib.import_module("checkpoint")


@fuzz(damage(), st.sampled_from(["m.pt", "legacy.bin", "m.safetensors", "m.pkl", "plain.pkl"]),
      examples=300)
def test_weights(weight_files, damaged, name):
    folder, files, checkpoint = weight_files
    (folder / name).write_bytes(damaged(files[name]))
    try:
        weights = checkpoint.read_weights(folder / name)
    except InputError as error:
        assert str(error).startswith(f"{folder / name}: ") and str(error).isprintable()
    else:
        assert all(array.dtype == np.float32 and array.nbytes < 10_000
                   for array in weights.values())


@fuzz(damage(), st.sampled_from(["config.json", "model.safetensors.index.json", "about.pt"]),
      examples=200)
def test_what_stands_beside_weights(weight_files, damaged, name):
    """A folder with an index, its config.json, and what a checkpoint says about itself."""
    import about
    from config import MODEL_CARDS, LoRAConfig

    folder, files, checkpoint = weight_files
    (folder / "shards").mkdir(exist_ok=True)
    (folder / "shards/m.safetensors").write_bytes(files["m.safetensors"])
    entry = about.describe(MODEL_CARDS["gpt2.sm"], LoRAConfig(4, 32), "e2e", 7)
    torch_file.save(folder / "about.pt", {"about": entry})
    beside = {"config.json": b'{"n_layer": 2, "n_embd": 8, "n_head": 2, "n_inner": null}',
              "model.safetensors.index.json": b'{"weight_map": {"wte.weight": "m.safetensors"}}',
              "about.pt": (folder / "about.pt").read_bytes()}
    beside[name] = damaged(beside[name])
    for other, content in beside.items():
        (folder / "shards" / other).write_bytes(content)
    for read, path in ((about.read, folder / "shards"), (about.read, folder / "shards/about.pt"),
                       (checkpoint.read_weights, folder / "shards")):
        try:
            read(path)
        except InputError as error:
            assert str(error).startswith(f"{folder}/shards/") and str(error).isprintable()


@pytest.fixture(scope="module")
def train(tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("train")
    flags = ["--train_data", folder / "train.jsonl", "--valid_data", folder / "valid.jsonl",
             "--train_batch_size", 1, "--valid_batch_size", 1, "--seq_len", 12, "--model_card",
             "gpt2.nano", "--max_step", 4, "--eval_interval", 2, "--state_interval", 1,
             "--log_interval", 1, "--lr", 0.01, "--work_dir", folder / "out"]
    (folder / "train.jsonl").write_bytes(ENCODED)
    (folder / "valid.jsonl").write_bytes(ENCODED)
    assert run_main(importlib.import_module("gpt2_ft").main, [*flags, "--lora_dim", 0])[0] == 0
    base = (folder / "out" / "model.4.pt").read_bytes()
    files = {"train.jsonl": ENCODED, "valid.jsonl": ENCODED, "base.pt": base}
    return folder, files, [*flags, "--lora_dim", 2, "--init_checkpoint", folder / "base.pt"]


def clear(folder: Path) -> None:
    for path in folder.iterdir() if folder.is_dir() else ():
        path.unlink()
    if folder.is_dir():
        folder.rmdir()


@fuzz(damage(), st.sampled_from(["train.jsonl", "valid.jsonl", "base.pt"]), examples=60)
def test_train(train, damaged, name):
    folder, files, flags = train
    clear(folder / "out")
    for other, content in {**files, name: damaged(files[name])}.items():
        (folder / other).write_bytes(content)
    code, said = run_main(importlib.import_module("gpt2_ft").main, flags)
    assert code in (0, 1)
    if code == 0:
        assert (folder / "out" / "model.4.pt").is_file()
    else:
        assert said.startswith("error: ") and len(said.splitlines()) == 1, said
        diverged = "--lr" in said  # training diverges if a damaged weight is huge
        assert diverged or not (folder / "out").exists()


@pytest.mark.slow
@fuzz(damage(), st.sampled_from(["resume.2.pt", "train.log", "metrics.csv"]), examples=40)
def test_resume(train, damaged, name):
    folder, files, flags = train
    trainer = importlib.import_module("trainer")
    clear(folder / "out")
    for other, content in files.items():
        (folder / other).write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.checkpoint, "save_model", broken)
        assert run_main(importlib.import_module("gpt2_ft").main, flags)[0] == 1
    (folder / "out" / "resume.3.pt").unlink()
    path = folder / "out" / name
    path.write_bytes(damaged(path.read_bytes()))
    code, said = run_main(importlib.import_module("gpt2_ft").main, [*flags, "--resume"])
    assert code in (0, 1)
    if code == 0:
        assert (folder / "out" / "model.4.pt").is_file()
    else:
        assert said.startswith("error: ") and len(said.splitlines()) == 1, said


def broken(*_):
    raise InputError("broken off")


@pytest.fixture(scope="module")
def beam(train):
    folder, files, _ = train
    files = {"test.jsonl": ENCODED, "base.pt": files["base.pt"]}
    return Stage("gpt2_beam", folder, files,
                 ["--data", folder / "test.jsonl", "--batch_size", 2, "--seq_len", 12, "--eval_len",
                  4, "--model_card", "gpt2.nano", "--init_checkpoint", folder / "base.pt",
                  "--beam", 2, "--work_dir", folder, "--output_file", "out.jsonl"], ["out.jsonl"])


@pytest.fixture(scope="module")
def generate(train, tmp_path_factory):
    """With a vocabulary of bytes: those of the contexts below are among the 97 tokens."""
    encoder = importlib.import_module("encoder")
    tokens = [*sorted(encoder.byte_symbols()), encoder.END_OF_TEXT]
    of_bytes = encoder.Encoder({token: i for i, token in enumerate(tokens)}, [])
    of_bytes.end_of_text = 96
    folder, module = tmp_path_factory.mktemp("generate"), importlib.import_module("gpt2_generate")
    files = {"in.txt": b"NAME:SWAN\nX\n", "in.jsonl": jsonl({"context": "A"}, {"context": "B"}),
             "base.pt": train[1]["base.pt"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "get_encoder", lambda _: of_bytes)
        stages = {name: Stage("gpt2_generate", folder, files, [
            "--input", folder / name, "--seq_len", 12, "--eval_len", 4, "--model_card",
            "gpt2.nano", "--init_checkpoint", folder / "base.pt"], [])
                  for name in ("in.txt", "in.jsonl")}
        assert all(stage(name, files[name]) == 0 for name, stage in stages.items())
        yield stages


@fuzz(damage(), st.sampled_from(["in.txt", "in.jsonl"]), examples=40)
def test_generate(generate, damaged, name):
    generate[name](name, damaged(generate[name].files[name]))


@fuzz(damage(), st.sampled_from(["test.jsonl", "base.pt"]), examples=40)
def test_beam(beam, damaged, name):
    beam(name, damaged(beam.files[name]))
