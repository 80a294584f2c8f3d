"""The demo's corpora: reproducible bytes, correct facts, and test places in no other file."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from encoder import get_encoder

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("base_train", "base_valid", "train", "valid", "test")
FAMILY_FRIENDLY = {"yes": "Families are welcome.", "no": "It is for adults only."}


def generate(folder: Path, *flags: str, hash_seed: str = "0") -> dict[str, bytes]:
    subprocess.run([sys.executable, ROOT / "data/demo/generate.py", folder, *flags], check=True,
                   env={**os.environ, "PYTHONHASHSEED": hash_seed})
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    return generate(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def corpora(files) -> dict[str, list[tuple[str, str]]]:
    records = {name: [json.loads(line) for line in files[f"{name}_formatted.jsonl"].splitlines()]
               for name in NAMES}
    assert all(set(record) == {"context", "completion"} for record in sum(records.values(), []))
    return {name: [(record["context"], record["completion"]) for record in lines]
            for name, lines in records.items()}


def notation(text: str) -> str:
    return ("record" if text.startswith("name : ") else
            "card" if text.startswith("Card : ") else "prose")


def facts(text: str) -> set[str]:
    """The values of a record or a card."""
    values = text.removeprefix("Card : ").split(" ; ")
    if notation(text) == "record":
        values = [part.split(" : ")[1] for part in text.split(" | ")]
    return set(values)


def told(prose: str, vocabulary: set[str]) -> set[str]:
    """The values of ``vocabulary`` in a prose text, each of which may occur only once."""
    values = {value for value in vocabulary if value in prose}
    assert all(prose.count(value) == 1 for value in values), prose
    return values | {value for value, phrase in FAMILY_FRIENDLY.items() if phrase in prose}


def test_same_bytes_whatever_the_python(files, tmp_path):
    assert sorted(files) == sorted(f"{name}_formatted.jsonl" for name in NAMES)
    assert generate(tmp_path / "again", hash_seed="7") == files
    assert generate(tmp_path / "other", "--seed", "1") != files
    # Every supported Python gives this digest; update it when the generator changes.
    digest = hashlib.sha256(b"".join(files[name] for name in sorted(files))).hexdigest()
    assert digest == "32eb28be6ac5321ec1364d158d961b985e397b7dd3a1028192115fcd90370421"


def test_base_never_sees_a_record_told_in_prose(corpora):
    families = [(notation(context), notation(completion))
                for context, completion in corpora["base_train"] + corpora["base_valid"]]
    assert set(families) == {("record", "card"), ("card", "prose"), ("prose", "prose"),
                             ("prose", "record")}
    for name in ("train", "valid", "test"):
        assert {(notation(context), notation(completion))
                for context, completion in corpora[name]} == {("record", "prose")}


def test_completions_tell_the_facts_of_their_contexts(corpora):
    pairs = sum(corpora.values(), [])
    records = [context for context, _ in pairs if notation(context) == "record"]
    vocabulary = set().union(*map(facts, records)) - set(FAMILY_FRIENDLY)
    for pair in pairs:
        left, right = (told(text, vocabulary) if notation(text) == "prose" else facts(text)
                       for text in pair)
        assert left == right and len(left) >= 4, pair
        assert not set("[]{}") & set("".join(pair)), pair


def test_places_of_test_are_in_no_other_file(corpora):
    """Places are compared as sets of facts, so the notation does not matter."""
    records = {context for name in ("train", "valid") for context, _ in corpora[name]}
    tests = {context for context, _ in corpora["test"]}
    vocabulary = set().union(*map(facts, records)) - set(FAMILY_FRIENDLY)
    others = {frozenset(told(context, vocabulary) if notation(context) == "prose" else
                        facts(context))
              for name in NAMES if name != "test" for context, _ in corpora[name]}
    assert others.isdisjoint(map(frozenset, map(facts, tests)))


def test_each_test_place_has_adjacent_distinct_references(corpora):
    groups = [(context, [completion for _, completion in group])
              for context, group in itertools.groupby(corpora["test"], key=lambda pair: pair[0])]
    assert len(groups) == len({context for context, _ in groups}) <= 60
    assert all(len(set(references)) == len(references) >= 3 for _, references in groups)


def test_sequences_fit_the_demo(corpora, vocab):
    """Context and completion, with their end tokens, fit in seq_len 64 and eval_len 32."""
    bpe = get_encoder(vocab)
    for context, completion in sum(corpora.values(), []):
        assert len(bpe.encode(context)) + 1 <= 32, context
        assert len(bpe.encode(f" {completion}")) + 1 <= 32, completion
