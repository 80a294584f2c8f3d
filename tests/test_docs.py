"""Compares the documents with the programs: flags, variables, messages; links, translations.

Flags and defaults come from the scripts' parsers, variables and messages from the source code.
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
from pathlib import Path

import pytest
from conftest import ROOT, run_main

TWINS = [("README.md", "README.cn.md"), ("align/README.md", "align/README.cn.md"),
         *((f"docs/{name}.md", f"docs/{name}.cn.md")
           for name in ("reference", "running", "design", "peft"))]
REFERENCES = ["docs/reference.md", "docs/reference.cn.md"]
DOCUMENTS = sorted({str(path.relative_to(ROOT)) for path in (
    *ROOT.glob("README*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("align/README*.md"),
    ROOT / "CONTRIBUTING.md")})
WORDS = {"required": "required", "必填": "required", "off": "off", "关": "off", "none": "none",
         "无": "none"}  # for defaults that are not values


# Reading a document

@dataclass
class Row:
    """A row of a table, the heading above it, and the scripts that it is about."""

    heading: str
    scripts: tuple[str, ...]
    cells: list[str]

    @property
    def names(self) -> list[str]:
        """The texts in backticks in the first cell."""
        return re.findall(r"`([^`]+)`", self.cells[0])


@dataclass
class Document:
    """The parts of a Markdown file that the tests check."""

    headings: list[tuple[int, str]] = field(default_factory=list)
    tables: list[list[Row]] = field(default_factory=list)
    blocks: list[tuple[str, list[str]]] = field(default_factory=list)  # (language, lines)
    links: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)

    def rows(self) -> list[Row]:
        return [row for table in self.tables for row in table]


def anchor(heading: str) -> str:
    """The anchor that GitHub makes from a heading."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")


def parse(text: str) -> Document:
    """Parses Markdown. Paths in backticks in a heading or a bold table row name scripts."""
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
    if getattr(parser, "section", None):
        found[path].append({"names": ["@FILE"], "default": "none"})
    for action in parser._actions:
        if not isinstance(action, argparse._HelpAction) and action.help != argparse.SUPPRESS:
            default = "off" if action.nargs == 0 else text(action.default) or "none"
            if action.required and action.nargs != "*":
                default = "required"
            names = action.option_strings or [action.metavar or action.dest.upper()]
            found[path].append({"names": names, "default": default})
print(json.dumps(found))
"""


@lru_cache(None)
def parsers(*scripts: str) -> dict[str, list[dict]]:
    """The flags of each script's parser, with defaults in the form that the tables use.

    All scripts run in one process, so they must not import different modules of the same name.
    """
    environment = {name: value for name, value in os.environ.items()
                   if name not in ("PT_OUTPUT_DIR", "PYTHONPATH")}
    done = subprocess.run([sys.executable, "-c", HOOK, f"{ROOT}/", *scripts], env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def contradictions(rows: list[Row], flags: list[dict], prose: bool = False) -> list[str]:
    """The errors in a script's rows; with ``prose``, any text may stand for the default none."""
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


CONVERTERS = tuple(f"src/format_converting_{name}.py" for name in ("e2e", "webnlg", "dart"))
STAGES = (*CONVERTERS, "src/gpt2_encode.py", "src/gpt2_ft.py",
          "src/gpt2_beam.py", "src/gpt2_generate.py", "src/gpt2_decode.py", "src/gpt2_export.py",
          "eval/e2e/measure_scores.py", "eval/eval_m.py")
OTHERS = ("data/download_data.py", "pretrained_checkpoints/download_checkpoints.py",
          "vocab/download_vocab.py", "data/demo/generate.py", "data/demo/report.py")
BENCH = tuple(f"bench/bench_{name}.py" for name in ("train", "beam", "scale"))
ALIGN = ("align/run.py", "align/torch_init.py", "align/torch_train.py", "align/torch_beam.py")


