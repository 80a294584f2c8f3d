"""What the documents say against what the programs do: flags, variables, messages, links, twins.

Flags and defaults come from the scripts' own parsers, variables and messages from their text.
"""

from __future__ import annotations

import ast
import configparser
import errno
import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import pytest
from conftest import ROOT, run_main

TWINS = [("README.md", "README.cn.md"), ("align/README.md", "align/README.cn.md"),
         *((f"docs/{name}.md", f"docs/{name}.cn.md") for name in ("reference", "running", "design"))]
REFERENCES = ["docs/reference.md", "docs/reference.cn.md"]
DOCUMENTS = sorted({str(path.relative_to(ROOT)) for path in (
    *ROOT.glob("README*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("align/README*.md"),
    ROOT / "CONTRIBUTING.md")})
WORDS = {"required": "required", "必填": "required", "off": "off", "关": "off", "none": "none",
         "无": "none"}  # for defaults that are no values


# Reading a document

@dataclass
class Row:
    """A row of a table, the heading above it, and the scripts that it is about."""

    heading: str
    scripts: tuple[str, ...]
    cells: list[str]

    @property
    def names(self) -> list[str]:
        """What the first cell has in backticks."""
        return re.findall(r"`([^`]+)`", self.cells[0])


@dataclass
class Document:
    """What a Markdown file has that can be right or wrong."""

    headings: list[tuple[int, str]] = field(default_factory=list)
    tables: list[list[Row]] = field(default_factory=list)
    blocks: list[tuple[str, list[str]]] = field(default_factory=list)  # (language, lines)
    links: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)

    def rows(self) -> list[Row]:
        return [row for table in self.tables for row in table]


def anchor(heading: str) -> str:
    """What GitHub makes of a heading."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")


def parse(text: str) -> Document:
    """Headings, and bold rows of tables, name scripts by their paths in backticks."""
    document, scripts, line_of_table, fenced = Document(), (), 0, False
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
            if fenced:
                document.blocks.append((line[3:], []))
        elif fenced:
            document.blocks[-1][1].append(line)
        else:
            document.links += re.findall(r"\]\(([^()\s]+)\)", re.sub("`[^`]*`", "", line))
            document.anchors.update(re.findall(r'<a id="([^"]+)"', line))
            named = tuple(re.findall(r"`([\w./]+\.(?:py|sh))\b[^`]*`", line))
            if match := re.fullmatch(r"(#+) (.*)", line):
                same = [other for _, other in document.headings if anchor(other) ==
                        anchor(match[2])]
                document.anchors.add(anchor(match[2]) + (f"-{len(same)}" if same else ""))
                document.headings.append((len(match[1]), match[2]))
                scripts = named
            line_of_table = line_of_table + 1 if line.startswith("|") else 0
            if line_of_table == 1:
                document.tables.append([])
            elif line_of_table > 2 and line.startswith("| **`"):
                scripts = named
            elif line_of_table > 2 and not line.startswith("| **"):
                cells = re.split(r"(?<!\\)\|", line.strip()[1:-1])
                document.tables[-1].append(Row(document.headings[-1][1], scripts, [
                    cell.strip().replace(r"\|", "|") for cell in cells]))
    return document


@lru_cache(None)
def read(name: str) -> Document:
    return parse((ROOT / name).read_text(encoding="utf-8"))


def between(document: Document, first: int, last: int) -> list[Row]:
    """The rows of the chapters (headings of level 2) from number ``first`` up to ``last``."""
    chapters = [heading for level, heading in document.headings if level == 2]
    found, chapter = {}, -1
    for level, heading in document.headings:
        chapter += level == 2
        found[heading] = chapter
    assert last <= len(chapters)
    return [row for row in document.rows() if first <= found[row.heading] < last]


def variable_rows(document: Document) -> list[Row]:
    return between(document, 0, 1)


def flag_rows(document: Document) -> list[Row]:
    """All rows about a script's flags; those of flags that are refused belong to no script."""
    return [row for row in between(document, 2, 3) if row.scripts]


# Flags

HOOK = """
import argparse, json, runpy, sys

class Caught(BaseException):
    pass

def caught(parser, *_):
    raise Caught(parser)

def text(default):
    if default in (None, ""):
        return None
    words = map(str, default if isinstance(default, list) else [default])
    return ",".join(words).replace(sys.argv[1], "")

argparse.ArgumentParser.parse_args = caught
found = {}
for path in sys.argv[2:]:
    sys.path[0] = sys.argv[1] + path.rpartition("/")[0]
    try:
        runpy.run_path(sys.argv[1] + path, run_name="__main__")
    except Caught as end:
        parser, = end.args
    found[path] = []
    if hasattr(parser, "section"):
        found[path].append({"names": ["@FILE"], "default": "none"})
    for action in parser._actions:
        if not isinstance(action, argparse._HelpAction):
            default = "off" if action.nargs == 0 else text(action.default) or "none"
            if action.required and action.nargs != "*":
                default = "required"
            names = action.option_strings or [action.metavar or action.dest.upper()]
            found[path].append({"names": names, "default": default})
print(json.dumps(found))
"""


