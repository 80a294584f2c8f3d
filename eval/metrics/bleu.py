"""BLEU (Papineni et al., 2002) in the two ways in which WebNLG's evaluation computes it.

In both ``hypotheses`` has a text for each segment, and ``references`` a list of texts.
"""

from __future__ import annotations

from itertools import zip_longest

from nltk.tokenize.destructive import NLTKWordTokenizer
from nltk.translate.bleu_score import SmoothingFunction, corpus_bleu
from sacrebleu.metrics import BLEU

_TOKENIZER = NLTKWordTokenizer()


def words(text: str) -> list[str]:
    """The words of a text as NLTK's word_tokenize finds them in texts that stage 5 tokenized.

    There they stand between blanks; '"' becomes two backquotes, and "cannot" or "gonna" two words.
    word_tokenize would divide a text into sentences before, for which it needs data. That matters
    only for text that is not tokenized: here a full stop is a word only at the text's end.
    """
    return _TOKENIZER.tokenize(text)


def bleu(hypotheses: list[str], references: list[list[str]]) -> float:
    """BLEU as multi-bleu-detok.perl computes it, 0 to 100: case-sensitive, not smoothed.

    The texts are divided by the rules of mteval-v13a. Only white space that is not ASCII, which
    stage 5 removes with --tokenize, is a blank here and was a character there.
    """
    # As columns, the first references of all segments, then the second ones; None where there is
    # none. ``force`` says that the texts are tokenized on purpose.
    columns = list(zip_longest(*references))
    metric = BLEU(tokenize="13a", lowercase=False, smooth_method="none", force=True)
    return metric.corpus_score(hypotheses, columns).score


def bleu_nltk(hypotheses: list[list[str]], references: list[list[list[str]]]) -> float:
    """NLTK's BLEU of lists of words, 0 to 1, with its smoothing of NIST (``method3``).

    References without words are left out, and segments without other references.
    """
    references = [[reference for reference in group if reference] for group in references]
    pairs = [(group, hypothesis) for group, hypothesis in zip(references, hypotheses) if group]
    if not pairs:
        return 0.0
    return float(corpus_bleu(*zip(*pairs), smoothing_function=SmoothingFunction().method3))
