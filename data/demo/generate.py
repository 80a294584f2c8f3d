"""Writes the corpora of the embedded demo: invented places, described in a few notations.

    python data/demo/generate.py OUT_DIR [--seed 2025]

A place has several slots (name, type, food ...). It can be written as a *record*, the meaning
representation of the E2E data set; as a *card*, its values in a row; or as *prose*:

    name : Silver Fox | Type : wine bar | food : Thai curry | family friendly : yes
    Card : Silver Fox ; wine bar ; Thai curry ; yes
    Silver Fox is a wine bar serving Thai curry. Families are welcome.

The broad corpus (``base_*``), on which a small base model is pretrained, teaches the words, the
prose and the copying of facts, but has no example that leads from a record to prose:

    record -> card      card -> prose      prose -> prose      prose -> record

The fine-tuning corpus (``train``, ``valid``, ``test``) is record -> prose: LoRA only has to combine
skills that the base has. The places in ``test`` are in no other file, and each has several
references, one per line. A file holds JSON lines of ``context`` and ``completion``; the same seed
gives the same bytes in every Python version. Names and phrases are our own; of the E2E data set,
only the format is used.
"""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path
from typing import Callable, Iterator

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from runtime.flags import ArgumentParser  # noqa: E402
from runtime.formats import write_jsonl  # noqa: E402
from runtime.script import run  # noqa: E402

# Slots in the order in which they are written, with their values. Values start with a consonant,
# because the prose has "a" before them. Most are two words that are in no other value: a model
# first learns which word follows which, so it soon copies these correctly, and only much later
# one-word values.
SLOTS = {
    "name": ("Silver Fox", "Copper Bell", "Ivory Swan", "Scarlet Spoon", "Crimson Crown",
             "Coral Garden", "Velvet Owl", "Jade Lantern", "Maple Barrel", "Cedar Wolf",
             "Hazel Bear", "Pepper Rose"),
    "Type": ("wine bar", "coffee shop", "burger diner", "family restaurant", "village pub"),
    "food": ("Thai curry", "Greek salad", "Spanish rice", "Turkish bread", "Mexican beans",
             "Korean soup", "Persian lamb", "Danish cheese"),
    "price": ("low cost", "mid range", "high end"),
    "area": ("old harbour", "flower market", "central station", "green park", "royal castle",
             "new university"),
    "family friendly": ("yes", "no"),
    "near": ("Town Hall", "Stone Bridge", "City Museum", "Grand Canal", "West Gate",
             "Post Office"),
}
OPTIONAL = ("price", "area", "family friendly", "near")  # one to three of them are present

# Prose. {slot} is the slot's value or phrase; [...] is left out if its slot is absent.
SENTENCES = (
    "{name} is a[ {price}] {Type} serving {food}[ by the {area}][ near the {near}]."
    "[ {family friendly}]",
    "You will find {food} at {name}, a[ {price}] {Type}[ near the {near}][ by the {area}]."
    "[ {family friendly}]",
    "The[ {price}] {Type} {name} offers {food}[ near the {near}][ by the {area}]."
    "[ {family friendly}]",
    "{name}, a[ {price}] {Type}[ by the {area}][ near the {near}], is the place for {food}."
    "[ {family friendly}]",
)
PHRASES = {"family friendly": {"yes": "Families are welcome.", "no": "It is for adults only."}}

# Places of each file. Each is one line; in the test file, each of its references is one line.
BASE_TRAIN, BASE_VALID = 7200, 240
TRAIN, VALID, TEST = 1600, 80, 48

Place = dict  # slot -> value, in the order of SLOTS
Example = dict  # {"context": str, "completion": str}


def draw_place(rng: random.Random) -> Place:
    """A place with every required slot and one to three of the optional ones."""
    absent = rng.sample(OPTIONAL, rng.randint(1, 3))
    return {slot: rng.choice(values) for slot, values in SLOTS.items() if slot not in absent}


def as_record(place: Place) -> str:
    """The E2E meaning representation, ``slot : value | ...``."""
    return " | ".join(f"{slot} : {value}" for slot, value in place.items())


def as_card(place: Place) -> str:
    """The values alone, ``Card : value ; ...``."""
    return "Card : " + " ; ".join(place.values())


def as_prose(place: Place, sentence: str) -> str:
    """``sentence``, one of SENTENCES, about ``place``."""
    phrases = {slot: PHRASES.get(slot, {}).get(value, value) for slot, value in place.items()}

    def optional(match: re.Match) -> str:
        text = match.group(1)
        return text if all(slot in place for slot in re.findall(r"{(.+?)}", text)) else ""

    return re.sub(r"\[(.+?)\]", optional, sentence).format_map(phrases)


def record_to_card(place: Place, rng: random.Random) -> Example:
    return {"context": as_record(place), "completion": as_card(place)}


def card_to_prose(place: Place, rng: random.Random) -> Example:
    return {"context": as_card(place), "completion": as_prose(place, rng.choice(SENTENCES))}


def prose_to_prose(place: Place, rng: random.Random) -> Example:
    context, completion = rng.sample(SENTENCES, 2)
    return {"context": as_prose(place, context), "completion": as_prose(place, completion)}


def prose_to_record(place: Place, rng: random.Random) -> Example:
    return {"context": as_prose(place, rng.choice(SENTENCES)), "completion": as_record(place)}


def record_to_prose(place: Place, rng: random.Random) -> Example:
    return {"context": as_record(place), "completion": as_prose(place, rng.choice(SENTENCES))}


BASE_FAMILIES = (record_to_card, card_to_prose, prose_to_prose, prose_to_record)


def generate(seed: int) -> dict[str, list[Example]]:
    """The examples of every file, by the file's name. No place is in two files."""
    rng = random.Random(seed)
    places = fresh_places(rng)

    def examples(count: int, families: tuple[Callable, ...]) -> list[Example]:
        return [families[i % len(families)](next(places), rng) for i in range(count)]

    test = [{"context": as_record(place), "completion": as_prose(place, sentence)}
            for place in (next(places) for _ in range(TEST)) for sentence in SENTENCES]
    return {
        "test": test,
        "valid": examples(VALID, (record_to_prose,)),
        "train": examples(TRAIN, (record_to_prose,)),
        "base_valid": examples(BASE_VALID, BASE_FAMILIES),
        "base_train": examples(BASE_TRAIN, BASE_FAMILIES),
    }


def fresh_places(rng: random.Random) -> Iterator[Place]:
    """Yields places without end, none of them twice."""
    seen = set()
    while True:
        place = draw_place(rng)
        record = as_record(place)
        if record not in seen:
            seen.add(record)
            yield place


def main() -> None:
    parser = ArgumentParser("Writes the corpora of the embedded demo.")
    parser.add_argument("out_dir", type=Path, help="folder for the *_formatted.jsonl files")
    parser.add_argument("--seed", type=int, default=2025, help="of the drawing")
    args = parser.parse_args()
    for name, examples in generate(args.seed).items():
        write_jsonl(args.out_dir / f"{name}_formatted.jsonl", examples)


if __name__ == "__main__":
    run(main)
