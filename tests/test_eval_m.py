"""eval/eval_m.py: compared with the original's scores, with pyter3 and with values by hand."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_main
from hypothesis import given
from hypothesis import strategies as st

import eval_m
import gpt2_decode
from metrics.bleu import bleu, bleu_nltk, words
from metrics.ter import document, ter

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="no java on the PATH")

large = pytest.mark.slow, pytest.mark.nightly
SYSTEMS = ["metrics/edge_tok", "decode/webnlg_seed_bart",
           *(pytest.param(f"decode/{name}", marks=large)
             for name in ("webnlg_bart_seen", "webnlg_bart", "dart_bart"))]


@pytest.fixture
def system(request, shared):
    """The flags that name a system's files, and what the original computes from them."""
    folder = shared / "expected" / "webnlg_dart"
    expected = json.loads((folder / "metrics" / "metrics.json").read_text())
    path = folder / request.param
    number = expected[path.name]["num_refs"]
    return (f"{path}.refs/reference", number, f"{path}.hyp"), expected[path.name]


def run_script(*args: object, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "eval" / "eval_m.py"), *map(str, args)],
        capture_output=True, encoding="utf-8", timeout=600, env={**os.environ, **env})


# Scores of the original

@pytest.mark.parametrize("system", SYSTEMS, indirect=True)
def test_bleu_and_ter_of_the_original(system):
    files, expected = system
    scores, failure = eval_m.scores_of(*eval_m.load(*files), {"bleu", "ter"})
    assert failure is None and list(scores) == ["BLEU", "BLEU NLTK", "TER"]
    assert f"{scores['BLEU']:.2f}" == f"{expected['BLEU']:.2f}"
    assert scores["BLEU NLTK"] == pytest.approx(expected["BLEU_NLTK"], abs=1e-9)
    assert scores["TER"] == pytest.approx(expected["TER"], abs=1e-9)


@pytest.mark.slow
@needs_java
@pytest.mark.parametrize("system", SYSTEMS, indirect=True)
def test_the_original_prints_the_same(system, tmp_path):
    (prefix, number, hypothesis), expected = system
    result = run_script("-R", prefix, "-H", hypothesis, "-nr", number, "-m", "ter,meteor,bleu",
                        "-lng", "en", "-who", "a set", "--json", tmp_path / "scores.json")
    assert (result.returncode, result.stdout) == (0, expected["printed"] + "\n")
    assert result.stderr.startswith(f"scoring a set: {expected['segments']} segments, ")
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert list(scores) == ["BLEU", "BLEU NLTK", "METEOR", "TER", "segments", "references"]
    assert scores["METEOR"] == pytest.approx(expected["METEOR"], abs=1e-9)
    assert round(scores["BLEU"], 2) == expected["BLEU"] != scores["BLEU"]
    assert (scores["segments"], scores["references"]) == (expected["segments"], number)


@pytest.mark.parametrize("system", SYSTEMS[:2], indirect=True)
def test_ter_of_each_segment(system, shared):
    files, _ = system
    name = Path(files[2]).stem
    path = shared / "expected" / "webnlg_dart" / "metrics" / f"{name}.ter_segments.txt"
    assert [min(ter(words(text), words(reference)) for reference in references)
            for text, references in zip(*eval_m.load(*files))] == [
                float(line) for line in path.read_text().splitlines()]


# Words

def test_words_of_tokenized_text_stand_between_blanks():
    assert words(' it can \' t be " gonna " or\tCannot . . . 3 , 048 . 5 % ( a_b ) caf\u00e9 ') == [
        "it", "can", "'", "t", "be", "``", "gon", "na", "``", "or", "Can", "not", ".", ".", ".",
        "3", ",", "048", ".", "5", "%", "(", "a_b", ")", "caf\u00e9"]
    assert words("gimme gotta lemme wanna") == ["gim", "me", "got", "ta", "lem", "me", "wan", "na"]
    assert words("") == words(" \u2003\n") == []


characters = st.sampled_from("anT \u00e9\u4e2d_1,.'\"`-&\u2019\u00ab\u2003(<%!") | st.characters()


@given(st.text(characters), st.sampled_from(["", "cannot", "GONNA", "'tis", "can't"]))
def test_words_of_any_tokenized_text(text, end):
    tokenized = gpt2_decode.post_process(f"{text} {end}", tokenize=True, lower=False)
    wanted = tokenized.replace('"', "``").replace("cannot", "can not").replace("GONNA", "GON NA")
    assert words(tokenized) == wanted.split()


