"""Stage 1: converts the E2E corpus to JSON lines, by default a random hundredth of it.

    python src/format_converting_e2e.py IN OUT [--fraction 0.01] [--seed 2025]

IN holds one example a line, ``meaning representation||text``, where the text may be empty; OUT gets
``{"context": meaning representation, "completion": text}``. A draw takes each meaning
representation at most once; ``--fraction 1`` writes the whole file in its own order.
"""

from decimal import ROUND_FLOOR

from conversion import REMEDY, draw, without_reference
from runtime.errors import InputError
from runtime.flags import ArgumentParser, add_conversion_flags
from runtime.formats import read_lines, write_jsonl
from runtime.progress import log
from runtime.script import run

SEPARATOR = "||"


def read_examples(path: str) -> list[dict]:
    """The examples of a raw E2E file, in its order; blanks around a line are not part of it.

    Raises InputError for a file that is missing, empty or no text, and for a line without "||".
    """
    examples = []
    for number, line in enumerate(read_lines(path, REMEDY.format("e2e")), start=1):
        context, separator, completion = line.strip().partition(SEPARATOR)
        if not separator:
            raise InputError(f"{path}:{number}: no \"{SEPARATOR}\"; every line must be "
                             f"meaning representation{SEPARATOR}text, or without a text "
                             f"meaning representation{SEPARATOR}")
        examples.append({"context": context, "completion": completion})
    if not examples:
        raise InputError(f"{path}: the file is empty; {REMEDY.format('e2e')}")
    return examples


def main() -> None:
    parser = ArgumentParser(__doc__)
    add_conversion_flags(parser, "data/e2e/train.txt", seed=2025)
    args = parser.parse_args()

    examples = read_examples(args.input)
    chosen = draw(args.input, examples, args.fraction, args.seed, ROUND_FLOOR)
    write_jsonl(args.output, chosen)
    log(f"{args.output}: {len(chosen)} of {len(examples)} examples"
        + without_reference([example["completion"] for example in chosen]))


if __name__ == "__main__":
    run(main)
