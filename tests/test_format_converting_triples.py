"""Stage 1 for WebNLG and DART: the same output as the original, and errors for invalid input."""

import copy
import hashlib
import json
import random
import subprocess
import sys
from decimal import ROUND_FLOOR, Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

import conversion
import format_converting_dart
import format_converting_webnlg
from runtime.errors import InputError

RAW = {"webnlg": "webnlg_challenge_2017/{}.json", "dart": "dart/dart-v1.1.1-full-{}.json"}
WEBNLG = {"entries": [
    {"1": {"category": "Airport", "size": "1",
           "modifiedtripleset": [{"subject": "A_1", "property": "cityServed", "object": '"B"@en'}],
           "lexicalisations": [{"lex": " A is in\nB. ", "comment": "good", "lang": ""},
                               {"lex": "No.", "comment": "toFix"},
                               {"lex": "é", "comment": "good"}]}},
    {"2": {"category": "Artist",
           "modifiedtripleset": [{"subject": "C", "property": "p", "object": "D"},
                                 {"subject": "D", "property": "Q", "object": "E"}],
           "lexicalisations": [{"lex": "C.", "comment": "good"}]}},
    {"3": {"category": "Airport", "modifiedtripleset": [], "lexicalisations": []}}]}
DART = [
    {"tripleset": [["A", "IN_Şehir", "B"], ["B", "HAS", "C"]], "subtree_was_extended": False,
     "annotations": [{"source": "x", "text": "A in B."}, {"source": "y", "text": ""}]},
    {"tripleset": [["A", "IS", "B"]], "annotations": [{"text": "Again."}]}]


@pytest.fixture
def convert(root, tmp_path):
    """Runs the converter of a data set on a file or a value; returns process and output file."""
    def run(name, source, *flags):
        if not hasattr(source, "is_file"):
            value, source = source, tmp_path / "raw.json"
            source.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
        target = tmp_path / "formatted.jsonl"
        process = subprocess.run(
            [sys.executable, root / f"src/format_converting_{name}.py", source, target, *flags],
            capture_output=True, text=True)
        return process, target
    return run


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name, split, raw", [
    ("webnlg", "train", RAW["webnlg"]), ("webnlg", "valid", RAW["webnlg"]),
    ("webnlg", "test", RAW["webnlg"]), ("dart", "valid", RAW["dart"]),
    ("dart", "test", "dart/dart-test-from-xml.json")])
def test_official_files(convert, shared, name, split, raw):
    """The whole file and the default draw, by the checksums of the original's output."""
    raw = shared / "data" / raw.format(split.replace("valid", "dev"))
    folder = shared / "expected/webnlg_dart/conversion"
    wanted = {line.split()[0]: line.split()[3]
              for line in (folder / "CHECKSUMS.txt").read_text().splitlines()[1:]}
    for flags, ending in ((["--fraction", "1"], ""), ([], ".seed")):
        process, target = convert(name, raw, *flags)
        assert process.returncode == 0, process.stderr
        digest = hashlib.sha256(target.read_bytes()).hexdigest()
        assert digest == wanted[f"{name}_{split}_formatted{ending}.jsonl"]
        said = folder / f"{name}_{split}.stdout"
        if said.is_file():
            assert process.stdout.startswith(said.read_text())


@pytest.mark.parametrize("name", ["webnlg", "dart"])
def test_tiny_files(convert, shared, name):
    folder = shared / "expected/webnlg_dart/tiny"
    for flags, ending in ((["--fraction", "1"], ""), ([], ".seed")):
        process, target = convert(name, folder / f"{name}_tiny.json", *flags)
        assert process.returncode == 0, process.stderr
        expected = folder / f"{name}_tiny_formatted{ending}.jsonl"
        assert target.read_bytes() == expected.read_bytes()
        assert process.stdout.startswith((folder / f"{name}_tiny.stdout").read_text())


def test_webnlg(convert):
    process, target = convert("webnlg", WEBNLG, "--fraction", "1")
    assert process.returncode == 0, process.stderr
    assert target.read_text() == (
        r'{"context": "A_1 : cityServed : \"B\"@en", "completion": " A is in\nB. ", "cate": true}'
        "\n" r'{"context": "A_1 : cityServed : \"B\"@en", "completion": "\u00e9", "cate": true}'
        "\n" '{"context": "C : p : D | D : Q : E", "completion": "C.", "cate": false}\n')
    assert process.stdout.startswith("cate Airport 2\ncate Artist 1\n")


def test_dart(convert):
    process, target = convert("dart", DART, "--fraction", "1")
    assert process.returncode == 0, process.stderr
    assert [tuple(record.values()) for record in records(target)] == [
        ("A : in_şehir : B | B : has : C", "A in B."), ("A : in_şehir : B | B : has : C", ""),
        ("A : is : B", "Again.")]
    assert process.stdout.startswith("unique source is 2\n")


@pytest.mark.parametrize("n, share, drawn", [(1, "0.01", 1), (100, "0.01", 1), (101, "0.01", 2),
                                             (99, "0.02", 2), (100, "0.07", 7), (7, "0.99", 7)])
def test_a_share_is_rounded_up(convert, n, share, drawn):
    entries = [{"tripleset": [["A", "b", str(i)]], "annotations": [{"text": "."}]}
               for i in range(n)]
    process, target = convert("dart", entries, "--fraction", share)
    assert process.returncode == 0, process.stderr
    assert len(records(target)) == drawn


