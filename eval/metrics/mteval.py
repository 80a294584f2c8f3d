"""BLEU and NIST over a whole document, as the E2E challenge's script computes them.

BLEU: Papineni et al. (2002), section 2. NIST: Doddington (2002), equations 2 and 3. Both compare
lower-cased tokens. The script has two versions, which differ in details, and so in the scores of
documents with very short or empty texts:

- with ``v13a``, as without its flag -p, NIST's mteval-v13a.pl: an empty text has no tokens, a text
  of k < n tokens no n-grams. The k-th precision without a match counts as 1/2^k of a match, one
  without n-grams as 1.
- else, as with -p, a Python version: an empty text is one (empty) token, and a text of k tokens
  counts as k - n + 1 n-grams even where that is negative, so that BLEU and sentBLEU of a single
  text of fewer than 4 tokens mean little.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter

_ENTITIES = (("<skipped>", ""), ("-\n", ""), ("\n", " "),
             ("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))
_SPACING = tuple((re.compile(pattern), spaced) for pattern, spaced in (
    (r"([ -&(-+/:-@\[-`{-~])", r" \1 "),  # every ASCII symbol but ' , - .
    (r"([^0-9])([.,])", r"\1 \2 "),       # . and , except in numbers such as 1,000.5
    (r"([.,])([^0-9])", r" \1 \2"),
    (r"([0-9])(-)", r"\1 \2 "),           # the dash of a range such as 20-25
))
_ASCII_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)
_PERL_TOKEN = re.compile(r"[\S\x1c-\x1f]+")  # \x1c to \x1f are white space in Python only


def tokenize(text: str, v13a: bool = False) -> list[str]:
    """The tokens of a text, in lower case (with ``v13a`` only A to Z, as in mteval-v13a.pl)."""
    for entity, character in _ENTITIES:
        text = text.replace(entity, character)
    text = f" {text} "
    for pattern, spaced in _SPACING:
        text = pattern.sub(spaced, text)
    if v13a:
        return _PERL_TOKEN.findall(text.translate(_ASCII_LOWER))
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


def ngram_count(tokens: list[str], n: int, v13a: bool) -> int:
    """How many n-grams a text has; see the head of this file."""
    count = len(tokens) - n + 1
    return max(0, count) if v13a else count


class Bleu:
    """Adds up a document's segments and gives its BLEU, between 0 and 1.

    ``smoothing`` is added to matches and totals of every n: 0 for a document, 1 for the
    sentence-level variant (sentBLEU), which only the Python version has.
    """

    def __init__(self, max_n: int = 4, smoothing: float = 0.0, v13a: bool = False):
        self.max_n, self.smoothing, self.v13a = max_n, smoothing, v13a
        self.matched = [0] * max_n  # [n - 1]: n-grams found in the references
        self.total = [0] * max_n    # [n - 1]: n-grams of the predictions
        self.reference_length = 0   # tokens

    def add(self, prediction: str, references: list[str]) -> None:
        """Counts a segment: a prediction and its references, at least one."""
        tokens = tokenize(prediction, self.v13a)
        others = [tokenize(reference, self.v13a) for reference in references]
        for n in range(1, self.max_n + 1):
            self.matched[n - 1] += sum(matches(tokens, others, n).values())
            self.total[n - 1] += ngram_count(tokens, n, self.v13a)
        # The reference closest in length, of two equally close ones the shorter. mteval-v13a.pl
        # skips references without tokens, but not the first.
        lengths = [len(others[0]), *filter(None, map(len, others[1:]))]
        self.reference_length += min((abs(length - len(tokens)), length)
                                     for length in lengths)[1]

    def score(self) -> float:
        """BLEU of the segments added so far; 0 where there are none."""
        length = self.total[0]
        if length == 0:
            return 0.0
        log_precision, unmatched = 0.0, 1.0
        for matched, total in zip(self.matched, self.total):
            if not self.v13a:  # the two floors keep the logarithm defined where nothing matches
                log_precision += math.log(max(matched + self.smoothing, 1e-15)
                                          / max(total + self.smoothing, 1e-9))
            elif total:
                unmatched /= 1 if matched else 2
                log_precision += math.log((matched or unmatched) / total)
        brevity_penalty = math.exp(min(0.0, 1 - self.reference_length / length))
        return brevity_penalty * math.exp(log_precision / self.max_n)


class Nist:
    """Adds up a document's segments and gives its NIST score, 0 or more.

    A match counts as much as its last token is surprising after those before it, in bits,
    estimated from all references of the document.
    """

    # At 2/3 of the references' length the length penalty is 1/2.
    BETA = math.log(2) / math.log(1.5) ** 2

    def __init__(self, max_n: int = 5, v13a: bool = False):
        self.max_n, self.v13a = max_n, v13a
        self.matched = [Counter() for _ in range(max_n)]  # [n - 1]: matched n-grams
        self.total = [0] * max_n       # [n - 1]: n-grams of the predictions
        self.known = Counter()         # n-grams of all references, every n; (): all their tokens
        self.mean_lengths = 0.0        # tokens, averaged over a segment's references and added up
        self.segments = self.references = 0  # references: those with tokens

    def add(self, prediction: str, references: list[str]) -> None:
        """Counts a segment: a prediction and its references, at least one."""
        tokens = tokenize(prediction, self.v13a)
        others = [tokenize(reference, self.v13a) for reference in references]
        for n in range(1, self.max_n + 1):
            self.matched[n - 1] += matches(tokens, others, n)
            self.total[n - 1] += ngram_count(tokens, n, self.v13a)
            for other in others:
                self.known.update(ngrams(other, n))
        length = sum(map(len, others))
        self.known[()] += length
        self.mean_lengths += length / len(others)
        self.segments += 1
        self.references += sum(map(bool, others))

    def information(self, ngram: tuple[str, ...]) -> float:
        """The bits of an n-gram that the references contain."""
        before = ngram[:-1]
        if self.v13a and before == ("0",):  # false in Perl, which takes it for no tokens
            before = ()
        return math.log2(self.known[before] / self.known[ngram])

    def score(self) -> float:
        """NIST score of the segments added so far; 0 where there are none."""
        if not self.known[()] or self.total[0] <= 0:
            return 0.0
        gain = 0.0
        for matched, total in zip(self.matched, self.total):
            bits = sum(count * self.information(ngram) for ngram, count in matched.items())
            gain += bits / (total or 1)
        # mteval-v13a.pl divides the length of all references by their mean number a segment.
        reference_length = (self.known[()] * self.segments / self.references if self.v13a
                            else self.mean_lengths)
        ratio = min(1.0, self.total[0] / reference_length)
        return gain * math.exp(-self.BETA * math.log(ratio) ** 2)