def test_full_stops_inside_a_text_that_is_not_tokenized_stay():
    assert words("A pub. It's good.") == ["A", "pub.", "It", "'s", "good", "."]


# BLEU

def test_bleu_by_hand():
    # 4 of 5, 3 of 3, 2 of 2, 1 of 1 n-grams match. Of "x" the closest length is that of "".
    assert bleu(["a b c d", "x"], [["a b c d"], ["y z w", ""]]) == pytest.approx(
        100 * 0.8 ** (1 / 4))
    # 4 tokens, and 5 expected; of equally close lengths the shorter.
    assert bleu(["a b c d"], [["a b c d e"]]) == pytest.approx(100 * math.exp(1 - 5 / 4))
    assert bleu(["a b c d"], [["a b c d e", "a b c"]]) == pytest.approx(100)
    # "the" counts as often as in the richest reference, twice.
    assert bleu(["the the the cat sat on"], [["the cat sat on", "the the dog"]]) == pytest.approx(
        100 * (5 / 6 * 4 / 5 * 2 / 4 * 1 / 3) ** (1 / 4))


def test_bleu_is_not_smoothed_and_case_sensitive():
    assert bleu(["a b c x d e"], [["a b c y d e"]]) == 0
    assert bleu(["A b c d"], [["a b c d"]]) == 0
    assert bleu(["", ""], [["a"], [""]]) == bleu(["a"], [[""]]) == 0


def test_bleu_of_text_in_mteval_v13as_tokens():
    assert bleu(["it's &lt;b> 1,000.5, 20-25"], [["it's < b > 1,000.5 , 20 - 25"]]
                ) == pytest.approx(100)
    assert bleu(["it ' s a pub ."], [["it's a pub ."]]) < 100


def test_bleu_nltk_by_hand():
    # 1 of 2 words match, none of longer n-grams, which count 1/2, 1/4 and 1/8 of at least 1.
    assert bleu_nltk([["a", "x"]], [[["a", "b"]]]) == pytest.approx(
        (1 / 2 * 1 / 2 * 1 / 4 * 1 / 8) ** (1 / 4))
    assert bleu_nltk([["x"]], [[["a"]]]) == 0
    text = list("abcde")
    assert bleu_nltk([text], [[text + ["f"], []]]) == pytest.approx(math.exp(1 - 6 / 5))


def test_bleu_nltk_leaves_out_segments_without_references():
    text = list("abcd")
    assert bleu_nltk([text, ["x"]], [[text], [[], []]]) == pytest.approx(1)
    assert bleu_nltk([["x"]], [[[]]]) == bleu_nltk([[]], [[["a"]]]) == 0


texts = st.lists(st.sampled_from("abcd"), max_size=7).map(" ".join)


@given(st.lists(st.tuples(texts, st.lists(texts, min_size=1, max_size=3)), min_size=1, max_size=4))
def test_references_repeated_by_stage_5_change_no_score(segments):
    hypotheses, references = map(list, zip(*segments))
    repeated = [group + group[:1] for group in references]
    lists = [[[text.split() for text in group] for group in kind] for kind in (
        references, repeated)]
    assert bleu(hypotheses, references) == bleu(hypotheses, repeated)
    hypotheses = [text.split() for text in hypotheses]
    assert bleu_nltk(hypotheses, lists[0]) == bleu_nltk(hypotheses, lists[1])
    assert document(hypotheses, lists[0]) == document(hypotheses, lists[1])


# TER

def test_ter_by_hand():
    assert ter("a b c".split(), "a b c".split()) == 0
    assert ter("c d e a b".split(), "a b c d e".split()) == 1 / 5  # one move
    assert ter("a x c d".split(), "a b c".split()) == 2 / 3
    assert ter([], ["a", "b"]) == ter([], []) == ter(["a"], []) == 1
    assert ter(["x"] * 5, ["a"]) == 5  # not at most 1


def test_ter_of_a_document_is_the_mean_of_the_best():
    assert document([["a"], ["b", "c"]], [[["x"], ["a"]], [["b", "x"]]]) == (0 + 1 / 2) / 2


some_words = st.lists(st.sampled_from(["a", "b", "c", "ab", "\u00e9", "\U0001f600", "z"]),
                      max_size=12)


@given(some_words, some_words.filter(bool))
def test_ter_is_pyters(hypothesis, reference):
    pyter = pytest.importorskip("pyter")
    assert ter(hypothesis, reference) == pyter.ter(hypothesis, reference)


