"""Stage 1: converts WebNLG (challenge 2017) to JSON lines, by default a random hundredth of it.

    python src/format_converting_webnlg.py IN OUT [--fraction 0.01] [--seed 123]

OUT gets ``{"context": triples, "completion": text, "cate": seen}`` for each text whose comment is
"good"; "cate" is whether the training set has the category. A draw takes each context at most once;
``--fraction 1`` writes all in the order of the file.
"""

from __future__ import annotations

from collections import Counter

from conversion import Entry, draw, linearize, read_entries
from runtime.flags import ArgumentParser, add_conversion_flags
from runtime.formats import write_jsonl
from runtime.progress import log
from runtime.script import run

SEEN = {"Airport", "Astronaut", "Building", "City", "ComicsCharacter", "Food", "Monument",
        "SportsTeam", "University", "WrittenWork"}


def read_examples(path: str) -> tuple[list[dict], Counter[str]]:
    """The examples of a WebNLG file in its order, and the number of entries of each category.

    Raises InputError that names the file and the entry where something is missing or malformed.
    """
    examples: list[dict] = []
    categories: Counter[str] = Counter()
    entries = read_entries(path, "webnlg", "entries")
    for numbered in entries:
        entry = content(numbered)
        category = entry["category"].text()
        categories[category] += 1
        context = linearize([
            (triple["subject"].text(), triple["property"].text(), triple["object"].text())
            for triple in entry["modifiedtripleset"].items("triple")])
        for text in entry["lexicalisations"].items("text"):
            completion = text["lex"].text()
            if text["comment"].text() == "good":
                examples.append({"context": context, "completion": completion,
                                 "cate": category in SEEN})
    if not examples:
        entries[0].fail('neither here nor later a text whose "comment" is "good"')
    return examples, categories


def content(numbered: Entry) -> Entry:
    """What an entry holds under its number, its only key."""
    if not isinstance(numbered.value, dict) or len(numbered.value) != 1:
        numbered.fail('must be an object with one key, its number: {"1": ...}')
    return numbered[next(iter(numbered.value))]


def main() -> None:
    parser = ArgumentParser(__doc__)
    add_conversion_flags(parser, "data/webnlg_challenge_2017/train.json", seed=123)
    args = parser.parse_args()

    examples, categories = read_examples(args.input)
    chosen = draw(args.input, examples, args.fraction, args.seed)
    write_jsonl(args.output, chosen)
    for category, entries in categories.items():
        log(f"cate {category} {entries}")
    log(f"{args.output}: {len(chosen)} of {len(examples)} examples")


if __name__ == "__main__":
    run(main)
