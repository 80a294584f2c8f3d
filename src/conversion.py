"""What stages 1, 2 and 5 share: reading JSON, drawing a share of the examples, counting."""

from __future__ import annotations

import os
import random
from decimal import ROUND_CEILING, Decimal
from typing import Iterable, NoReturn

from runtime.errors import InputError
from runtime.formats import is_text, read_json

REMEDY = "run: bash data/download_data.sh {}"  # with the name of the data set


class Entry:
    """A part of a JSON file; ``where`` says which one and ``remedy`` what to do, for errors."""

    def __init__(self, where: str, value: object, remedy: str):
        self.where, self.value, self.remedy = where, value, remedy

    def fail(self, problem: str) -> NoReturn:
        raise InputError(f"{self.where}: {problem}; correct it, or {self.remedy}")

    def items(self, what: str) -> list[Entry]:
        """The elements of this list, counted from 1; ``what`` one is called."""
        if not isinstance(self.value, list):
            self.fail(f"must be a list, one {what} an element")
        return [Entry(f"{self.where}, {what} {n}", item, self.remedy)
                for n, item in enumerate(self.value, start=1)]

    def __getitem__(self, key: str) -> Entry:
        """The value that this object has for ``key``."""
        if not isinstance(self.value, dict) or key not in self.value:
            self.fail(f"no \"{key}\"")
        return Entry(f"{self.where}, \"{key}\"", self.value[key], self.remedy)

    def text(self) -> str:
        """This text."""
        if not is_text(self.value):
            self.fail("must be a text (valid Unicode)")
        return str(self.value)


def read_entries(path: str | os.PathLike, data_set: str, key: str | None = None) -> list[Entry]:
    """The entries of a JSON file: its list, or that under ``key`` of its object.

    Raises InputError for a file that is missing, no JSON, or holds no list of entries; the remedy
    names the ``data_set``.
    """
    remedy = REMEDY.format(data_set)
    whole = Entry(str(path), read_json(path, remedy), remedy)
    entries = (whole[key] if key else whole).items("entry")
    if not entries:
        whole.fail("has no entries")
    for number, entry in enumerate(entries, start=1):
        entry.where = f"{path}: entry {number}"
    return entries


def linearize(triples: list[tuple[str, str, str]]) -> str:
    """A context: ``subject : relation : object | subject : ...``."""
    return " | ".join(" : ".join(triple) for triple in triples)


def draw(path: str, examples: list[dict], share: Decimal, seed: int,
         rounding: str = ROUND_CEILING) -> list[dict]:
    """A random share of the examples of ``path``, with different contexts, in the order drawn.

    Their number is rounded up, or down with ROUND_FLOOR. A share of 1 is all examples in their own
    order, duplicates included. Raises InputError if the share is less than one example, or if there
    are too few contexts.
    """
    if share == 1:
        return examples
    n = int((len(examples) * share).to_integral_value(rounding))
    distinct = len({example["context"] for example in examples})
    if n == 0:
        raise InputError(f"{path}: a share of {share} of {len(examples)} examples is less than "
                         "one; take a larger --fraction (1: the whole file)")
    if n > distinct:
        raise InputError(f"{path}: {n} examples with different contexts wanted, there are "
                         f"{distinct}; take a smaller --fraction, or 1 for the whole file")
    rng = random.Random(seed)
    drawn: dict[str, dict] = {}
    while len(drawn) < n:
        example = rng.choice(examples)
        drawn.setdefault(example["context"], example)
    return list(drawn.values())


def without_reference(completions: Iterable[str]) -> str:
    """The end of a log line: how many of the inputs have no reference, if any lacks it."""
    blank = [not completion.strip() for completion in completions]
    return f"; {sum(blank)} of {len(blank)} inputs have no reference" if any(blank) else ""
