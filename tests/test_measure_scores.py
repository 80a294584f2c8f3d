"""E2E's scores, compared with values computed by hand, NLTK and the challenge's scores."""

from __future__ import annotations

import math
import os
import random
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nltk.translate.bleu_score import SmoothingFunction, corpus_bleu
from nltk.translate.nist_score import corpus_nist

import challenge_files
import measure_scores
from metrics import coco
from metrics.mteval import Bleu, Nist, tokenize
from runtime.errors import InputError

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("E2E_SHARED", Path(__file__).parents[2] / "shared"))
EXPECTED = SHARED / "expected" / "metrics"

needs_expected = pytest.mark.skipif(not EXPECTED.is_dir(), reason=f"no {EXPECTED}")
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="no java on the PATH")


def run_script(*args: object, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "eval" / "e2e" / "measure_scores.py"), *map(str, args)],
        capture_output=True, encoding="utf-8", timeout=300,
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **env})


def score(metric, *segments):
    """The score of (prediction, references) pairs."""
    for prediction, references in segments:
        metric.add(prediction, references)
    return metric.score()


# BLEU and NIST

def test_tokenize():
    assert tokenize("Costs £20-25, 1,000.5; don't (it's) &amp; <skipped>3.") == [
        "costs", "£20", "-", "25", ",", "1,000.5", ";", "don't", "(", "it's", ")", "&", "3", "."]
    assert tokenize("a\tb\u00a0|||C") == ["a", "b", "|", "|", "|", "c"]
    assert tokenize(" ") == [""]
    assert tokenize(" ", v13a=True) == []
    assert tokenize("\u00c9 A\x1cb\u2028C", v13a=True) == ["\u00c9", "a\x1cb", "c"]


def test_bleu_by_hand():
    # "the" counts twice at most (second reference), "the the" once, "the cat" once.
    segment = ("the the the cat", ["the cat sat down", "the the dog ran"])
    assert score(Bleu(max_n=1), segment) == pytest.approx(3 / 4)
    assert score(Bleu(max_n=2), segment) == pytest.approx(math.sqrt(3 / 4 * 2 / 3))
    assert score(Bleu(max_n=2, smoothing=1), segment) == pytest.approx(math.sqrt(4 / 5 * 3 / 4))
    assert score(Bleu(), segment) < 1e-3  # no trigram matches


def test_bleu_of_a_document_adds_up_counts():
    # 4 of 4 and 1 of 2 unigrams match: 5 of 6, which is not the mean of the segments' scores.
    assert score(Bleu(max_n=1), ("A b c d", ["a b c d"]), ("a x", ["a b"])) == pytest.approx(5 / 6)


def test_bleu_takes_the_closest_reference_length_and_of_two_the_shorter():
    assert score(Bleu(max_n=1), ("a b c d", ["a b c d e", "a b c"])) == 1
    assert score(Bleu(max_n=1), ("a b c d", ["a b c d e", "a"])) == pytest.approx(math.exp(-1 / 4))


def test_nist_by_hand():
    # "a" is 2 of 4 tokens (1 bit), "b" is 1 of 4 (2 bits); "b" follows "a" in 1 of 2 cases (1 bit).
    assert score(Nist(max_n=2), ("a b", ["a b", "a c"])) == pytest.approx((1 + 2) / 2 + 1 / 1)


def test_nist_penalty_is_a_half_at_two_thirds_of_the_mean_reference_length():
    # The references have 2 and 4 tokens, the prediction has 2; "a" and "b" are 2 of 6 tokens each.
    assert score(Nist(max_n=1), ("a b", ["a b", "a b c d"])) == pytest.approx(math.log2(3) / 2)


def random_document(same_length: bool) -> tuple[list[list[str]], list[list[str]]]:
    rng = random.Random(7)
    lengths = [(n, n if same_length else rng.randint(4, 12)) for n in range(4, 24)]
    return tuple([[rng.choice("abcde") for _ in range(pair[side])] for pair in lengths]
                 for side in (0, 1))


