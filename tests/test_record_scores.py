"""The table results.csv that work.sh leaves in a work dir."""

from __future__ import annotations

import csv
import json
import re

import pytest
from conftest import run_main

import record_scores

SCORES = "SCORES:\n=====\nBLEU: 0.5\nNIST: 6.25\nMETEOR: 0.4\nROUGE_L: 0.6\nCIDEr: 3.1\n\n"


@pytest.fixture
def folder(tmp_path):
    """A work dir as the stages leave it, whose path needs quotes in the table."""
    folder = tmp_path / "a, \"b\" 数据"
    folder.mkdir()
    (folder / "finished.json").write_text(json.dumps({
        "checkpoint": "model.1050.pt", "sha256": "0", "settings": {
            "model_card": "gpt2.sm", "lora_dim": 4, "lora_alpha": 32, "random_seed": 2025}}))
    (folder / "scores.txt").write_text(SCORES)
    (folder / "predict.jsonl.state").write_text('{"settings": {}, "samples_per_s": 1.25}\n')
    return folder


def record(folder, *scores):
    return run_main(record_scores.main, [folder, folder, "predict.jsonl",
                                         *(scores or ["scores.txt"])])


def rows(folder):
    with open(folder / "results.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_one_line_a_run_below_one_heading(folder):
    assert record(folder) == (0, "")
    (folder / "predict.jsonl.state").write_text('{"settings": {}}\n')  # an older search
    (folder / "scores.txt").write_text(SCORES.replace("0.4", "missing"))
    assert record(folder) == (0, "")
    first, second = rows(folder)
    assert list(first) == ["date", "data", "card", "rank", "alpha", "seed", "steps", "BLEU", "NIST",
                           "METEOR", "ROUGE_L", "CIDEr", "samples_per_s", "commit"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d", first.pop("date"))
    assert first.pop("commit") == record_scores.commit()
    assert first == {
        "data": str(folder), "card": "gpt2.sm", "rank": "4", "alpha": "32", "seed": "2025",
        "steps": "1050", "BLEU": "0.5", "NIST": "6.25", "METEOR": "0.4", "ROUGE_L": "0.6",
        "CIDEr": "3.1", "samples_per_s": "1.25"}
    assert second["METEOR"] == second["samples_per_s"] == "" and second["CIDEr"] == "3.1"


def test_columns_are_those_of_the_files_of_scores(folder):
    """WebNLG has three files; a score that is missing keeps its column."""
    for name, meteor in (("scores", 0.38), ("scores.seen", None), ("scores.unseen", 0.25)):
        (folder / f"{name}.json").write_text(json.dumps({
            "BLEU": 38.12470849381305, "BLEU NLTK": 0.5, "METEOR": meteor, "TER": 1, "segments": 9,
            "references": 6}))
    files = "scores.json", "scores.seen.json", "scores.unseen.json"
    assert record(folder, *files) == record(folder, *files) == (0, "")
    first, second = rows(folder)
    assert list(first)[7:-2] == [
        f"{name}{part}" for part in ("", " seen", " unseen")
        for name in ("BLEU", "BLEU NLTK", "METEOR", "TER")]
    assert list(first.values())[7:-2] == list(second.values())[7:-2] == [
        "38.12470849381305", "0.5", "0.38", "1", "38.12470849381305", "0.5", "", "1",
        "38.12470849381305", "0.5", "0.25", "1"]


@pytest.mark.parametrize("text, said", [
    ("{}", 'scores.b.json:1: no "segments"'), ("BLEU: 1\n", "scores.b.json:1: not a JSON"),
    ('{"segments": 1, "references": 1}', "scores.b.json: no scores"),
    ('{"BLEU": [1], "segments": 1, "references": 1}', "scores.b.json: no scores"),
    (None, "scores.b.json: no such file"),
])
def test_damaged_json(folder, text, said):
    if text is not None:
        (folder / "scores.b.json").write_text(text)
    code, errors = record(folder, "scores.txt", "scores.b.json")
    assert code == 1 and len(errors.splitlines()) == 1 and said in errors
    assert not (folder / "results.csv").exists()


def test_two_files_with_the_same_columns(folder):
    (folder / "more.txt").write_text(SCORES)
    code, errors = record(folder, "scores.txt", "more.txt")
    assert code == 1 and "more.txt: scores with the names of others" in errors


def test_the_commit_is_that_of_this_clone(root, monkeypatch, tmp_path):
    if (root / ".git").exists():
        assert re.fullmatch(r"[0-9a-f]{12,40}(-dirty)?", record_scores.commit())
    monkeypatch.setattr(record_scores, "ROOT", root / "src")  # lies in a repository, is none
    assert record_scores.commit() == ""
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    assert record_scores.commit() == ""


def test_a_table_that_was_edited_is_continued(folder):
    record(folder)
    table = folder / "results.csv"
    edited = "\ufeff" + table.read_text().rstrip("\n").replace("\n", "\r\n")
    table.write_bytes(edited.encode())
    assert record(folder) == (0, "")
    assert table.read_bytes().startswith(edited.encode() + b"\n") and len(rows(folder)) == 2


@pytest.mark.parametrize("file, text, said", [
    ("results.csv", "date;data\n", "results.csv:1: other columns"),
    ("finished.json", "{", "finished.json:1: "), ("finished.json", "{}", "finished.json:1: "),
    ("finished.json", '{"checkpoint": "model.7.pt", "settings": []}', "finished.json: not as"),
    ("finished.json", '{"checkpoint": "model.pt", "settings": {}}', "finished.json: not as"),
    ("finished.json", None, "finished.json: no such file"),
    ("scores.txt", "", "scores.txt: no scores"), ("scores.txt", None, "scores.txt: no such file"),
    ("predict.jsonl.state", "[]", "predict.jsonl.state:1: "),
])
def test_damaged_files(folder, file, text, said):
    record(folder)
    if text is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(text)
    before = (folder / "results.csv").read_bytes()
    code, errors = record(folder)
    assert code == 1 and len(errors.splitlines()) == 1 and said in errors
    assert (folder / "results.csv").read_bytes() == before
