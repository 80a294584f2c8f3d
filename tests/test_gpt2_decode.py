"""Stage 5 compared with the original's references and rules, and its errors for wrong input."""

import json
import re
import resource
import signal
import subprocess
import sys
import time

import pytest

import gpt2_decode as stage
from runtime.errors import InputError

END, EMPTY_LINE = 50256, 628

# The first and the last record have the same context. "cate" is a field of WebNLG's files.
RECORDS = [
    {"context": "name : A", "completion": "A is Good.", "cate": True},
    {"context": "name : B", "completion": "B, isn't!<|endoftext|>not this", "cate": False},
    {"context": "name : A", "completion": "A is a Place.\n\nnor this", "cate": True},
]
FLAGS = ["vocab", "sample_file", "input_file", "output_ref_file", "output_pred_file"]


@pytest.fixture
def sample(tiktoken_gpt2):
    """Makes a line of a prediction file."""
    def make(i, text, *behind):
        return {"id": i, "predict": [*tiktoken_gpt2.encode_ordinary(text), *behind]}
    return make


@pytest.fixture
def samples(sample):
    return [sample(0, " A is first.", END, 0, 0), sample(1, " B is it\u2019s", EMPTY_LINE, 0, 0),
            sample(2, " A, the Last one.", END)]


@pytest.fixture
def decode(root, vocab, tmp_path):
    """Runs the script on the given records; returns the process, the references' path and the
    predictions' path. For None a file is not written; bytes are written unchanged."""
    def run(records, samples, *flags):
        paths = {flag: tmp_path / flag for flag in FLAGS[1:]}
        for flag, lines in (("input_file", records), ("sample_file", samples)):
            if isinstance(lines, list):
                lines = "".join(json.dumps(line) + "\n" for line in lines).encode()
            if lines is not None:
                paths[flag].write_bytes(lines)
        paths["vocab"] = vocab
        named = [text for flag, path in paths.items() for text in (f"--{flag}", path)]
        process = subprocess.run([sys.executable, root / "src/gpt2_decode.py", *named, *flags],
                                 capture_output=True, text=True)
        return process, paths["output_ref_file"], paths["output_pred_file"]
    return run


def test_references_of_the_original(decode, shared):
    folder = shared / "expected"
    n = len((folder / "e2e/test.jsonl").read_text().splitlines())
    process, references, predictions = decode(
        (folder / "e2e/test_formatted.jsonl").read_bytes(),
        [{"id": i, "predict": [317, 764, END]} for i in range(n)])
    assert process.returncode == 0, process.stderr
    assert references.read_bytes() == (folder / "metrics/ref.txt").read_bytes()
    assert predictions.read_bytes() == b"A .\n" * n


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


TOKENIZE = ["--tokenize", "--lower"]


@pytest.mark.parametrize("name, flags", [
    ("tok", TOKENIZE), ("plain", []), ("seen", [*TOKENIZE, "--filter", "seen"]),
    ("unseen", [*TOKENIZE, "--filter", "unseen"])])
@pytest.mark.parametrize("kind, ref_num", [("webnlg", "3"), ("dart", "4")])
def test_tiny_webnlg_and_dart(decode, shared, kind, ref_num, name, flags):
    folder = shared / "expected/webnlg_dart/tiny"
    if not (folder / f"{kind}_tiny.hyp.{name}").exists():
        pytest.skip("DART has no categories")
    formatted, predicted = ((folder / f"{kind}_tiny{part}.jsonl").read_bytes()
                            for part in ("_formatted", ".predict"))
    process, references, predictions = decode(
        formatted, predicted, "--ref_type", kind, "--ref_num", ref_num, *flags)
    assert process.returncode == 0, process.stderr
    assert files_in(references) == files_in(folder / f"{kind}_tiny.refs.{name}")
    hypotheses = (folder / f"{kind}_tiny.hyp.{name}").read_text()
    if (kind, name) == ("dart", "plain"):  # the original leaves a line break inside a text
        hypotheses = hypotheses.replace("was\n", "was ")
    assert predictions.read_text() == hypotheses


