"""BLEU and NIST over a whole document, as NIST's mteval-v13a computes them.

BLEU: Papineni et al. (2002), section 2. NIST: Doddington (2002), equations 2 and 3. Both compare
lower-cased tokens. Details on which implementations differ are those of the Python version in the
E2E challenge's script, so that the figures can be put beside published ones: an empty text is
one (empty) token, and a text of k tokens counts as k - n + 1 n-grams even where that is negative,
so that BLEU and sentBLEU of a single text of fewer than 4 tokens mean little.
"""

from __future__ import annotations

import math
import re
from collections import Counter

_ENTITIES = (("<skipped>", ""), ("-\n", ""), ("\n", " "),
             ("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))
_SPACING = tuple((re.compile(pattern), spaced) for pattern, spaced in (
    (r"([ -&(-+/:-@\[-`{-~])", r" \1 "),  # every ASCII symbol but ' , - .
    (r"([^0-9])([.,])", r"\1 \2 "),       # . and , except in numbers such as 1,000.5
    (r"([.,])([^0-9])", r" \1 \2"),
    (r"([0-9])(-)", r"\1 \2 "),           # the dash of a range such as 20-25
))


def tokenize(text: str) -> list[str]:
    """The lower-cased tokens of a text; never an empty list (see above)."""
    for entity, character in _ENTITIES:
        text = text.replace(entity, character)
    text = f" {text} "
    for pattern, spaced in _SPACING:
        text = pattern.sub(spaced, text)
    return [token.lower() for token in text.split()] or [""]


def ngrams(tokens: list[str], n: int) -> Counter:
    """How often each n-gram (a tuple of n tokens) occurs."""
    return Counter(zip(*(tokens[i:] for i in range(n))))


def matches(prediction: list[str], references: list[list[str]], n: int) -> Counter:
    """The prediction's n-grams, each at most as often as the reference richest in it has it."""
    allowed = Counter()
    for reference in references:
        allowed |= ngrams(reference, n)
    return ngrams(prediction, n) & allowed


class Bleu:
    """Adds up a document's segments and gives its BLEU, between 0 and 1.

    ``smoothing`` is added to matches and totals of every n: 0 for a document, 1 for the
    sentence-level variant (sentBLEU).
    """

    def __init__(self, max_n: int = 4, smoothing: float = 0.0):
        self.max_n, self.smoothing = max_n, smoothing
        self.matched = [0] * max_n  # [n - 1]: n-grams found in the references
        self.total = [0] * max_n    # [n - 1]: n-grams of the predictions
        self.reference_length = 0   # tokens

    def add(self, prediction: str, references: list[str]) -> None:
        """Counts a segment: a prediction and its references, at least one."""
        tokens = tokenize(prediction)
        others = [tokenize(reference) for reference in references]
        for n in range(1, self.max_n + 1):
            self.matched[n - 1] += sum(matches(tokens, others, n).values())
            self.total[n - 1] += len(tokens) - n + 1
        # The reference closest in length, of two equally close ones the shorter.
        self.reference_length += min((abs(len(other) - len(tokens)), len(other))
                                     for other in others)[1]

    def score(self) -> float:
        """BLEU of the segments added so far; 0 where there are none."""
        length = self.total[0]
        if length == 0:
            return 0.0
        log_precision = 0.0
        for matched, total in zip(self.matched, self.total):
            # The two floors keep the logarithm defined where nothing matches.
            log_precision += math.log(max(matched + self.smoothing, 1e-15)
                                      / max(total + self.smoothing, 1e-9))
        brevity_penalty = math.exp(min(0.0, 1 - self.reference_length / length))
        return brevity_penalty * math.exp(log_precision / self.max_n)


class Nist:
    """Adds up a document's segments and gives its NIST score, 0 or more.

    A match counts as much as its last token is surprising after those before it, in bits,
    estimated from all references of the document.
    """

    # At 2/3 of the references' length the length penalty is 1/2.
    BETA = math.log(2) / math.log(1.5) ** 2

    def __init__(self, max_n: int = 5):
        self.max_n = max_n
        self.matched = [Counter() for _ in range(max_n)]  # [n - 1]: matched n-grams
        self.total = [0] * max_n                          # [n - 1]: n-grams of the predictions
        self.known = Counter()       # n-grams of all references, every n; (): all their tokens
        self.reference_length = 0.0  # tokens, averaged over a segment's references

    def add(self, prediction: str, references: list[str]) -> None:
        """Counts a segment: a prediction and its references, at least one."""
        tokens = tokenize(prediction)
        others = [tokenize(reference) for reference in references]
        for n in range(1, self.max_n + 1):
            self.matched[n - 1] += matches(tokens, others, n)
            self.total[n - 1] += len(tokens) - n + 1
            for other in others:
                self.known.update(ngrams(other, n))
        length = sum(map(len, others))
        self.known[()] += length
        self.reference_length += length / len(others)

    def information(self, ngram: tuple[str, ...]) -> float:
        """The bits of an n-gram that the references contain."""
        return math.log2(self.known[ngram[:-1]] / self.known[ngram])

    def score(self) -> float:
        """NIST score of the segments added so far; 0 where there are none."""
        if self.reference_length == 0:
            return 0.0
        gain = 0.0
        for matched, total in zip(self.matched, self.total):
            bits = sum(count * self.information(ngram) for ngram, count in matched.items())
            gain += bits / (total or 1)
        ratio = min(1.0, self.total[0] / self.reference_length)
        return gain * math.exp(-self.BETA * math.log(ratio) ** 2)