def rows_of(name: str, script: str) -> list[Row]:
    """The rows about a script; a default may have that of WebNLG behind it: 2025 (WebNLG 123)."""
    rows = []
    for row in flag_rows(read(name)):
        if script in row.scripts:
            name, default, *others = row.cells
            common, _, webnlg = default.partition(" (WebNLG ")
            default = webnlg.rstrip(")") if webnlg and "webnlg" in script else common
            rows.append(Row(row.heading, row.scripts, [name, default, *others]))
    return rows


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("script", STAGES)
def test_flags_of_the_stages(name, script):
    assert contradictions(rows_of(name, script), parsers(*STAGES)[script]) == []


@pytest.mark.parametrize("name", REFERENCES)
def test_each_script_reads_the_section_that_its_table_says(name):
    for script, section in (("src/gpt2_ft.py", "gpt2_ft"), ("src/gpt2_beam.py", "gpt2_beam")):
        row, = (row for row in rows_of(name, script) if row.names == ["@FILE"])
        assert f"`[{section}]`" in row.cells[2]
        assert f'ArgumentParser(__doc__, "{section}")' in (ROOT / script).read_text()


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("script", OTHERS)
def test_flags_of_downloads_and_demo(name, script):
    flags = [{**flag, "names": [part for alias in flag["names"] for part in alias.split("|")]}
             for flag in parsers(*OTHERS)[script]]  # sm|md|lg
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


@pytest.mark.slow
@pytest.mark.parametrize("name", REFERENCES)
def test_flags_of_the_alignment(name, align_flags):
    data, *flags = align_flags["align/run.py"]
    assert data["names"] == ["DATA"]
    data = {**data, "names": ["demo", "e2e", "webnlg", "dart", "FOLDER"]}
    assert contradictions(rows_of(name, "align/run.py"), [data, *flags], prose=True) == []
    script = "align/torch_init.py"
    assert contradictions(rows_of(name, script), align_flags[script]) == []


@pytest.mark.slow
def test_the_pytorch_side_has_the_flags_of_ours(align_flags):
    """docs/reference.md: flags and defaults are those of stages 3 and 4, with these exceptions."""
    for theirs, ours in (("align/torch_train.py", "src/gpt2_ft.py"),
                         ("align/torch_beam.py", "src/gpt2_beam.py")):
        tables = [{name: flag["default"] for flag in flags for name in flag["names"]}
                  for flags in (align_flags[theirs], parsers(*STAGES)[ours])]
        differ = {name for name in tables[0] | tables[1] if tables[0].get(name) !=
                  tables[1].get(name)}
        assert differ == {"--model_card", "--lora_dim", "--lora_alpha", *(  # ours: the checkpoint's
            {"--keep_last", "--state_interval", "--resume"} if ours.endswith("ft.py")
            else {"--init_checkpoint", "--resume", "--hold_batch_size"})}
    for name in REFERENCES:
        text = (ROOT / name).read_text()
        exceptions = text[text.index("`align/torch_train.py`"):][:400]
        assert all(f"`{flag}`" in exceptions for flag in (
            "--keep_last", "--state_interval", "--resume", "--init_checkpoint",
            "--hold_batch_size"))


@pytest.mark.parametrize("name", REFERENCES)
def test_flags_that_are_refused(name):
    import gpt2_beam
    import gpt2_ft

    rows = [row for row in between(read(name), 2, 3) if not row.scripts]
    assert len(rows) == 5
    for row in rows:
        beam = "`gpt2_beam.py`" in row.cells[0]
        for flag in row.names:
            if flag.startswith("--"):
                main = gpt2_beam.main if beam else gpt2_ft.main
                needed = (["--data", "d", "--init_checkpoint", "c"] if beam else
                          ["--train_data", "t", "--valid_data", "v", "--max_step", 1])
                code, said = run_main(main, [*needed, *flag.replace("N", "0").split()])
                assert code == 2 and flag.split()[0] in said.splitlines()[-1], flag


def doctored(text: str, old: str, new: str) -> Document:
    assert text.count(old) == 1
    return parse(text.replace(old, new))


