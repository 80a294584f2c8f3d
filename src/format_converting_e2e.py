"""Stage 1: converts the E2E corpus to JSON lines, by default a random hundredth of it.

    python src/format_converting_e2e.py IN OUT [--fraction 0.01] [--seed 2025]

IN holds one example a line, ``meaning representation||text``; OUT gets
``{"context": meaning representation, "completion": text}``. A draw takes each meaning
representation at most once; ``--fraction 1`` writes the whole file in its own order.
"""

from __future__ import annotations

import argparse
import random
from decimal import Decimal

from runtime.errors import InputError
from runtime.formats import read_lines, write_jsonl
from runtime.progress import log
from runtime.script import run

SEPARATOR = "||"


def read_examples(path: str) -> list[dict]:
    """The examples of a raw E2E file, in its order; blanks around a line are not part of it.

    Raises InputError for a file that is missing, empty or not UTF-8, and for a line without "||".
    """
    examples = []
    for number, line in enumerate(read_lines(path, "run: bash data/download_data.sh"), start=1):
        context, separator, completion = line.strip().partition(SEPARATOR)
        if not separator:
            raise InputError(f"{path}:{number}: no \"{SEPARATOR}\"; every line must be "
                             f"meaning representation{SEPARATOR}text")
        examples.append({"context": context, "completion": completion})
    if not examples:
        raise InputError(f"{path}: the file is empty; run: bash data/download_data.sh")
    return examples


def draw(examples: list[dict], n: int, seed: int) -> list[dict]:
    """``n`` random examples with different contexts, in the order in which they were drawn.

    Raises ValueError if there are fewer than ``n`` different contexts.
    """
    distinct = len({example["context"] for example in examples})
    if n > distinct:
        raise ValueError(f"{n} different meaning representations wanted, there are {distinct}")
    rng = random.Random(seed)
    drawn: dict[str, dict] = {}
    while len(drawn) < n:
        example = rng.choice(examples)
        drawn.setdefault(example["context"], example)
    return list(drawn.values())


def fraction(text: str) -> Decimal:
    """A share of the file, 0 < share <= 1; decimal, so that 0.01 is a hundredth exactly."""
    try:
        value = Decimal(text)
        if 0 < value <= 1:
            return value
    except ArithmeticError:  # not a number
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and up to 1")


def main() -> None:
    parser = argparse.ArgumentParser(description="Converts the E2E corpus to JSON lines.")
    parser.add_argument("input", metavar="IN", help="raw file, e.g. data/e2e/train.txt")
    parser.add_argument("output", metavar="OUT",
                        help="JSON lines, e.g. data/e2e/train_formatted.jsonl")
    parser.add_argument("--fraction", type=fraction, default=Decimal("0.01"),
                        help="share of the lines to draw; 1 takes the whole file "
                             "(default %(default)s)")
    parser.add_argument("--seed", type=int, default=2025,
                        help="seed of the draw (default %(default)s)")
    args = parser.parse_args()

    examples = read_examples(args.input)
    chosen = examples
    if args.fraction < 1:
        n = int(len(examples) * args.fraction)
        if n == 0:
            raise InputError(f"{args.input}: a share of {args.fraction} of {len(examples)} lines "
                             "is less than one line; take a larger --fraction (1: the whole file)")
        try:
            chosen = draw(examples, n, args.seed)
        except ValueError as error:
            raise InputError(f"{args.input}: {error}; take a smaller --fraction, or 1 for the "
                             "whole file") from None
    write_jsonl(args.output, chosen)
    log(f"{args.output}: {len(chosen)} of {len(examples)} examples")


if __name__ == "__main__":
    run(main)
