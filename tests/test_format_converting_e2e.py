"""Stage 1: the same output as the original, and errors for invalid input."""

import json
import random
import subprocess
import sys

import pytest

LINES = [f"name : Place {i % 40}||This is text {i} ." for i in range(250)]


@pytest.fixture
def convert(root, tmp_path):
    """Runs the script on the given bytes; returns the process and the output file."""
    def run(data, *flags):
        source, target = tmp_path / "raw.txt", tmp_path / "formatted.jsonl"
        if data is not None:
            source.write_bytes(data)
        process = subprocess.run(
            [sys.executable, root / "src/format_converting_e2e.py", source, target, *flags],
            capture_output=True, text=True)
        return process, target
    return run


def raw(lines, end="\n"):
    return "".join(line + end for line in lines).encode()


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", ["test", "valid"])
def test_equals_the_original(convert, shared, name):
    process, target = convert((shared / f"data/e2e/{name}.txt").read_bytes())
    assert process.returncode == 0, process.stderr
    expected = shared / f"expected/e2e/{name}_formatted.jsonl"
    assert target.read_bytes() == expected.read_bytes()


def test_lines_without_a_text(convert, shared):
    folder = shared / "cases/20-no-references"
    process, target = convert((folder / "test.txt").read_bytes(), "--fraction", "1")
    assert process.returncode == 0, process.stderr
    assert target.read_bytes() == (folder / "tf.jsonl").read_bytes()
    assert process.stdout.endswith(": 3 of 3 examples; 3 of 3 inputs have no reference\n")
    process, target = convert(b"a||b\nc|| \n", "--fraction", "1")
    assert [record["completion"] for record in records(target)] == ["b", ""]
    assert process.stdout.endswith(": 2 of 2 examples; 1 of 2 inputs have no reference\n")
    process, _ = convert(b"a||b\n", "--fraction", "1")
    assert process.stdout.endswith(": 1 of 1 examples\n")


def test_draws_the_examples_that_the_description_gives(convert):
    process, target = convert(raw(LINES), "--fraction", "0.1", "--seed", "7")
    assert process.returncode == 0, process.stderr
    random.seed(7)
    drawn, expected = set(), []
    while len(expected) < 25:
        context, completion = random.choice(LINES).split("||")
        if context not in drawn:
            drawn.add(context)
            expected.append({"context": context, "completion": completion})
    assert records(target) == expected


def test_fraction_one_keeps_order_and_duplicates(convert):
    lines = LINES + LINES[:3]
    process, target = convert(raw(lines), "--fraction", "1")
    assert process.returncode == 0, process.stderr
    assert [f"{r['context']}||{r['completion']}" for r in records(target)] == lines


@pytest.mark.parametrize("n, share, drawn", [(100, "0.01", 1), (199, "0.01", 1), (200, "0.01", 2),
                                             (100, "0.29", 29), (100, "0.07", 7)])
def test_a_share_is_exact(convert, n, share, drawn):  # 100 * 0.29 is 28.999999999999996 in floats
    lines = [f"name : {i}||text" for i in range(n)]
    process, target = convert(raw(lines), "--fraction", share)
    assert process.returncode == 0, process.stderr
    assert len(records(target)) == drawn


def test_all_contexts_can_be_drawn(convert):
    process, target = convert(raw(LINES), "--fraction", "0.16")  # 40 of 40
    assert process.returncode == 0, process.stderr
    assert {r["context"] for r in records(target)} == {line.split("||")[0] for line in LINES}


def test_byte_order_mark_crlf_and_blanks_are_not_text(convert):
    data = b"\xef\xbb\xbf" + raw(["a : b||One . ", " c : d||Caf\u00e9 ||\u00a35 .\t"], "\r\n")
    process, target = convert(data, "--fraction", "1")
    assert process.returncode == 0, process.stderr
    assert records(target) == [{"context": "a : b", "completion": "One ."},
                               {"context": "c : d", "completion": "Caf\u00e9 ||\u00a35 ."}]


@pytest.mark.parametrize("ends", [["\r"], ["\r", "\n"], ["\r\n", "\r"], ["\r\r\n"],
                                  ["\n", "\r\n", "\r"]])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_any_line_ends_in_any_encoding_with_a_mark(convert, ends, encoding):
    texts = ["caf\u00e9 餐厅\u2028.", "a\x0bb\x0cc\x85d\u2029e", "x\x1cy\x1dz"]
    data = "".join(f"name : {i}||{text}{ends[i % len(ends)]}" for i, text in enumerate(texts))
    process, target = convert(data.encode(encoding), "--fraction", "1")
    assert process.returncode == 0, process.stderr
    assert records(target) == [{"context": f"name : {i}", "completion": text}
                               for i, text in enumerate(texts)]


