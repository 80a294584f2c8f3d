"""Stage 1: converts DART (v1.1.1) to JSON lines, by default a random hundredth of it.

    python src/format_converting_dart.py IN OUT [--fraction 0.01] [--seed 2025]

OUT gets ``{"context": triples, "completion": text}`` for each text, relations in lower case. A draw
takes each context at most once; ``--fraction 1`` writes all in the order of the file.
"""

from __future__ import annotations

from conversion import Entry, draw, linearize, read_entries
from runtime.flags import ArgumentParser, add_conversion_flags
from runtime.formats import write_jsonl
from runtime.progress import log
from runtime.script import run


def read_examples(path: str) -> tuple[list[dict], int]:
    """The examples of a DART file in its order, and the number of its entries.

    Raises InputError that names the file and the entry where something is missing or malformed.
    """
    examples, entries = [], read_entries(path, "dart")
    for entry in entries:
        context = linearize([triple_of(triple) for triple in entry["tripleset"].items("triple")])
        for annotation in entry["annotations"].items("annotation"):
            examples.append({"context": context, "completion": annotation["text"].text()})
    if not examples:
        entries[0].fail("neither here nor later an annotation")
    return examples, len(entries)


def triple_of(triple: Entry) -> tuple[str, str, str]:
    """Subject, relation in lower case, object."""
    parts = triple.items("part")
    if len(parts) != 3:
        triple.fail(f"has {len(parts)} parts, must be [subject, relation, object]")
    subject, relation, thing = (part.text() for part in parts)
    return subject, relation.lower(), thing


def main() -> None:
    parser = ArgumentParser(__doc__)
    add_conversion_flags(parser, "data/dart/dart-v1.1.1-full-train.json", seed=2025)
    args = parser.parse_args()

    examples, entries = read_examples(args.input)
    chosen = draw(args.input, examples, args.fraction, args.seed)
    write_jsonl(args.output, chosen)
    log(f"unique source is {entries}")
    log(f"{args.output}: {len(chosen)} of {len(examples)} examples")


if __name__ == "__main__":
    run(main)
