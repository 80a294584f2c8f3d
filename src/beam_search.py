"""Beam search over GPT-2, as the original experiment does it.

Scores live in NumPy: Jittor's CPU kernels are built with -Ofast, where infinities do not survive.
Shapes in comments: B samples, K beams, R beams alive, V tokens in the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Sequence

import jittor as jt
import numpy as np

import ops
from model import GPT2LMModel

Tokens = tuple[int, ...]
# Rounding may lift a sum of log probabilities this much above the exact one, relative to it.
ROUNDING = 1e-4


@dataclass(frozen=True)
class BeamOptions:
    """How to search; the defaults are those of the original's flags."""

    beam: int = 1
    eval_len: int = 256  # most tokens to generate
    min_length: int = 0  # no end token before so many
    length_penalty: float = 1.0  # a finished sequence scores log p / length ** length_penalty
    no_repeat_ngram_size: int = 4  # no n-gram of this size twice; 0: any
    repetition_penalty: float = 1.0  # of tokens generated before (Keskar et al., 2019)
    eos_token_ids: frozenset[int] = frozenset({50256})


def predict(model: GPT2LMModel, queries: Sequence[Tokens], options: BeamOptions, batch_size: int,
            on_done: Callable[[int], None] = lambda count: None) -> list[list[int]]:
    """The best continuation of each query: eval_len token ids, zeros after the sequence.

    Equal queries are searched once. ``batch_size`` queries are searched side by side, which
    changes nothing but the speed. ``on_done`` hears how many more queries have their answer.
    """
    uses: dict[Tokens, int] = {}
    for query in queries:
        uses[query] = uses.get(query, 0) + 1
    distinct = sorted(uses, key=len)  # neighbours of like length need little padding
    answers: dict[Tokens, list[int]] = {}
    for start in range(0, len(distinct), batch_size):
        batch = distinct[start:start + batch_size]
        answers.update(zip(batch, search(model, batch, options)))
        on_done(sum(uses[query] for query in batch))
    return [answers[query] for query in queries]


def search(model: GPT2LMModel, queries: Sequence[Tokens], options: BeamOptions) -> list[list[int]]:
    """One batch of :func:`predict`, all at once."""
    beams = _Beams(len(queries), options)
    query_len = np.array([len(query) for query in queries])
    padded = np.zeros((len(queries), query_len.max()), np.int32)
    for row, query in enumerate(queries):
        padded[row, :len(query)] = query
    model.eval()
    with jt.no_grad():
        logits, cache = model.start(padded, query_len, options.eval_len, options.beam)  # (B, V)
        origin = beams.advance(logits)
        while len(origin):
            logits = model.step(beams.last_tokens(), origin, cache)  # (R, V)
            origin = beams.advance(logits)
    return [list(best) + [0] * (options.eval_len - len(best)) for best in beams.best]


class _Beams:
    """The live beams of B samples, R <= B * K in all, and each sample's best finished sequence."""

    def __init__(self, samples: int, options: BeamOptions):
        self.options = options
        lengths = range(1, options.eval_len + 1)
        self.norms = [np.float32(length ** options.length_penalty) for length in lengths]
        # One row a live beam, those of a sample together and the best first; one a sample at first.
        self.sample = np.arange(samples)  # (R,): whose beam it is
        self.scores = np.zeros(samples, np.float32)  # (R,): log p
        self.histories: list[Tokens] = [()] * samples
        self.best_score = np.full(samples, -np.inf, np.float32)
        self.best: list[Tokens] = [()] * samples

    def advance(self, logits: jt.Var) -> np.ndarray:
        """Continues each sample's beams by the K best next tokens, given logits (R, V).

        Returns for each new row the old one (R,) it goes on from: none once the search is over.
        """
        options, old = self.options, self.histories
        values, tokens = self._allowed(logits)  # (R, K) each
        # The K best pairs of a sample are among the K best tokens of each of its beams.
        totals, live = self.scores[:, None] + values, []
        for sample in np.unique(self.sample):
            rows = np.flatnonzero(self.sample == sample)
            pairs = totals[rows]  # (beams of the sample, K)
            for pair in np.argsort(-pairs, axis=None, kind="stable")[:options.beam]:
                row, column = rows[pair // options.beam], pair % options.beam
                history, score = old[row] + (int(tokens[row, column]),), totals[row, column]
                if len(history) == options.eval_len or history[-1] in options.eos_token_ids:
                    self._finish(sample, history, score)
                else:
                    live.append((sample, row, history, score))
        live = [beam for beam in live if self._may_win(beam[0], beam[2], beam[3])]
        self.sample = np.array([sample for sample, _, _, _ in live], np.int64)
        self.scores = np.array([score for _, _, _, score in live], np.float32)
        self.histories = [history for _, _, history, _ in live]
        return np.array([row for _, row, _, _ in live], np.int64)

    def _allowed(self, logits: jt.Var) -> tuple[np.ndarray, np.ndarray]:
        """The K likeliest tokens of each row, after penalty, min_length and the n-gram rule."""
        options, forbidden, seen = self.options, [], []
        for row, history in enumerate(self.histories):
            if options.repetition_penalty != 1.0:
                seen += [(row, token) for token in set(history)]
            if len(history) < options.min_length:
                forbidden += [(row, token) for token in options.eos_token_ids
                              if token < logits.shape[1]]
            forbidden += [(row, token) for token in repeats(history, options.no_repeat_ngram_size)]
        return ops.top_log_probs(logits, options.beam, forbidden, seen, options.repetition_penalty)

    def _finish(self, sample: int, history: Tokens, score: np.float32) -> None:
        score = score / self.norms[len(history) - 1]
        if score > self.best_score[sample]:
            self.best_score[sample], self.best[sample] = score, history

    def _may_win(self, sample: int, history: Tokens, score: np.float32) -> bool:
        """Whether a beam is alive and its sample not decided.

        A beam's score only falls, so it can end no better than with its score of now and the
        length that divides it best.
        """
        kindest = max(self.norms[len(history)], self.norms[-1])
        return score > -np.inf and score * (1 - ROUNDING) / kindest > self.best_score[sample]

    def last_tokens(self) -> np.ndarray:
        """The newest token of each row (R,)."""
        return np.array([history[-1] for history in self.histories])


def repeats(history: Tokens, size: int) -> list[int]:
    """The tokens that would end an n-gram of ``size`` tokens which ``history`` already has."""
    if size == 0 or len(history) + 1 < size:
        return []
    last = history[len(history) - size + 1:]
    return [history[i + size - 1] for i in range(len(history) - size + 1)
            if history[i:i + size - 1] == last]