@pytest.mark.parametrize("mark, encoding", [(b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"),
                                            (b"\xff\xfe\0\0", "utf-32-le")])
def test_text_that_is_not_in_the_encoding_of_its_mark(convert, mark, encoding):
    data = mark + "a||b\nc||d".encode(encoding) + b"\0"
    process, target = convert(data, "--fraction", "1")
    assert process.returncode == 1 and not target.exists()
    assert f"raw.txt:2: not {encoding.upper()}, though" in process.stderr


@pytest.mark.parametrize("text, encoding, name", [
    ("name : 餐厅||餐厅 .", "gbk", "GB18030"),
    ("name : 蓝色香料||蓝色香料是一家酒吧。", "gb18030", "GB18030"),
    ("name : 藍色||藍色香料是一家位於河邊的酒吧。", "big5", "BIG5"),
    ("name : A||川の近くのパブです。", "shift_jis", "CP932"),
    ("name : A||A\u2019s caf\u00e9 \u00a320 .", "cp1252", "CP1252"),
    ("name : A||\u201cA\u201d \u2013 it\u2019s", "cp1252", "CP1252"),
    ("name : A||caf\u00e9", "latin-1", "CP1252"),
])
def test_the_remedy_names_the_likely_encoding(convert, text, encoding, name):
    data = "name : x||y\rname : \u00e9||z\n".encode() + text.encode(encoding)
    process, _ = convert(data, "--fraction", "1")
    assert process.returncode == 1
    at = [byte > 127 for byte in text.encode(encoding)].index(True) + 1
    assert process.stderr == (
        f"error: {process.args[2]}:3: not UTF-8 (byte {at} of the line); convert the file, e.g. "
        f"iconv -f {name} -t UTF-8, or run: bash data/download_data.sh e2e\n")
    converted = subprocess.run(["iconv", "-f", name, "-t", "UTF-8"], input=text.encode(encoding),
                               capture_output=True, check=True)
    assert converted.stdout.decode() == text


@pytest.mark.parametrize("data, flags, place, remedy", [
    (None, [], "raw.txt: no such file", "bash data/download_data.sh"),
    (b"", [], "raw.txt: the file is empty", "bash data/download_data.sh"),
    (b"a||b\nc d\n", [], 'raw.txt:2: no "||"', "meaning representation||text"),
    (b"a||b\n\nc||d\n", [], 'raw.txt:2: no "||"', "meaning representation||text"),
    (b"a||b\nc||caf\xe9\n", [], "raw.txt:2: not UTF-8", "iconv"),
    (raw(LINES[:99]), [], "raw.txt: a share of 0.01 of 99 examples", "larger --fraction"),
    (raw(LINES), ["--fraction", "0.164"], "raw.txt: 41 examples with", "smaller --fraction"),
])
def test_mistakes_end_in_one_line(convert, data, flags, place, remedy):
    process, target = convert(data, *flags)
    assert process.returncode == 1
    assert len(process.stderr.splitlines()) == 1
    assert place in process.stderr and remedy in process.stderr
    assert not target.exists()


@pytest.mark.parametrize("share", ["0", "-0.5", "1.01", "nan", "inf", "half", ""])
def test_no_such_share(convert, share):
    process, target = convert(raw(LINES), f"--fraction={share}")
    assert process.returncode == 2
    assert "--fraction" in process.stderr and "Traceback" not in process.stderr
    assert not target.exists()


def test_an_error_leaves_the_old_output(convert):
    _, target = convert(raw(LINES))
    old = target.read_bytes()
    process, _ = convert(b"no separator\n")
    assert process.returncode == 1
    assert target.read_bytes() == old


def test_draw_does_not_loop_for_ever(convert):
    process, _ = convert(raw(["a||x", "a||y", "a||z", "b||x"]), "--fraction", "0.75")
    assert process.returncode == 1 and "3 examples with different" in process.stderr
    assert "there are 2; take a smaller --fraction" in process.stderr


@pytest.mark.parametrize("share", ["NaN", "sNaN", "Infinity", "0", "1.01", "x", "-0.5"])
def test_fraction_refuses_what_is_no_share(convert, share):
    process, _ = convert(raw(LINES), "--fraction", share)
    assert process.returncode == 2 and "--fraction" in process.stderr
    assert "Traceback" not in process.stderr