@pytest.mark.parametrize("name, kind, data, flags", [
    ("webnlg_bart", "webnlg", "webnlg_challenge_2017/test.json", []),
    ("webnlg_bart_seen", "webnlg", "webnlg_challenge_2017/test.json", ["--filter", "seen"]),
    ("dart_bart", "dart", "dart/dart-test-from-xml.json", [])])
def test_whole_test_sets_of_webnlg_and_dart(decode, shared, root, tmp_path, name, kind, data,
                                            flags):
    formatted = tmp_path / "formatted.jsonl"
    subprocess.run([sys.executable, root / f"src/format_converting_{kind}.py",
                    shared / "data" / data, formatted, "--fraction", "1"], check=True,
                   stdout=subprocess.DEVNULL)
    folder = shared / "expected/webnlg_dart/decode"
    predicted = folder / f"{name.removesuffix('_seen')}.predict.jsonl"
    process, references, predictions = decode(
        formatted.read_bytes(), predicted.read_bytes(), "--ref_type", kind, "--ref_num", "6",
        *TOKENIZE, *flags)
    assert process.returncode == 0, process.stderr
    assert files_in(references) == files_in(folder / f"{name}.refs")
    assert predictions.read_bytes() == (folder / f"{name}.hyp").read_bytes()
    assert "beyond --ref_num 6 left out" in process.stdout


def test_an_empty_reference_is_an_empty_line(decode, samples):
    records = [RECORDS[0], {**RECORDS[1], "completion": ""}]
    process, references, _ = decode(records, samples[:2], "--ref_type", "dart", "--ref_num", "1")
    assert process.returncode == 0, process.stderr
    assert (references / "reference0").read_text() == "A is Good.\n\n"


def test_inputs_without_references(decode, shared):
    folder = shared / "cases/20-no-references"
    formatted, predicted = ((folder / name).read_bytes() for name in ("tf.jsonl", "p.jsonl"))
    absent = [{"context": json.loads(line)["context"]} for line in formatted.splitlines()]
    for records in (formatted, absent):
        process, references, predictions = decode(records, predicted)
        assert process.returncode == 0, process.stderr
        assert not references.exists()
        assert predictions.read_text() == (
            "The village pub Ivory Swan offers Thai curry near the City Museum.\n"
            "You will find Greek salad at Velvet Owl, a family restaurant near the Town Hall. "
            "Families are welcome.\nYou will find Thai curry at Copper Bell, a high end family "
            "restaurant by the old harbour. Families are welcome.\n")
        assert process.stdout == (f"{predictions}: 3 predictions; {references}: not written; "
                                  "3 of 3 inputs have no reference\n")
    references.write_text("of another run")  # would be scored as if it were of this one
    process, _, _ = decode(formatted, predicted)
    assert process.returncode == 1 and references.read_text() == "of another run"
    assert f"{references}: holds references, but no input of this run has any; " in process.stderr
    assert decode(formatted, predicted, "--output_ref_file", "/dev/null")[0].returncode == 0


@pytest.mark.parametrize("kind", ["webnlg", "dart"])
def test_a_folder_without_references(decode, samples, kind):
    records = [{"context": record["context"]} for record in RECORDS]
    process, references, predictions = decode(records, samples, "--ref_type", kind)
    assert process.returncode == 0, process.stderr
    assert not references.exists() and len(predictions.read_text().splitlines()) == 2
    references.mkdir()
    assert decode(records, samples, "--ref_type", kind)[0].returncode == 0
    (references / "reference0").write_text("of another run")
    process, _, _ = decode(records, samples, "--ref_type", kind)
    assert process.returncode == 1 and "holds references, but no input" in process.stderr


