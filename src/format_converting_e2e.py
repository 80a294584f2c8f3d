"""Stage 1: converts the E2E corpus to JSON lines, by default a random hundredth of it.

    python src/format_converting_e2e.py IN OUT [--fraction 0.01] [--seed 2025]

IN holds one example a line, ``meaning representation||text``; OUT gets
``{"context": meaning representation, "completion": text}``. A draw takes each meaning
representation at most once; ``--fraction 1`` writes the whole file in its own order.
"""

import random
from decimal import Decimal

from runtime.errors import InputError
from runtime.flags import ArgumentParser, fraction
from runtime.formats import read_lines, write_jsonl
from runtime.progress import log
from runtime.script import run

SEPARATOR = "||"


def read_examples(path: str) -> list[dict]:
    """The examples of a raw E2E file, in its order; blanks around a line are not part of it.

    Raises InputError for a file that is missing, empty or no text, and for a line without "||".
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


def draw(path: str, examples: list[dict], share: Decimal, seed: int) -> list[dict]:
    """A random share of the examples of ``path``, with different contexts, in the order drawn.

    Raises InputError if that is less than one example, or if there are too few contexts.
    """
    n, distinct = int(len(examples) * share), len({example["context"] for example in examples})
    if n == 0:
        raise InputError(f"{path}: a share of {share} of {len(examples)} lines is less than one "
                         "line; take a larger --fraction (1: the whole file)")
    if n > distinct:
        raise InputError(f"{path}: {n} different meaning representations wanted, there are "
                         f"{distinct}; take a smaller --fraction, or 1 for the whole file")
    rng = random.Random(seed)
    drawn: dict[str, dict] = {}
    while len(drawn) < n:
        example = rng.choice(examples)
        drawn.setdefault(example["context"], example)
    return list(drawn.values())


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("input", metavar="IN", help="raw file, e.g. data/e2e/train.txt")
    parser.add_argument("output", metavar="OUT",
                        help="JSON lines, e.g. data/e2e/train_formatted.jsonl")
    parser.add_argument("--fraction", type=fraction, default="0.01",
                        help="share of the lines to draw; 1 takes the whole file")
    parser.add_argument("--seed", type=int, default=2025, help="seed of the draw")
    args = parser.parse_args()

    examples = read_examples(args.input)
    chosen = examples
    if args.fraction < 1:
        chosen = draw(args.input, examples, args.fraction, args.seed)
    write_jsonl(args.output, chosen)
    log(f"{args.output}: {len(chosen)} of {len(examples)} examples")


if __name__ == "__main__":
    run(main)