def test_bleu_is_nltks_where_every_count_is_positive():
    references, predictions = random_document(same_length=False)
    ours = score(Bleu(), *((" ".join(prediction), [" ".join(reference)])
                           for prediction, reference in zip(predictions, references)))
    assert ours == pytest.approx(corpus_bleu([[r] for r in references], predictions), rel=1e-12)
    assert 0.01 < ours < 0.9


def test_nist_is_nltks_where_no_length_penalty_applies():
    references, predictions = random_document(same_length=True)
    ours = score(Nist(max_n=4), *((" ".join(prediction), [" ".join(reference)])
                                  for prediction, reference in zip(predictions, references)))
    assert ours == pytest.approx(corpus_nist([[r] for r in references], predictions, n=4),
                                 rel=1e-12)


def test_v13a_without_a_match_of_n_grams_is_nltks_geometric_smoothing():
    rng = random.Random(5)
    for _ in range(50):
        words = [[rng.choice("abcdefgh") for _ in range(rng.randint(4, 7))] for _ in range(9)]
        references, predictions = [words[:2], words[2:5], words[5:6]], words[6:]
        ours = score(Bleu(v13a=True), *((" ".join(prediction), [" ".join(one) for one in group])
                                        for prediction, group in zip(predictions, references)))
        theirs = corpus_bleu(references, predictions,
                             smoothing_function=SmoothingFunction().method3)
        assert ours == pytest.approx(theirs, rel=1e-12)


def test_v13a_of_short_and_empty_predictions_by_hand():
    # The 4 tokens of the first match in every n; the references have 4 + 5 tokens.
    document = ("a b c d", ["a b c d"]), ("", ["e f g h i"])
    assert score(Bleu(v13a=True), *document) == pytest.approx(math.exp(1 - 9 / 4))
    assert score(Bleu(v13a=True), ("", ["a"])) == score(Nist(v13a=True), ("", ["a"])) == 0
    assert score(Bleu(v13a=True), ("a b", ["a b"])) == 1  # no 3-grams, no 4-grams
    # A reference without tokens is skipped, though its length is closer to 2 than 5 is.
    assert score(Bleu(v13a=True), ("a b", ["a b c d e", "<skipped>"])
                 ) == pytest.approx(math.exp(1 - 5 / 2))
    # 7 tokens in 3 references of 2 segments: 14/3 tokens are expected, 3 are there. "a": 4 of 7.
    document = ("a x y", ["a a", "a"]), ("", ["a b c d"])
    penalty = math.exp(-Nist.BETA * math.log(3 / (14 / 3)) ** 2)
    assert score(Nist(max_n=1, v13a=True), *document) == pytest.approx(
        math.log2(7 / 4) / 3 * penalty)
    # After the token "0", which is false in Perl, mteval-v13a.pl takes 1 of 4 tokens, not 1 of 2.
    assert score(Nist(max_n=2, v13a=True), ("0 a", ["0 a", "0 b"])) == pytest.approx(
        (1 + 2) / 2 + 2)


CASES = SHARED / "cases"


@needs_expected
@pytest.mark.parametrize("ref, pred, v13a, python", [
    (EXPECTED / "ref.txt", EXPECTED / "jittor_pred.txt", (0.2039, 2.7430), (0.2039, 2.7430)),
    (EXPECTED / "ref.txt", EXPECTED / "torch_pred.txt", (0.2093, 2.9530), (0.2093, 2.9530)),
    (CASES / "26-odd-predictions" / "odd_ref.txt", CASES / "26-odd-predictions" / "odd_pred.txt",
     (0.9886, 3.5819), (1.0160, 3.5922)),
    (CASES / "31-short-predictions-bleu" / "ref.txt",
     CASES / "31-short-predictions-bleu" / "pred.txt", (0.0821, 0.0054), (8957.2640, 0.1439)),
])
def test_bleu_and_nist_of_the_challenges_script(ref, pred, v13a, python):
    if not ref.is_file():
        pytest.skip(f"no {ref}")
    pairs = [(prediction, references)
             for _, references, prediction in challenge_files.load(str(ref), str(pred))]
    for expected, choice in ((v13a, True), (python, False)):
        assert (score(Bleu(v13a=choice), *pairs), score(Nist(v13a=choice), *pairs)
                ) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("flags, bleu", [([], 0.0821), (["-p"], 8957.2640)])