def test_some_inputs_without_references(decode, samples):
    """An input keeps its place: stage 6 then names the line, instead of scoring wrong pairs."""
    records = [{"context": "name : A"}, RECORDS[1], {**RECORDS[2], "completion": ""}]
    process, references, _ = decode(records, samples)
    assert process.returncode == 0, process.stderr
    assert references.read_text() == "\nB, isn't!\n\n"
    assert process.stdout.endswith("1 references; 1 of 2 inputs have no reference\n")
    process, references, _ = decode([records[0], RECORDS[1], RECORDS[2]], samples)
    assert references.read_text() == "A is a Place.\n\nB, isn't!\n\n"
    references.unlink()
    process, references, _ = decode(records[:2], samples[:2], "--ref_type", "dart")
    assert (references / "reference3").read_text() == "\nB, isn't!\n"


def test_encoded_completions_come_back_as_text(decode, shared):
    """Stage 5 inverts stage 2: the ids of the expected file are decoded to its completions."""
    folder = shared / "expected/e2e"
    ids = [json.loads(line)["completion"] for line in open(folder / "test.jsonl")]
    texts = [json.loads(line)["completion"] for line in open(folder / "test_formatted.jsonl")]
    process, _, predictions = decode((folder / "test_formatted.jsonl").read_bytes(),
                                     [{"id": i, "predict": list_} for i, list_ in enumerate(ids)])
    assert process.returncode == 0, process.stderr
    assert predictions.read_text(encoding="utf-8") == "".join(f"{text}\n" for text in texts)


def test_groups_and_cuts(decode, samples):
    process, references, predictions = decode(RECORDS, samples)
    assert process.returncode == 0, process.stderr
    assert references.read_text() == "A is Good.\nA is a Place.\n\nB, isn't!\n\n"
    assert predictions.read_text(encoding="utf-8") == "A, the Last one.\nB is it\u2019s\n"


def test_the_order_of_samples_is_free_and_one_a_context_is_enough(decode, samples):
    process, _, predictions = decode(RECORDS, [samples[1], samples[0]])
    assert process.returncode == 0, process.stderr
    assert predictions.read_text(encoding="utf-8") == "A is first.\nB is it\u2019s\n"


def test_tokenize_and_lower(decode, samples):
    process, references, predictions = decode(RECORDS, samples, "--tokenize", "--lower")
    assert process.returncode == 0, process.stderr
    assert references.read_text() == "a is good .\na is a place .\n\nb , isn ' t !\n\n"
    assert predictions.read_text(encoding="utf-8") == "a , the last one .\nb is it \u2019 s\n"


@pytest.mark.parametrize("kind", ["webnlg", "dart"])
def test_a_folder_of_references(decode, samples, kind):
    process, references, predictions = decode(RECORDS, samples, "--ref_type", kind,
                                              "--ref_num", "3")
    assert process.returncode == 0, process.stderr
    assert {path.name: path.read_text() for path in references.iterdir()} == {
        "reference0": "A is Good.\nB, isn't!\n",
        "reference1": "A is a Place.\nB, isn't!\n",
        "reference2": "A is Good.\nB, isn't!\n"}
    assert len(predictions.read_text(encoding="utf-8").splitlines()) == 2


def test_four_references_unless_given(decode, samples):
    process, references, _ = decode(RECORDS, samples, "--ref_type", "webnlg")
    assert process.returncode == 0, process.stderr
    assert sorted(path.name for path in references.iterdir()) == [
        f"reference{i}" for i in range(4)]


@pytest.mark.parametrize("wanted, expected", [
    ("seen", "A, the Last one.\n"), ("unseen", "B is it\u2019s\n")])
def test_filter(decode, samples, wanted, expected):
    process, references, predictions = decode(RECORDS, samples, "--filter", wanted)
    assert process.returncode == 0, process.stderr
    assert predictions.read_text(encoding="utf-8") == expected
    assert references.read_text().count("\n\n") == 1


def test_groups_by_unique_ids(decode, samples, tmp_path):
    unique = tmp_path / "unique"
    unique.write_text("7\n7\n3\n")
    process, references, predictions = decode(RECORDS, samples, "--ref_unique_file", unique)
    assert process.returncode == 0, process.stderr
    assert references.read_text() == "A is Good.\nB, isn't!\n\nA is a Place.\n\n"
    assert predictions.read_text(encoding="utf-8") == "B is it\u2019s\nA, the Last one.\n"