def test_contradictions_are_seen():
    text = (ROOT / "docs/reference.md").read_text()
    for old, new, found in (
            ("| `--clip` | 0.0 |", "| `--clip` | 1.0 |", "--clip: default 1.0, not 0.0"),
            ("| `--clip` | 0.0 |", "| `--clop` | 0.0 |", "--clop: no such flag, or twice"),
            ("| `--clip` | 0.0 |", "| `--clop` | 0.0 |", "--clip: missing"),
            ("| `--max_step` | none |", "| `--max_step` | required |",
             "--max_step: default required, not none"),
            ("| `--no_decay_bias` | off |", "| `--no_decay_bias` | none |",
             "--no_decay_bias: default none, not off"),
            ("| `--adam_epislon`, `--adam_epsilon` |", "| `--adam_epislon` |",
             "--adam_epislon: without its alias --adam_epsilon"),
            ("| `--lr` | 1e-05 |", "| `--lr`, `--clip` | 1e-05 |",
             "--clip: no such flag, or twice")):
        rows = [row for row in flag_rows(doctored(text, old, new))
                if "src/gpt2_ft.py" in row.scripts]
        assert found in contradictions(rows, parsers(*STAGES)["src/gpt2_ft.py"])


# Variables

def variables_of_shell(text: str) -> dict[str, str]:
    """The variables that a shell script reads from the environment, and their defaults."""
    code = re.sub(r"(^|\s)#.*", "", text)
    found = dict.fromkeys(re.findall(r"\$\{([A-Z][A-Z0-9_]*)\b", code)
                          + re.findall(r"\$([A-Z][A-Z0-9_]*)\b", code), "")
    for name in re.findall(r"\b([A-Z][A-Z0-9_]*)=", code):
        if f"${{{name}:-" not in code:
            found.pop(name, None)  # a variable of the script itself
    for pairs in re.findall(r"^ *override ((?:.*\\\n)*.*)", code, re.M):
        found.update(dict.fromkeys(re.findall(r"([A-Z_]+)=", pairs), ""))
    found.update(re.findall(r"\$\{([A-Z][A-Z0-9_]*):-([^${}]*)\}", code))
    return {name: default for name, default in found.items() if name != "BASH_SOURCE"}


def variables_of_python(text: str) -> dict[str, str]:
    """The same for a Python file; setdefault counts because it keeps a value that is set."""
    found = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "os.environ.get", "os.getenv", "os.environ.setdefault"):
            name, default = (*node.args, ast.Constant(""))[:2]
            found[name.value] = str(getattr(default, "value", ""))
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load) \
                and ast.unparse(node.value) == "os.environ" \
                and isinstance(node.slice, ast.Constant):
            found.setdefault(node.slice.value, "")
    return found


@lru_cache(None)
def variables(*patterns: str) -> dict[str, str]:
    """The variables that our files read, and their defaults; "" where there is none."""
    found = {}
    for path in (path for pattern in patterns for path in ROOT.glob(pattern)):
        read_by = variables_of_python if path.suffix == ".py" else variables_of_shell
        found.update(read_by(path.read_text()))
    return found


# By script: the files that read its variables, and the variables that no user should set
READ_BY = {
    "work.sh": (["work.sh"], set()),
    "create_datasets.sh": (["create_datasets.sh"], set()),
    "data/download_data.sh": (["data/download_data.*"], set()),
    "download_pretrained_checkpoints.sh": (["download_pretrained_checkpoints.sh",
                                            "pretrained_checkpoints/*.py"], set()),
    "align/base.sh": (["align/base.sh"], set()),
    "setup.sh": (["setup.sh"], {"NPROC", "DEVICE", "CONDA_DEFAULT_ENV", "PATH"}),
    "tests/platforms.sh": (["tests/platforms.sh"], {
        "HOME", "ID", "PWD", "SECONDS", "VERSION_ID"}),
    "run_tests.sh": (["run_tests.sh", "tests/*.py"], {"PATH", "use_mkl", "OMP_WAIT_POLICY"}),
    "src/gpt2_ft.py": (["src/**/*.py"], {
        "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK", "PMIX_SERVER_TMPDIR",
        "python_config_path", "use_mkl"}),
}


def jittors_and_pips(name: str) -> bool:
    """Whether Jittor or pip reads a variable; pip has one for each of its long options."""
    if name.startswith("PIP_"):
        option = "--" + name[len("PIP_"):].lower().replace("_", "-")
        return option in pip_options()
    return bool(re.search(rf"""["']{name}["']""", jittor_sources()))