def test_the_flag_p_takes_the_python_version(tmp_path, monkeypatch, capsys, flags, bleu):
    ref = write(tmp_path / "ref.txt", "a pub in town\n\na bar in the city\n\na cafe by the river\n")
    pred = write(tmp_path / "pred.txt", "a pub in town\n\n\n")
    monkeypatch.setattr(coco, "require", lambda: None)
    monkeypatch.setattr(coco, "scores", lambda references, predictions: {
        name: (0.0, [0.0] * len(predictions)) for name in ("METEOR", "ROUGE_L", "CIDEr")})
    monkeypatch.setattr(sys, "argv", ["measure_scores.py", ref, pred, *flags])
    measure_scores.main()
    assert f"BLEU: {bleu:.4f}\n" in capsys.readouterr().out


sentences = st.lists(st.sampled_from(["The", "café", "is", "£20", "near", "it", "."]),
                     min_size=4, max_size=9).map(" ".join)
documents = st.lists(st.tuples(sentences, st.lists(sentences, min_size=1, max_size=4)),
                     min_size=1, max_size=5)


@given(documents, st.randoms(use_true_random=False))
def test_order_of_segments_and_references_does_not_matter(document, rng):
    for metric in (Bleu, Nist, partial(Bleu, v13a=True), partial(Nist, v13a=True)):
        before = score(metric(), *document)
        shuffled = [(prediction, rng.sample(references, len(references)))
                    for prediction, references in document]
        rng.shuffle(shuffled)
        assert score(metric(), *shuffled) == pytest.approx(before, rel=1e-9, abs=1e-12)


@given(documents)
def test_bleu_is_at_most_1_and_that_for_perfect_predictions(document):
    for v13a in (True, False):
        assert 0 <= score(Bleu(v13a=v13a), *document) <= 1 + 1e-12
        perfect = [(references[-1].title(), references) for _, references in document]
        assert score(Bleu(v13a=v13a), *perfect) == pytest.approx(1)


@given(st.lists(st.tuples(st.text(), st.lists(st.text(), min_size=1, max_size=3)), max_size=3))
def test_any_text_has_scores(document):
    for metric in (Bleu(), Bleu(smoothing=1), Nist(), Bleu(v13a=True), Nist(v13a=True)):
        assert math.isfinite(score(metric, *document))


# Files

def write(path: Path, text: str) -> str:
    path.write_bytes(text.encode("utf-8"))
    return str(path)


def load(tmp_path, ref, pred, ref_name="ref.txt", pred_name="pred.txt", src=None):
    return [tuple(segment) for segment in challenge_files.load(
        write(tmp_path / ref_name, ref), write(tmp_path / pred_name, pred),
        None if src is None else write(tmp_path / "src.txt", src))]


@pytest.mark.parametrize("ref, pred, segments", [
    ("a\nb\n\nc\n\n", "p\nq\n", [("", ["a", "b"], "p"), ("", ["c"], "q")]),
    ("a\r\nb\r\n \r\nc", "\ufeffp\n\tq r\t\n", [("", ["a", "b"], "p"), ("", ["c"], "q r")]),
    ("a\nb\n", "p\n\n", [("", ["a"], "p"), ("", ["b"], "")]),  # one reference per input
    ("a\nb\n\n", "p\nq\n", [("", ["a"], "p"), ("", ["b"], "q")]),
    ("a\nb\n\n", "p\n", [("", ["a", "b"], "p")]),  # one input
])
def test_text_files(tmp_path, ref, pred, segments):
    assert load(tmp_path, ref, pred) == segments