@pytest.mark.parametrize("ids, message", [
    ("7\n7\n", "unique: 2 lines, but"), ("7\n7\n3\n3\n", "unique: 4 lines, but"),
    ("7\nx\n3\n", "unique:2: not an integer"), (None, "unique: no such file")])
def test_wrong_unique_ids(decode, samples, tmp_path, ids, message):
    unique = tmp_path / "unique"
    if ids is not None:
        unique.write_text(ids)
    process, references, predictions = decode(RECORDS, samples, "--ref_unique_file", unique)
    check_mistake(process, message, references, predictions)


def test_a_prediction_is_one_line(decode, sample):
    """A line break inside a prediction would pair all later predictions with wrong references."""
    process, _, predictions = decode(RECORDS[:2], [sample(0, " A\nis \r\n here", END),
                                                   sample(1, "\n", END)])
    assert process.returncode == 0, process.stderr
    assert predictions.read_bytes() == b"A is here\n\n"


def check_mistake(process, message, *outputs):
    assert process.returncode == 1
    assert len(process.stderr.splitlines()) == 1 and message in process.stderr
    assert not any(path.exists() for path in outputs)


@pytest.mark.parametrize("change, flags, message", [
    (lambda r, s: (None, s), [], "input_file: no such file"),
    (lambda r, s: (r, None), [], "sample_file: no such file"),
    (lambda r, s: (b"", s), [], "input_file: the file is empty"),
    (lambda r, s: (r, b""), [], "sample_file: the file is empty"),
    (lambda r, s: ([*r, {"completion": "x"}], s), [], 'input_file:4: no "context"'),
    (lambda r, s: ([{**r[0], "completion": None}], s), [], 'input_file:1: "completion" must be'),
    (lambda r, s: ([{**r[0], "completion": " \n\n x"}, *r[1:]], s), [], "input_file:1: the compl"),
    (lambda r, s: (r, [*s, {"id": 3, "predict": []}]), [], "sample_file:4: id 3, but"),
    (lambda r, s: (r, [*s, {"id": -1, "predict": []}]), [], 'sample_file:4: "id" must be'),
    (lambda r, s: (r, [*s, {"id": "1", "predict": []}]), [], 'sample_file:4: "id" must be'),
    (lambda r, s: (r, [*s, {"id": 1}]), [], 'sample_file:4: no "predict"'),
    (lambda r, s: (r, [*s, {"id": 1, "predict": [1.5]}]), [], 'sample_file:4: "predict" must be'),
    (lambda r, s: (r, [*s, {"id": 1, "predict": [50257]}]), [], "sample_file:4: token id 50257"),
    (lambda r, s: (r, [s[0], s[2]]), [], "input_file:2; run src/gpt2_beam.py"),
    (lambda r, s: ([{"context": "a", "completion": "b"}], s[:1]), ["--filter", "seen"],
     'input_file:1: no "cate"'),
    (lambda r, s: ([{**r[0], "cate": "Food"}], s[:1]), ["--filter", "seen"],
     'input_file:1: "cate" must be true or false'),
    (lambda r, s: (r[:1], s[:1]), ["--filter", "unseen"], "no line is of a category unseen"),
])
def test_mistakes_end_in_one_line(decode, samples, change, flags, message):
    process, references, predictions = decode(*change(RECORDS, samples), *flags)
    check_mistake(process, message, references, predictions)


def test_both_outputs_or_neither(decode, samples, tmp_path):
    (tmp_path / "taken").write_text("old")
    for flag in ("--output_pred_file", "--output_ref_file"):
        process, references, predictions = decode(RECORDS, samples, flag, tmp_path)  # a folder
        check_mistake(process, "is a folder", references, predictions)
    process, references, predictions = decode(RECORDS, samples, "--ref_type", "dart",
                                              "--output_ref_file", tmp_path / "taken")
    check_mistake(process, "cannot be written", references, predictions)
    assert (tmp_path / "taken").read_text() == "old"
    assert not list(tmp_path.glob(".*.part"))


