"""The E2E challenge's reference and prediction files: plain text, TSV and CSV.

Text files have one prediction per line; or one reference per line, with an empty line after the
references of each input; without empty lines, each input has one reference. TSV and CSV files (the
file extension decides) have a column of sources and one of texts, found by their headings; a file
without headings has only these two columns. In a file with LF or CRLF line ends, a CR inside a
line or a quoted cell is white space.
"""

from __future__ import annotations

import csv
import re
from functools import partial
from typing import NamedTuple

from runtime.errors import InputError
from runtime.formats import read_lines

_SOURCE = re.compile(
    r"(?:mr|src|source|meaning(?:[_ .-]rep(?:resentation)?)?|da|dial(?:ogue)?[_ .-]act)s?", re.I)
_PREDICTION = re.compile(
    r"(?:out(?:put)?|ref(?:erence)?|sys(?:tem)?(?:[_ .-](?:out(?:put)?|ref(?:erence)?))?)s?", re.I)
_REFERENCE = re.compile(
    r"(?:trg|tgt|target|ref(?:erence)?|human(?:[_ .-](?:ref(?:erence)?))?)s?", re.I)
_REPAIRS = (("Ł", "£"), ("Â£", "£"), ("Ã©", "é"), ("ã©", "é"))  # wrongly decoded UTF-8

_lines = partial(read_lines, cr_in_lines=True)


class Segment(NamedTuple):
    """One input of the challenge; ``source`` is empty if the files do not have it."""

    source: str
    references: list[str]
    prediction: str


class Row(NamedTuple):
    """A data row of a table, and the number of the line it ends on."""

    line: int
    source: str
    text: str


def load(ref_file: str, pred_file: str, src_file: str | None = None) -> list[Segment]:
    """The segments of a reference and a prediction file, in the order of the predictions.

    With ``src_file`` (one source per line) the predictions must be a table with the same sources.
    Raises InputError for files that are missing, malformed or do not belong together.
    """
    if src_file is not None or _is_table(pred_file):
        rows = _read_table(pred_file, _PREDICTION)
        sources, predictions = [row.source for row in rows], [row.text for row in rows]
        if src_file is not None:
            _check_sources(pred_file, rows, src_file)
    else:
        predictions = [line.strip() for line in _lines(pred_file)]
        sources = [""] * len(predictions)
    if not predictions:
        raise InputError(f"{pred_file}: the file is empty; it must have one prediction per line")

    if _is_table(ref_file):
        groups = _references_of_table(ref_file, sources)
    else:
        groups = _references_of_text(ref_file, len(predictions))
    if len(groups) != len(predictions):
        raise InputError(
            f"{ref_file} has references for {len(groups)} inputs, but {pred_file} has "
            f"{len(predictions)} predictions; give one prediction per input, in the same order "
            "(an empty line ends the references of an input)")
    return [Segment(*parts) for parts in zip(sources, groups, predictions)]


def _is_table(path: str) -> bool:
    return path.lower().endswith((".tsv", ".csv"))


def _read_table(path: str, text_heading: re.Pattern) -> list[Row]:
    """The rows of a TSV or CSV file (a tab in its first line makes it TSV), headings left out."""
    numbered = []
    for number, line in enumerate(_lines(path), start=1):
        for wrong, right in _REPAIRS:
            line = line.replace(wrong, right)
        if line.strip():
            numbered.append((number, line.strip(" ")))
    if not numbered:
        raise InputError(f"{path}: the file is empty; it must have a source and a text per line")

    lines = [line for _, line in numbered]
    reader = csv.reader(lines, delimiter="\t" if "\t" in lines[0] else ",")
    rows = []
    try:
        for fields in reader:
            rows.append((numbered[reader.line_num - 1][0], [field.strip() for field in fields]))
    except csv.Error as error:
        line = numbered[reader.line_num - 1][0]
        raise InputError(f"{path}:{line}: {error}; check the quotation marks") from None

    width = len(rows[0][1])
    if width == 1 and ";" in lines[0]:
        raise InputError(f"{path}:1: the separators are semicolons; save the table with commas, "
                         "or as .tsv with tabs")
    for line, fields in rows:
        if len(fields) != width:
            raise InputError(f"{path}:{line}: {len(fields)} columns, but {width} in the first "
                             "line; check separators and quotation marks")
    columns = _columns(path, rows[0][1], text_heading)
    if columns is None:
        columns = 0, 1
    else:
        rows = rows[1:]
    return [Row(line, fields[columns[0]], fields[columns[1]]) for line, fields in rows]


def _columns(path: str, first: list[str], text_heading: re.Pattern) -> tuple[int, int] | None:
    """The columns of sources and texts; None if there are only these two and no headings."""
    # As in the challenge's script, a heading only has to start with the right word, but one of
    # the two must be no more than that: "mr 1" and "Outside the city, ..." are a row of data.
    starting, exact = ([[column for column, field in enumerate(first) if match(pattern, field)]
                        for pattern in (_SOURCE, text_heading)]
                       for match in (re.match, re.fullmatch))
    for found in (starting, exact):
        if any(exact) and [len(columns) for columns in found] == [1, 1]:
            return found[0][0], found[1][0]
    if not any(exact) and not all(starting) and len(first) == 2:
        return None
    raise InputError(f"{path}:1: cannot tell the column of sources from that of texts; head one "
                     "column 'source' and one 'reference', or give just these two in this order")


def _check_sources(pred_file: str, rows: list[Row], src_file: str) -> None:
    """Raises InputError unless the table's sources are the lines of ``src_file``."""
    expected = [line.strip() for line in _lines(src_file)]
    if len(rows) != len(expected):
        raise InputError(f"{pred_file} has {len(rows)} predictions, but {src_file} has "
                         f"{len(expected)} sources; give one prediction per source")
    for row, source in zip(rows, expected):
        if row.source != source:
            raise InputError(f"{pred_file}:{row.line}: the source '{row.source}' should be "
                             f"'{source}', as in {src_file}; put the rows in its order")


def _references_of_table(path: str, sources: list[str]) -> list[list[str]]:
    """The references of each source, or of each run of equal sources if they are unknown."""
    rows = _read_table(path, _REFERENCE)
    if not any(sources):
        groups, previous = [], None
        for row in rows:
            if row.source != previous:
                groups.append([])
            groups[-1].append(row.text)
            previous = row.source
        return groups
    by_source: dict[str, list[str]] = {}
    for row in rows:
        by_source.setdefault(row.source, []).append(row.text)
    for source in sources:
        if source not in by_source:
            raise InputError(f"{path}: no reference for the source '{source}'; add one, or leave "
                             "out its prediction")
    return [by_source[source] for source in sources]


def _references_of_text(path: str, predictions: int) -> list[list[str]]:
    """The groups of references of a text file, for a number of ``predictions``."""
    lines = [line.strip() for line in _lines(path)]
    separated = "" in lines
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise InputError(f"{path}: no references in it; it must have one or more per input")
    groups: list[list[str]] = [[]]
    for number, line in enumerate(lines, start=1):
        if line:
            groups[-1].append(line)
        elif groups[-1]:
            groups.append([])
        else:
            raise InputError(f"{path}:{number}: an input without references; give it one, or "
                             "leave out the empty line")
    if len(groups) == 1 and not (separated and predictions == 1):
        return [[line] for line in groups[0]]
    return groups