@pytest.mark.parametrize("ref, pred, predictions", [
    ("a\rb\r\rc\r\r", "p\rq\r", ["p", "q"]),  # line ends of CR alone
    ("a\r\rb", "p\nq", ["p", "q"]),
    ("a\n\nb\n", "p x\rq\nr\n", ["p x\rq", "r"]),  # white space, as in the metrics
    ("a\r\n\r\nb\r\r\n", "p\r\r\nq\x0br\x85s\u2028t\r\n", ["p", "q\x0br\x85s\u2028t"]),
])
def test_carriage_returns_in_text_files(tmp_path, ref, pred, predictions):
    assert [prediction for _, _, prediction in load(tmp_path, ref, pred)] == predictions


def test_carriage_returns_in_tables(tmp_path):
    names = "ref.csv", "pred.tsv"
    assert load(tmp_path, "mr,ref\rx,a\ry,b\r", "mr\tout\rx\tp\ry\tq", *names) == [
        ("x", ["a"], "p"), ("y", ["b"], "q")]
    assert load(tmp_path, "mr,ref\nx,\"a\rb\"\n", "mr\tout\nx\tp\n", *names) == [
        ("x", ["a\rb"], "p")]
    with pytest.raises(InputError, match="ref.csv:2: "):  # is it the end of a row or not?
        load(tmp_path, "mr,ref\nx,a\ry,b\n", "mr\tout\nx\tp\n", *names)


@pytest.mark.parametrize("number", [2, 3])
def test_carriage_returns_are_said_and_no_cell_of_a_table_has_one(tmp_path, monkeypatch, number):
    put_java(tmp_path, monkeypatch, JAVA_WITHOUT_METEOR)
    ref = write(tmp_path / "ref.txt", "a b c d e f\n" * number)
    pred = write(tmp_path / "pred.txt", "a b c\rd\te f\n" * number)
    result = run_script(ref, pred, "-l", tmp_path / "out.tsv")
    rows = (tmp_path / "out.tsv").read_bytes().split(b"\n")
    assert [row.split(b"\t")[1] for row in rows[1:-1]] == [b"a b c d e f"] * number
    assert f"note: {number} of {number} inputs have a carriage return" in result.stderr


TABLE = [("mr 1", ["the café, £20", "b"], "p"), ("mr 2", ["c"], "")]


@pytest.mark.parametrize("ref", [
    "MR,human_ref\nmr 1,\"the cafÃ©, Ł20\"\nmr 2,c\nmr 1,b\n",
    "\ufeffid\tReference\tsource\n7\tthe caf\u00e9, Â£20\tmr 1\n\n8\tc\tmr 2\n9\tb\tmr 1\n",
    "mr 1\tthe cafã©, £20\nmr 1\tb\nmr 2\tc\n",
    "mr 1,\"the café, £20\"\nmr 1,b\nmr 2,c\n",
])
@pytest.mark.parametrize("pred", ["src\tsys_out\nmr 1\tp\nmr 2\t\n", "mr 1\tp\nmr 2\t\n"])
def test_tables(tmp_path, ref, pred):
    # "mr 1" starts like a heading, but is a source where no second heading follows it.
    assert load(tmp_path, ref, pred, "ref.csv", "pred.TSV") == TABLE
    assert load(tmp_path, ref, pred, "ref.csv", "pred.out", src="mr 1\nmr 2\n") == TABLE


def test_references_of_a_table_are_grouped_by_run_where_predictions_have_no_source(tmp_path):
    assert load(tmp_path, "mr,ref\nx,a\nx,b\ny,c\nx,d\n", "p\nq\nr\n", "ref.csv") == [
        ("", ["a", "b"], "p"), ("", ["c"], "q"), ("", ["d"], "r")]