@lru_cache(None)
def pip_options() -> str:
    return subprocess.run([sys.executable, "-m", "pip", "install", "--help"], check=True,
                          capture_output=True, text=True).stdout


@lru_cache(None)
def jittor_sources() -> str:
    return "".join(path.read_text() for package in ("jittor", "jittor_utils")
                   for folder in importlib.util.find_spec(package).submodule_search_locations
                   for path in Path(folder).glob("*.py"))


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("script", READ_BY)
def test_variables_of_a_script(name, script):
    patterns, internal = READ_BY[script]
    truth = {variable: default for variable, default in variables(*patterns).items()
             if variable not in internal}
    assert truth
    rows = [row for row in variable_rows(read(name)) if script in row.scripts]
    documented = {variable for row in rows for variable in row.names}
    assert documented <= truth.keys()
    if script.startswith("src/"):  # Jittor's variables have a separate table
        documented |= {variable for row in variable_rows(read(name)) for variable in row.names}
    assert truth.keys() <= documented
    if script != "work.sh":
        for row in rows:
            for default in (truth[variable] for variable in row.names):
                if default not in ("", "0"):
                    assert row.cells[1] == default, row.cells


@pytest.mark.parametrize("name", REFERENCES)
def test_every_variable_is_read(name):
    ours = variables("*.sh", "data/*.sh", "align/*.sh", "src/**/*.py", "data/*.py", "tests/*.py",
                     "tests/*.sh", "pretrained_checkpoints/*.py")
    rows = variable_rows(read(name))
    assert len(rows) > 40
    for row in rows:
        for variable in row.names:
            assert variable in ours or jittors_and_pips(variable), variable


def flags_in(*files: str, section: str) -> dict[str, str]:
    """The flags that files set for a script; each file overrides those before it."""
    found = {}
    for file in files:
        ini = configparser.ConfigParser(allow_no_value=True, interpolation=None)
        ini.read(ROOT / "data" / file)
        found.update(ini[section])
    return found


@pytest.mark.parametrize("name", REFERENCES)
def test_defaults_of_work_sh(name):
    """A variable that overrides a flag has the default of the flag files, else of the parser."""
    text = (ROOT / "work.sh").read_text()
    rows = {row.names[0]: row.cells[1:4] for row in variable_rows(read(name))
            if row.scripts == ("work.sh",)}
    assert all(len(row.names) == 1 for row in variable_rows(read(name))
               if row.scripts == ("work.sh",))
    unset = {variable: default for variable, default in variables_of_shell(text).items()}
    seen = set()
    for pairs, script in re.findall(
            r"^ *override ((?:.*\\\n)*.*)\n *launch src/(\w+)\.py", text, re.M):
        pretrains = "demo/base.ini" in text[text.index(pairs):][:len(pairs) + 100]
        parser = {flag["names"][0][2:]: flag["default"]
                  for flag in parsers(*STAGES)[f"src/{script}.py"]}
        for variable, flag in re.findall(r"([A-Z_]+)=(\w+)", pairs):
            seen.add(variable)
            user, demo, paper = rows[variable]
            if pretrains:
                assert demo == flags_in("demo/base.ini", section=script)[flag], variable
                continue
            for cell, files in ((user, []), (demo, ["demo/demo.ini"]), (paper, ["paper.ini"])):
                default = flags_in("experiment.ini", *files, section=script).get(flag, parser[flag])
                cell, _, of_dart = cell.partition(" (DART ")
                assert cell.split("为 ")[-1].split()[-1] == default, variable
                if of_dart:
                    assert of_dart.strip(")") == flags_in("paper_dart.ini", section=script)[flag]
    changed = flags_in("paper_dart.ini", section="gpt2_ft").keys()
    assert {variable.lower() for variable, row in rows.items() if "(DART" in row[2]} == changed
    for variable in ("DEVICE", "RESUME", "NPROC"):
        seen.add(variable)
        assert rows[variable] == [unset[variable]] * 3
    assert [WORDS[word] for word in rows["MPI_FLAGS"]] == ["none"] * 3
    assert rows.keys() - seen == {"INIT_CHECKPOINT", "MPI_FLAGS", "DATA", "WORK_DIR", "PRESET",
                                  "CORRECT_BIAS"}


