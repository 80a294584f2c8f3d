"""TER, the translation edit rate (Snover et al., 2006), as the package pyter3 computes it.

An edit inserts, deletes or replaces a word, or moves a run of words. Moves are chosen one by one,
but not by the rules of tercom, the paper's program (sacrebleu's TER), whose scores differ.
"""

from __future__ import annotations

from typing import Iterator

from rapidfuzz.distance.Levenshtein import distance


def ter(hypothesis: list[str], reference: list[str]) -> float:
    """The number of edits from hypothesis to reference, divided by the reference's length.

    Both are lists of words. It may exceed 1; where the reference has no words it is 1.
    """
    if not reference:
        return 1.0
    # Each word becomes one character, in the order of the words: texts of them compare as lists of
    # words do, and are much faster to cut, to compare and to measure.
    letters = {word: chr(n) for n, word in enumerate(sorted({*hypothesis, *reference}))}
    text, wanted = ("".join(letters[word] for word in words) for words in (hypothesis, reference))
    moves, edits = 0, distance(text, wanted)
    while True:
        # The move that saves most; of equally good ones, the last text in alphabetical order.
        saved, after = max(((edits - distance(moved, wanted), moved)
                            for moved in set(moved_texts(text, wanted))), default=(0, text))
        if saved <= 0:
            return (moves + edits) / len(wanted)
        text, moves, edits = after, moves + 1, edits - saved


def moved_texts(text: str, wanted: str) -> Iterator[str]:
    """``text`` after each possible move.

    For each character text[i] that is also wanted[j], i != j, the longest run that both have from
    there on is cut out of ``text`` and put into the rest at position j, or at the end of it.
    """
    for i, character in enumerate(text):
        for j, other in enumerate(wanted):
            if i != j and character == other:
                n = 1
                while i + n < len(text) and text[i + n:i + n + 1] == wanted[j + n:j + n + 1]:
                    n += 1
                rest = text[:i] + text[i + n:]
                yield rest[:j] + text[i:i + n] + rest[j:]


def document(hypotheses: list[list[str]], references: list[list[list[str]]]) -> float:
    """The mean of the segments' TER, each the least over the segment's references."""
    return sum(min(ter(hypothesis, reference) for reference in group)
               for hypothesis, group in zip(hypotheses, references)) / len(hypotheses)