@pytest.mark.parametrize("names, ref, pred, src, words", [
    ("ref.txt pred.txt", "a\n\nb\n", "p\n", None, ["ref.txt", "2 inputs", "pred.txt", "1 pred"]),
    ("ref.txt pred.txt", "a\n\n\nb\n", "p\nq\n", None, ["ref.txt:3", "without references"]),
    ("ref.txt pred.txt", "\n", "p\n", None, ["ref.txt", "no references"]),
    ("ref.txt pred.txt", "a\n", "", None, ["pred.txt", "empty"]),
    ("ref.csv pred.txt", "", "p\n", None, ["ref.csv", "empty"]),
    ("ref.csv pred.txt", "mr,ref\n\nx,a,b\n", "p\n", None, ["ref.csv:3", "3 columns"]),
    ("ref.csv pred.txt", "x,y,z\n", "p\n", None, ["ref.csv:1", "column of sources"]),
    ("ref.csv pred.txt", "x,\"" + "y" * 200000 + "\"\n", "p\n", None, ["ref.csv:1", "quotation"]),
    ("ref.csv pred.csv", "mr;ref\nx;a\n", "mr;out\nx;p\n", None, ["pred.csv:1", "semicolons"]),
    ("ref.csv pred.txt", "mr;ref\nx, y;a\n", "p\n", None, ["ref.csv:1", "semicolons", "tabs"]),
    ("ref.csv pred.tsv", "x,a\n", "mr 1\tOutside the city\nx\tp\n", None, ["pred.tsv:1", "head"]),
    ("ref.tsv pred.txt", "Sources\u00a0say\tReferees\nx\ta\n", "p\n", None, ["ref.tsv:1", "head"]),
    ("ref.csv pred.csv", "x,a\n", "y,p\n", None, ["ref.csv", "no reference", "'y'"]),
    ("ref.csv pred.csv", "x,a\n", "x,p\n", "x\ny\n", ["pred.csv", "1 pred", "src.txt", "2 sou"]),
    ("ref.csv pred.csv", "x,a\n", "mr,out\nx,p\n", "y\n", ["pred.csv:2", "'x'", "'y'"]),
])
def test_malformed_files_end_in_one_line(tmp_path, names, ref, pred, src, words):
    with pytest.raises(InputError) as error:
        load(tmp_path, ref, pred, *names.split(), src=src)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


# METEOR, ROUGE-L and CIDEr

METEOR_STAND_IN = """#!/bin/sh
echo $$ > "$PID_FILE"
head -c 300000 /dev/zero >&2
n=0
while read -r line; do
    case "$line" in
        SCORE*) n=$((n + 1)); echo "$line" >> "$PID_FILE.lines"; echo 1.0 ;;
        EVAL*) for i in $(seq $((n + 1))); do echo 0.5; done ;;
    esac
done
sleep 600
"""


def put_java(tmp_path, monkeypatch, script: str) -> None:
    """Puts a stand-in for Java on the PATH, and an archive of METEOR into a package's folder."""
    (tmp_path / "meteor").mkdir()
    (tmp_path / "meteor/meteor-1.5.jar").touch()
    (tmp_path / "java").write_text(script)
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")


def test_meteor_neither_blocks_nor_stays(tmp_path, monkeypatch):
    """The fake java fills stderr and never ends by itself; meteor() removes "|||" from texts."""
    monkeypatch.setenv("PID_FILE", str(tmp_path / "pid"))
    put_java(tmp_path, monkeypatch, METEOR_STAND_IN)
    result = coco.meteor([["a ||| b", "c"], ["d"]], ["e", "|||"], tmp_path)
    assert result == (0.5, [0.5, 0.5])
    assert (tmp_path / "pid.lines").read_text().splitlines() == [
        "SCORE ||| a b ||| c ||| e", "SCORE ||| d |||"]  # the shell's read drops the last space
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.parametrize("step", [
    lambda folder: coco.meteor([["a"]] * 9999, ["b"] * 9999, folder),
    lambda folder: coco.tokenize(["a"], folder),
])
def test_java_that_fails_is_named_with_its_message(tmp_path, monkeypatch, step):
    put_java(tmp_path, monkeypatch, "#!/bin/sh\necho 'Picked up x\nError: no memory' >&2\nexit 1\n")
    with pytest.raises(InputError, match=r"failed in Java \(Error: no memory\); check"):
        step(tmp_path)


def test_cider_without_a_single_word_is_0():
    assert coco.cider([["", ""], [""]], ["", "a"]) == (0, [0, 0])