@pytest.mark.parametrize("name", REFERENCES)
def test_flag_files(name):
    table = between(read(name), 1, 2)
    assert {name for row in table for name in row.names} == {
        str(path.relative_to(ROOT)) for folder in ("data", "align")
        for path in (ROOT / folder).rglob("*.ini")}


def test_variables_are_found():
    shell = """a="${DATA:-x/y}"  # ${NO:-1}
B=1; c="$B ${USER_SET} ${!variable:-}"
    override ONE=one \\
        TWO=two
"""
    assert variables_of_shell(shell) == {"DATA": "x/y", "USER_SET": "", "ONE": "", "TWO": ""}
    assert variables_of_python(
        "import os\nos.environ['A'] = '1'\nb = os.environ['B'] + os.getenv('C', 'see')\n"
        "os.environ.setdefault('D', str(b))") == {"B": "", "C": "see", "D": ""}


# Messages

Words = tuple  # of str


def words(text: str) -> Words:
    """The parts of a text between blanks, without the punctuation around them."""
    return tuple(word for part in text.split() if (word := part.strip(":;,.()'\"“”[]")))


def constant_parts(pieces: list[str]) -> list[Words]:
    """The words between the values in a template; a word joined to a value belongs to it."""
    parts = []
    for number, piece in enumerate(pieces):
        found = piece.split(" ")
        if number and found and re.match(r"[\w-]", found[0]):
            found = found[1:]
        if number < len(pieces) - 1 and found and re.search(r"[\w=-]$", found[-1]):
            found = found[:-1]
        parts.append(words(" ".join(found)))
    return [part for part in parts if part]


@lru_cache(None)
def fragments() -> set[Words]:
    """The fixed words of the messages of all programs and of the operating system."""
    found = {words(os.strerror(number)) for number in errno.errorcode}
    found |= {words(text) for text in (
        "timed out", "unrecognized arguments", "misshapen", "missing", "unexpected")}
    folders = ("src", "data", "vocab", "eval", "pretrained_checkpoints")
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                text = "".join(part.value if isinstance(part, ast.Constant) else "\0"
                               for part in node.values)
                found.update(constant_parts(text.split("\0")))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) \
                    and len(words(node.value)) > 1:
                found.add(words(node.value))
    for path in ROOT.glob("*.sh"):
        for text in re.findall(r'"((?:[^"\\]|\\.)*)"', path.read_text()):
            text = re.sub(r"\$\{[^}]*\}|\$\([^)]*\)|\$[\w*@]+", "\0", text)
            found.update(constant_parts(text.split("\0")))
    return {fragment for fragment in found if fragment}


@lru_cache(None)
def places() -> dict[str, list[tuple[Words, int]]]:
    """For each word, the fragments that contain it and its positions in them."""
    found = {}
    for fragment in fragments():
        for place, word in enumerate(fragment):
            found.setdefault(word, []).append((fragment, place))
    return found


def made_up(message: str) -> list[str]:
    """The words of a documented message that no program prints; ``...`` stands for any words.

    A fragment matches if the message contains all of it, or starts or ends within it.
    Names in quotes, folders, numbers and paths stand for any value.
    """
    wrong = []
    for piece in re.split(r"\.\.\.\S*", re.sub(r'"\w+"( and "\w+")?', "", message)):
        have = words(piece)
        covered = [word in ("nan", "sm", "METEOR") or not word.isalpha() or (ROOT / word).is_dir()
                   for word in have]
        for start, word in enumerate(have):
            for fragment, place in places().get(word, []):
                rest = fragment[place:]
                length = min(len(rest), len(have) - start)
                if ((place == 0 or start == 0) and length >= min(len(fragment), 2)
                        and have[start:start + length] == rest[:length]):
                    covered[start:start + length] = [True] * length
        wrong += [word for word, known in zip(have, covered) if not known]
    return wrong


@pytest.mark.parametrize("name", ["docs/running.md", "docs/running.cn.md"])
def test_messages_in_the_table_of_errors(name):
    tables = [table for table in read(name).tables if len(table) > 40]
    assert len(tables) == 1
    for row in tables[0]:
        assert row.names
        for message in row.names:
            assert made_up(message) == [], message
            assert set(re.findall(r"--[a-z]\w+", message)) <= {"--fp16", *(
                name for flags in parsers(*STAGES).values() for flag in flags
                for name in flag["names"])}, message