# The script

@pytest.fixture
def files(tmp_path, monkeypatch):
    """Flags for three files of two lines in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("ref0").write_text("a pub by the river\nit ' s good\n")
    Path("ref1").write_text("a pub by the river\nit is good\n")
    Path("hyp").write_text("a pub near the river\nit is good\n")
    return ["-R", "ref", "-H", "hyp", "-nr", "2"]


def test_only_the_scores_asked_for(files):
    result = run_script(*files, "-m", "TER,bleu")
    assert result.stdout == ("  BLEU    BLEU NLTK    TER\n------  -----------  -----\n"
                             "     0         0.39    0.1\n")
    assert result.stderr == "scoring hyp: 2 segments, 2 references each ...\n"
    assert run_script(*files, "-m", "ter").stdout == "  TER\n-----\n  0.1\n"


def test_the_last_line_ends_with_or_without_a_line_break(files):
    expected = eval_m.load("ref", 2, "hyp")
    assert len(expected[0]) == 2 and [len(group) for group in expected[1]] == [1, 2]
    for path in ("ref0", "ref1", "hyp"):
        Path(path).write_bytes(Path(path).read_bytes().rstrip(b"\n").replace(b"\n", b"\r\n"))
    assert eval_m.load("ref", 2, "hyp") == expected
    Path("hyp").write_text("\n\n")  # two empty predictions
    assert eval_m.load("ref", 2, "hyp")[0] == ["", ""]


@pytest.mark.parametrize("java, said", [
    (None, "no java on the PATH"),
    ("#!/bin/sh\necho 'Error: no memory' >&2\nexit 1\n", "METEOR failed in Java (Error: no mem"),
])
def test_the_other_scores_where_meteor_fails(files, java, said):
    if java:
        Path("java").write_text(java)
        Path("java").chmod(0o755)
    result = run_script(*files, "--json", "out.json", PATH=os.getcwd())
    assert result.returncode == 1
    assert result.stdout == ("  BLEU    BLEU NLTK    METEOR    TER\n"
                             "------  -----------  --------  -----\n"
                             "     0         0.39   missing    0.1\n")
    assert len(result.stderr.splitlines()) == 2 and f"\nerror: {said}" in result.stderr
    scores = json.loads(Path("out.json").read_text())
    assert scores["METEOR"] is None and scores["TER"] == pytest.approx(0.1)


@pytest.mark.parametrize("path, text, said", [
    ("hyp", None, ["hyp: no such file"]),
    ("hyp", "", ["hyp: the file is empty"]),
    ("hyp", "a\n", ["ref0: 2 lines", "hyp has 1"]),
    ("ref1", "a\nb\n\n", ["ref1: 3 lines", "hyp has 2"]),
    ("ref1", "", ["ref1: 0 lines", "hyp has 2"]),
    ("ref1", None, ["ref1: no such file", "-nr", "ref0 to ref1"]),
    ("ref1", "\ud800", ["ref1:1: not UTF-8"]),
])
def test_wrong_files_end_in_one_line(files, path, text, said):
    Path(path).unlink()
    if text is not None:
        Path(path).write_bytes(text.encode("utf-8", "surrogatepass"))
    code, errors = run_main(eval_m.main, [*files, "--json", "out.json"])
    assert code == 1 and len(errors.splitlines()) == 1 and all(word in errors for word in said)
    assert not Path("out.json").exists()


@pytest.mark.parametrize("flags, said", [
    (["-m", "bleu,bert"], "no metric 'bert'; there are bleu, meteor, ter"),
    (["-m", ""], "no metric ''"),
    (["-lng", "ru"], "-lng"), (["-nr", "0"], "-nr"), (["-nr", "x"], "-nr"),
])
def test_wrong_flags(files, flags, said):
    code, errors = run_main(eval_m.main, [*files, *flags])
    assert code == 2 and len(errors.splitlines()) == 1 and said in errors


def test_the_scores_cannot_be_written(files):
    code, errors = run_main(eval_m.main, [*files, "-m", "ter", "--json", "hyp/out.json"])
    assert code == 1 and errors.splitlines()[-1].startswith("error: hyp/out.json: ")


def test_help_loads_nothing_slow():
    code = ("import sys, eval_m; print([name for name in ('numpy', 'nltk', 'sacrebleu') "
            "if name in sys.modules])")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8",
                            cwd=ROOT / "eval", check=True)
    assert result.stdout == "[]\n"
    assert "-nr" in run_script("--help").stdout