def test_no_java_is_said_before_anything_slow(tmp_path):
    ref, pred = write(tmp_path / "ref.txt", "a\n"), write(tmp_path / "pred.txt", "a\n")
    result = run_script(ref, pred, PATH=str(tmp_path))
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1
    assert "apt-get install default-jre-headless" in result.stderr


def test_errors_in_files_come_before_java(tmp_path):
    ref, pred = write(tmp_path / "ref.txt", "a\n"), write(tmp_path / "pred.txt", "a\nb\n")
    result = run_script(ref, pred, PATH=str(tmp_path))
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert ref in result.stderr and pred in result.stderr


def test_help_loads_nothing_slow():
    code = ("import sys, measure_scores; "
            "print([name for name in ('numpy', 'pycocoevalcap') if name in sys.modules])")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8",
                            cwd=ROOT / "eval" / "e2e", check=True)
    assert result.stdout == "[]\n"
    assert "-p" in run_script("--help").stdout


@pytest.mark.slow
@needs_expected
@needs_java
def test_expected_scores_as_the_challenge_prints_them():
    result = run_script(EXPECTED / "ref.txt", EXPECTED / "jittor_pred.txt", "-p")
    assert result.stdout == ("SCORES:\n==============\nBLEU: 0.2039\nNIST: 2.7430\n"
                             "METEOR: 0.2769\nROUGE_L: 0.4314\nCIDEr: 1.3968\n\n")
    assert result.returncode == 0


@pytest.mark.slow
@needs_expected
@needs_java
def test_expected_scores_as_a_table_in_another_locale():
    pred = EXPECTED / "torch_pred.txt"
    result = run_script("-t", "-H", "--python", EXPECTED / "ref.txt", pred, LC_ALL="C",
                        JAVA_TOOL_OPTIONS="-Duser.language=de -Dfile.encoding=US-ASCII")
    assert result.stdout == ("File\tBLEU\tNIST\tMETEOR\tROUGE_L\tCIDEr\n"
                             f"{pred}\t0.2093\t2.9530\t0.2708\t0.4022\t1.2690\n")


SPICE = ("Blue Spice is a pub by the river .\n\nA pub in the city .\nThere is a pub in the city "
         "centre .\n", "Blue Spice is a pub near the river .\nA pub in the city centre .\n")
SCORES_OF_SPICE = "BLEU: 0.7755\nNIST: 3.9280\nMETEOR: 0.5082\nROUGE_L: 0.9375\nCIDEr: 6.7892\n"


def write_spice(folder: Path) -> tuple[str, str]:
    return write(folder / "ref.txt", SPICE[0]), write(folder / "pred.txt", SPICE[1])


def copy_of_pycocoevalcap(folder: Path) -> Path:
    shutil.copytree(coco.require(), folder / "pycocoevalcap",
                    ignore=shutil.ignore_patterns("spice", "__pycache__"))
    return folder / "pycocoevalcap"


@pytest.mark.slow
@needs_java
@pytest.mark.parametrize("locale", ["C", pytest.param("C.UTF-8", marks=pytest.mark.nightly)])
def test_any_path_of_the_script_and_of_its_packages(tmp_path, locale):
    """Java follows links: the folder that holds the archives counts."""
    folder = tmp_path / "my 实验 caf\u00e9 %20 # = [ ; ' \" & $x!"
    for name in ("eval", "src"):
        shutil.copytree(ROOT / name, folder / name)
    package = copy_of_pycocoevalcap(folder / "site")
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "pycocoevalcap").symlink_to(package)
    ref, pred = write_spice(folder)
    for site in (package.parent, tmp_path / "link"):
        result = subprocess.run(
            [sys.executable, str(folder / "eval" / "e2e" / "measure_scores.py"), ref, pred, "-p"],
            capture_output=True, encoding="utf-8", timeout=300,
            env={**os.environ, "PYTHONPATH": str(site), "LC_ALL": locale})
        assert SCORES_OF_SPICE in result.stdout, result.stderr
        assert result.returncode == 0


@pytest.mark.slow
@needs_java
def test_a_colon_in_the_path_of_the_archives(tmp_path):
    package = copy_of_pycocoevalcap(tmp_path / "a:b")
    assert coco.tokenize(["A Pub, here"], package) == ["a pub here"]
    assert coco.meteor([["a pub here"]], ["a pub here"], package)[0] == pytest.approx(1)