def test_one_file_for_both_outputs(decode, samples, tmp_path):
    both = tmp_path / "output_ref_file"
    process, references, predictions = decode(RECORDS, samples, "--output_pred_file", both)
    check_mistake(process, "give --output_pred_file another name", references, predictions)


@pytest.mark.parametrize("flag", FLAGS)
def test_required_flags(root, flag):
    flags = [text for name in FLAGS if name != flag for text in (f"--{name}", "x")]
    process = subprocess.run([sys.executable, root / "src/gpt2_decode.py", *flags],
                             capture_output=True, text=True)
    assert process.returncode == 2 and f"--{flag}" in process.stderr


@pytest.mark.parametrize("flags", [["--ref_num", "0"], ["--ref_num", "two"],
                                   ["--ref_type", "xsum"], ["--filter", "none"]])
def test_wrong_flags(decode, samples, flags):
    process, references, predictions = decode(RECORDS, samples, *flags)
    assert process.returncode == 2 and flags[0] in process.stderr
    assert not references.exists() and not predictions.exists()


def test_tokenize_splits_at_every_character_that_is_no_word():
    hypothesis = pytest.importorskip("hypothesis")

    @hypothesis.given(hypothesis.strategies.text())
    def check(text):
        split = " ".join(" ".join(re.split(r"(\W)", text)).split())
        assert stage.post_process(text, tokenize=True, lower=False) == split

    check()


def test_clean_joins_lines():
    hypothesis = pytest.importorskip("hypothesis")
    characters = "a\n\r \t\x0b\x0c\x1c\x85\xa0\u2028\u3000\u200b"

    @hypothesis.settings(max_examples=1000)
    @hypothesis.given(hypothesis.strategies.text(characters, max_size=14))
    def check(text):
        simple = re.sub(r"\s*[\r\n]\s*", " ", text.split("\n\n")[0].strip())
        assert stage.clean(text) == simple

    check()


@pytest.mark.parametrize("blank", [" ", "\t\u3000"])
@pytest.mark.parametrize("middle", ["", "\r"])
def test_clean_takes_linear_time(blank, middle):
    """The simple expression above takes minutes without a line break, this one milliseconds."""
    blanks, started = blank * 10**5, time.process_time()
    cleaned = stage.clean(f"a{blanks}{middle}{blanks}b")
    assert cleaned == ("a b" if middle else f"a{blanks}{blanks}b")
    assert time.process_time() - started < 5


def test_a_full_disk_replaces_none_of_several_files(tmp_path):
    """A limit on the file size simulates the full disk; only the first file is within the limit."""
    files = {tmp_path / "ref.txt": ["new"], tmp_path / "pred.txt": ["new" * 1000]}
    for path in files:
        path.write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        with pytest.raises(InputError, match="pred.txt: cannot be written: File too large; "):
            stage.write_together(files)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "ref.txt": "old", "pred.txt": "old"}
    stage.write_together(files)
    assert (tmp_path / "ref.txt").read_text() == "new\n"


def test_a_prediction_ends_at_its_length(decode, sample):
    """Only the file knows that zeros are no tokens: token 0 is "!"."""
    records = [{"context": c, "completion": "x"} for c in "abc"]
    samples = [{**sample(n, " It is.", 0, 0), "length": length}
               for n, length in enumerate((3, 4, 0))]
    process, _, predictions = decode(records, samples)
    assert process.returncode == 0, process.stderr
    assert predictions.read_text() == "It is.\nIt is.!\n\n"


@pytest.mark.parametrize("length", [-1, 4, "3", None, True, 1.0])
def test_a_length_that_is_none(decode, sample, length):
    process, _, predictions = decode([{"context": "a", "completion": "x"}],
                                     [{**sample(0, " It is."), "length": length}])
    assert process.returncode == 1 and not predictions.exists()
    assert 'sample_file:1: "length" is not a number of tokens of "predict"; ' in process.stderr