def test_made_up_messages_are_seen():
    assert made_up("a.txt:3: an empty context; encode with --add_bos") == []
    assert made_up("a.txt:3: an empty context; ...") == []
    for message in ("a.txt:3: an empty question; encode with --add_bos",
                    "a.txt:3: an empty context; encode without --add_bos",
                    "a.txt: no such folder; check the path"):
        assert made_up(message)


# Pages

def test_readmes_are_short():
    for name in ("README.md", "README.cn.md"):
        assert len((ROOT / name).read_text().splitlines()) <= 150


def broken_links(name: str, document: Document) -> list[str]:
    broken = []
    for link in document.links:
        if re.match(r"(https?|mailto):", link):
            continue
        path, _, wanted = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        if not target.exists():
            broken.append(link)
        elif wanted and wanted not in (read(os.path.relpath(target, ROOT)) if path
                                       else document).anchors:
            broken.append(link)
    return broken


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links(name):
    assert read(name).links or name == "CONTRIBUTING.md"
    assert broken_links(name, read(name)) == []


def test_broken_links_are_seen():
    document = parse("# Head `--clip` line\n# 中文 标题\n[a](#head---clip-line) [b](#中文-标题) "
                     "[c](#head) [d](none.md) [e](docs/running.md#set-up) "
                     "[f](docs/running.md#setup) `[g](no-link.md)`\n")
    assert broken_links("README.md", document) == ["#head", "none.md", "docs/running.md#setup"]


def without_prose(language: str, line: str) -> str | list[str]:
    """A line of code without its comment; of text or a diagram, only the names and numbers."""
    if language:
        return re.sub(r"(^|\s+)#.*", "", line)
    return re.findall(r"[\w./*+-]*[0-9_./][\w./*+-]*", line, re.ASCII)


def differences(ours: Document, theirs: Document) -> list[str]:
    """The differences between two documents that should be translations of each other."""
    found = []

    def compare(what, *values):
        if values[0] != values[1]:
            found.append(f"{what}: {values[0]} and {values[1]}")

    compare("headings", *([level for level, _ in document.headings] for document in (ours, theirs)))
    compare("languages of code", *([language for language, _ in document.blocks]
                                   for document in (ours, theirs)))
    for (language, lines), (_, others) in zip(ours.blocks, theirs.blocks):
        compare("code", *([without_prose(language, line) for line in block]
                          for block in (lines, others)))
    compare("tables", *([len(table) for table in document.tables] for document in (ours, theirs)))
    for row, other in zip(ours.rows(), theirs.rows()):
        compare("columns", len(row.cells), len(other.cells))
        compare("scripts", row.scripts, other.scripts)
        compare("names", *map(sorted, (row.names, other.names)))
    return found


@pytest.mark.parametrize("ours, theirs", TWINS)
def test_both_languages_say_the_same(ours, theirs):
    assert differences(read(ours), read(theirs)) == []


def test_differences_are_seen():
    text = (ROOT / "docs/reference.md").read_text()
    ours = parse(text)
    for old, new in (("| `--keep_last` |", "| `--keep` |"), ("\nbeam = 10\n", "\nbeam = 11\n"),
                     ("### Stage 5:", "#### Stage 5:"), ("| `--lower` | off |", "| off |"),
                     ("BLEU: 0.2039", "BLEU: 0.2040")):
        assert differences(ours, doctored(text, old, new))
    assert differences(ours, parse(text + "\nMore text.\n")) == []


def test_tests_that_are_named_exist():
    """docs/design.md names the tests that check each guarantee."""
    tests = {path.name: path.read_text() for path in (ROOT / "tests").glob("test_*.py")}
    for name in DOCUMENTS:
        text = (ROOT / name).read_text()
        for file in re.findall(r"`(?:tests/)?(test_[a-z0-9_]+\.py)`", text):
            assert file in tests, (name, file)
        for function in re.findall(r"`(test_\w+)`", text):
            assert any(f"def {function}(" in source for source in tests.values()), (name, function)