@given(st.lists(st.integers(0, 30), min_size=1, max_size=200), st.integers(0, 99), st.data())
def test_draw(contexts, seed, data):
    """The first lines with new contexts in the order that the seed gives."""
    most = len(set(contexts)) * 100 // len(contexts)
    share = Decimal(data.draw(st.integers(0, min(most, 99)))) / 100
    examples = [{"context": context, "completion": i} for i, context in enumerate(contexts)]
    n = int(share * len(contexts))
    drawn = conversion.draw("f", examples, share, seed, ROUND_FLOOR) if n else []
    assert len(drawn) == n
    random.seed(seed)
    seen = set()
    for example in drawn:
        index = random.choice(range(len(contexts)))
        while contexts[index] in seen:
            index = random.choice(range(len(contexts)))
        seen.add(contexts[index])
        assert example["completion"] == index


def changed(value, place, new):
    """A copy of a JSON value with ``new`` in a place, or without that place if ``new`` is None."""
    value = copy.deepcopy(value)
    *path, last = place
    inside = value
    for key in path:
        inside = inside[key]
    if new is None:
        del inside[last]
    else:
        inside[last] = new
    return value


FIRST = ("entries", 0, "1")


@pytest.mark.parametrize("place, new, message", [
    (("entries",), None, 'raw.json: no "entries"'),
    (("entries",), {}, 'raw.json, "entries": must be a list'),
    (("entries",), [], "raw.json: has no entries"),
    (("entries", 1), 3, "entry 2: must be an object with one key"),
    (("entries", 1, "5"), {}, "entry 2: must be an object with one key"),
    ((*FIRST,), [], 'entry 1, "1": no "category"'),
    ((*FIRST, "category"), 7, 'entry 1, "1", "category": must be a text'),
    ((*FIRST, "modifiedtripleset"), None, 'entry 1, "1": no "modifiedtripleset"'),
    ((*FIRST, "modifiedtripleset", 0), [], 'triple 1: no "subject"'),
    ((*FIRST, "modifiedtripleset", 0, "object"), None, 'triple 1: no "object"'),
    ((*FIRST, "modifiedtripleset", 0, "object"), 5, 'triple 1, "object": must be a text'),
    ((*FIRST, "lexicalisations", 2), "x", 'text 3: no "lex"'),
    ((*FIRST, "lexicalisations", 1, "lex"), "\ud800", 'text 2, "lex": must be a text (valid'),
    ((*FIRST, "lexicalisations", 1, "comment"), None, 'text 2: no "comment"'),
])
def test_malformed_webnlg(convert, place, new, message):
    assert_one_line(*convert("webnlg", changed(WEBNLG, place, new)), message, "webnlg")


@pytest.mark.parametrize("place, new, message", [
    ((0,), "x", 'entry 1: no "tripleset"'),
    ((1, "tripleset"), None, 'entry 2: no "tripleset"'),
    ((0, "tripleset", 1), ["a", "b"], "triple 2: has 2 parts"),
    ((0, "tripleset", 1), "abc", "triple 2: must be a list"),
    ((0, "tripleset", 0, 2), None, "triple 1: has 2 parts"),
    ((0, "tripleset", 0, 1), 4, "triple 1, part 2: must be a text"),
    ((1, "annotations"), "x", 'entry 2, "annotations": must be a list'),
    ((1, "annotations", 0, "text"), None, 'annotation 1: no "text"'),
])
def test_malformed_dart(convert, place, new, message):
    assert_one_line(*convert("dart", changed(DART, place, new)), message, "dart")


@pytest.mark.parametrize("data, message", [
    (b"", "raw.json:1: no JSON"), (b'{"entries":\n [}', "raw.json:2: no JSON"),
    (b"[" * 100_000, "raw.json: no JSON that can be read"), (b"caf\xe9", "raw.json:1: not UTF-8"),
    (b"3", "raw.json"), (b"{}", "raw.json"), (b"[]", "raw.json"), (b'"x"', "raw.json"),
    (b"[" + b"1" * 5000 + b"]", "raw.json")])
@pytest.mark.parametrize("name", ["webnlg", "dart"])
def test_no_json_of_this_kind(convert, name, data, message):
    assert_one_line(*convert(name, data), message, name)


@pytest.mark.parametrize("name", ["webnlg", "dart"])
def test_no_file_and_no_text(convert, tmp_path, name):
    process, target = convert(name, tmp_path / "x", "--fraction", "1")
    assert process.returncode == 1 and "Is a directory" in process.stderr or "no such" in \
        process.stderr
    nothing = {"webnlg": {"entries": [WEBNLG["entries"][2]]},
               "dart": [{"tripleset": [["a", "b", "c"]], "annotations": []}]}[name]
    assert_one_line(*convert(name, nothing), "entry 1: neither here nor later", name)


def assert_one_line(process, target, message, name):
    assert process.returncode == 1
    assert len(process.stderr.splitlines()) == 1, process.stderr
    assert message in process.stderr and f"bash data/download_data.sh {name}" in process.stderr
    assert not target.exists()


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=3),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
                        st.sampled_from(["entries", "1", "category", "modifiedtripleset",
                                         "lexicalisations", "tripleset", "annotations"]),
                        inner, max_size=4), max_leaves=12))
def test_any_json_is_converted_or_refused(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(value))
    for module in (format_converting_webnlg, format_converting_dart):
        with pytest.raises(InputError, match="any.json"):
            module.read_examples(str(path))