@lru_cache(None)
def parsers(*scripts: str) -> dict[str, list[dict]]:
    """The flags of each script, as its parser has them, with defaults as the tables write them.

    All in one process, so no two scripts may need modules of one name from different folders.
    """
    environment = {name: value for name, value in os.environ.items()
                   if name not in ("PT_OUTPUT_DIR", "PYTHONPATH")}
    done = subprocess.run([sys.executable, "-c", HOOK, f"{ROOT}/", *scripts], env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def contradictions(rows: list[Row], flags: list[dict], prose: bool = False) -> list[str]:
    """What a script's rows have wrong; with ``prose``, words may stand for a default of none."""
    wrong, left = [], {name: flag for flag in flags for name in flag["names"]}
    for row in rows:
        documented = row.cells[1].strip('"')
        documented = WORDS.get(documented, documented)
        for name in row.names:
            if name not in left:
                wrong.append(f"{name}: no such flag, or twice")
                continue
            flag = left.pop(name)
            wrong += [f"{name}: without its alias {other}" for other in flag["names"]
                      if other not in row.names]
            if documented != flag["default"] and not (prose and flag["default"] == "none"):
                wrong.append(f"{name}: default {documented}, not {flag['default']}")
    return wrong + [f"{name}: missing" for name in left]


STAGES = ("src/format_converting_e2e.py", "src/gpt2_encode.py", "src/gpt2_ft.py",
          "src/gpt2_beam.py", "src/gpt2_decode.py", "eval/e2e/measure_scores.py")
OTHERS = ("data/download_data.py", "pretrained_checkpoints/download_checkpoints.py",
          "vocab/download_vocab.py", "data/demo/generate.py", "data/demo/report.py")
BENCH = tuple(f"bench/bench_{name}.py" for name in ("train", "beam", "scale"))
ALIGN = ("align/run.py", "align/torch_init.py", "align/torch_train.py", "align/torch_beam.py")


def rows_of(name: str, script: str) -> list[Row]:
    return [row for row in flag_rows(read(name)) if script in row.scripts]


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("script", STAGES)
def test_flags_of_the_stages(name, script):
    assert contradictions(rows_of(name, script), parsers(*STAGES)[script]) == []


@pytest.mark.parametrize("name", REFERENCES)
def test_each_script_reads_the_section_that_its_table_says(name):
    for script, section in (("src/gpt2_ft.py", "gpt2_ft"), ("src/gpt2_beam.py", "gpt2_beam")):
        row, = (row for row in rows_of(name, script) if row.names == ["@FILE"])
        assert f"`[{section}]`" in row.cells[2]
        assert f'ArgumentParser("{section}"' in (ROOT / script).read_text()


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("script", OTHERS)
def test_flags_of_downloads_and_demo(name, script):
    flags = [{**flag, "names": flag["names"][0].split("|")} for flag in parsers(*OTHERS)[script]
             if flag["names"][0].startswith("sm|")] or parsers(*OTHERS)[script]
    assert contradictions(rows_of(name, script), flags, prose=True) == []


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("script", BENCH)
def test_flags_of_the_benches(name, script):
    assert contradictions(rows_of(name, script), parsers(*BENCH)[script]) == []


@pytest.fixture(scope="module")
def align_flags():
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers", "loralib")):
        pytest.skip("no PyTorch; pip install -r requirement-test.txt")
    return parsers(*ALIGN)


@pytest.mark.parametrize("name", REFERENCES)
def test_flags_of_the_alignment(name, align_flags):
    data, *flags = align_flags["align/run.py"]
    assert data["names"] == ["DATA"]
    data = {**data, "names": ["demo", "e2e", "FOLDER"]}
    assert contradictions(rows_of(name, "align/run.py"), [data, *flags], prose=True) == []
    script = "align/torch_init.py"
    assert contradictions(rows_of(name, script), align_flags[script]) == []


if __name__ == "__main__":
    for t, s in (("align/torch_train.py", "src/gpt2_ft.py"), ("align/torch_beam.py", "src/gpt2_beam.py")):
        a = {n: f["default"] for f in parsers(*ALIGN)[t] for n in f["names"]}
        b = {n: f["default"] for f in parsers(*STAGES)[s] for n in f["names"]}
        print(t, {k: (a.get(k), b.get(k)) for k in a | b if a.get(k) != b.get(k)})