@pytest.mark.slow
@needs_java
@pytest.mark.parametrize("name", [
    "_JAVA_OPTIONS", pytest.param("JDK_JAVA_OPTIONS", marks=pytest.mark.nightly)])
def test_options_that_java_takes_from_the_environment_change_no_score(tmp_path, name):
    ref, pred = write_spice(tmp_path)
    result = run_script(ref, pred, "-p", **{
        name: "-Duser.language=de -Duser.country=DE -Dfile.encoding=UTF-16 -Xmx1500m"})
    assert SCORES_OF_SPICE in result.stdout, result.stderr
    assert (result.returncode, result.stderr.count("\n")) == (0, 1)


# As the real one, it names its options on stderr; its tokenizer gives back what it gets.
JAVA_WITHOUT_METEOR = """#!/bin/sh
echo "Picked up _JAVA_OPTIONS: -XX:+ExitOnOutOfMemoryError" >&2
case "$*" in
    *PTBTokenizer*) exec cat ;;
    *) echo "Error occurred during initialization of VM" >&2; exit 1 ;;
esac
"""


@pytest.mark.parametrize("flags", [[], ["-t", "-H"]])
def test_without_meteor_the_other_scores_are_printed(tmp_path, monkeypatch, flags):
    put_java(tmp_path, monkeypatch, JAVA_WITHOUT_METEOR)
    ref, pred = write_spice(tmp_path)
    result = run_script(ref, pred, "-p", *flags)
    scores = re.findall(r"[\d.]{6}|missing", result.stdout.replace("/pred.txt", ""))
    assert scores[:3] == ["0.7755", "3.9280", "missing"]
    assert len(scores) == 5
    error = result.stderr.splitlines()[1:]
    assert len(error) == 1 and error[0].startswith(
        "error: METEOR failed in Java (Error occurred during initialization of VM)")
    assert result.returncode == 1


def test_without_meteor_the_other_scores_of_segments_are_written(tmp_path, monkeypatch):
    put_java(tmp_path, monkeypatch, JAVA_WITHOUT_METEOR)
    ref, pred = write_spice(tmp_path)
    result = run_script(ref, pred, "-l", tmp_path / "segments.tsv")
    rows = [line.split("\t") for line in (tmp_path / "segments.tsv").read_text().splitlines()]
    assert [row[5] for row in rows] == ["METEOR", "missing", "missing"]
    assert all(float(field) >= 0 for row in rows[1:] for field in row[2:5] + row[6:])
    assert result.returncode == 1 and "METEOR failed" in result.stderr


@pytest.mark.slow
@needs_java
def test_segments_of_odd_texts(tmp_path):
    perfect = "The Café (a pub) costs £20."
    ref = write(tmp_path / "ref.tsv", f"mr\tref\nx\t{perfect}\nx\ta ||| b\u2028c\nz\t.\ny\td e f\n")
    pred = write(tmp_path / "pred.tsv", f"mr\tout\nx\t{perfect}\ny\t<?|||x>\vq ||| d\nz\t\n")
    src = write(tmp_path / "src.txt", "x\ny\nz\n")
    out = tmp_path / "new" / "segments.tsv"
    result = run_script(ref, pred, "-s", src, "--segment-level", out)
    assert (result.returncode, result.stdout) == (0, "")
    rows = [line.split("\t") for line in out.read_bytes().decode("utf-8")[:-1].split("\n")]
    assert rows[0] == ["src", "sys_out", "BLEU", "sentBLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr"]
    assert [row[0] for row in rows[1:]] == ["x", "y", "z"]
    scores = [[float(field) for field in row[2:]] for row in rows[1:]]
    assert rows[1][1] == perfect
    assert scores[0][:2] + scores[0][3:5] == [1, 1, 1, 1]
    assert 0 < scores[1][3] < 1 and 0 < scores[1][4] < 1
    assert scores[2][3] == 0 and scores[2][5] == 0
