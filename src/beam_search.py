"""Beam search over GPT-2, as the original experiment does it.

Scores are NumPy arrays, because Jittor compiles its CPU kernels with -Ofast, which does not keep
infinities. Shapes in comments: B samples, K beams, R live beams, V tokens in the vocabulary.
"""

from dataclasses import dataclass
from typing import Callable, Sequence

import jittor as jt
import numpy as np

import ops
from generator import Generator

Tokens = tuple[int, ...]
# Rounding may make a sum of log probabilities larger by this share of it.
ROUNDING = 1e-4


@dataclass(frozen=True)
class BeamOptions:
    """How to search; the defaults are those of the original's flags."""

    beam: int = 1
    eval_len: int = 256  # most tokens to generate
    min_length: int = 0  # no end token before so many tokens
    length_penalty: float = 1.0  # a finished sequence scores log p / length ** length_penalty
    no_repeat_ngram_size: int = 4  # no n-gram of this size twice; 0: no such rule
    repetition_penalty: float = 1.0  # on tokens generated before (Keskar et al., 2019); 1: none
    eos_token_ids: frozenset[int] = frozenset({50256})


def predict(generator: Generator, queries: Sequence[Tokens], options: BeamOptions, batch_size: int,
            on_batch: Callable[[dict[Tokens, list[int]]], object] = lambda answers: None,
            ) -> list[list[int]]:
    """The best continuation of each query: at most eval_len token ids, the end token included.

    Equal queries are searched once. ``batch_size`` queries are searched at a time, which changes
    the speed only. ``on_batch`` gets the answers of each batch, by query.
    """
    distinct = sorted(dict.fromkeys(queries), key=len)  # similar lengths need little padding
    answers: dict[Tokens, list[int]] = {}
    for start in range(0, len(distinct), batch_size):
        batch = distinct[start:start + batch_size]
        found = dict(zip(batch, search(generator, batch, options)))
        answers.update(found)
        on_batch(found)
    return [answers[query] for query in queries]


def search(generator: Generator, queries: Sequence[Tokens],
           options: BeamOptions) -> list[list[int]]:
    """One batch of :func:`predict`."""
    beams = _Beams(len(queries), options)
    query_len = np.array([len(query) for query in queries])
    padded = np.zeros((len(queries), query_len.max()), np.int32)
    for row, query in enumerate(queries):
        padded[row, :len(query)] = query
    with jt.no_grad():
        logits, cache = generator.start(padded, query_len, options.eval_len, options.beam)  # (B, V)
        origin = beams.advance(logits)
        while len(origin):
            newest = np.array([history[-1] for history in beams.histories])  # (R,)
            logits = generator.step(newest, origin, cache)  # (R, V)
            origin = beams.advance(logits)
    return [list(best) for best in beams.best]


class _Beams:
    """The live beams of B samples, R <= B * K in all, and each sample's best finished sequence."""

    def __init__(self, samples: int, options: BeamOptions):
        self.options = options
        lengths = range(1, options.eval_len + 1)
        self.norms = [np.float32(length ** options.length_penalty) for length in lengths]
        # One row for each live beam, at first one for each sample; the rows of a sample are
        # neighbours, the best first.
        self.sample = np.arange(samples)  # (R,): the sample that each row belongs to
        self.scores = np.zeros(samples, np.float32)  # (R,): log p of the row's tokens
        self.histories: list[Tokens] = [()] * samples
        self.best_score = np.full(samples, -np.inf, np.float32)
        self.best: list[Tokens] = [()] * samples

    def advance(self, logits: jt.Var) -> np.ndarray:
        """Continues each sample's beams by the K best next tokens, given logits (R, V).

        Returns for each new row the number of the old row that it continues; an empty array ends
        the search.
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
        options = self.options
        forbidden: list[tuple[int, int]] = []  # (row, token)
        seen: list[tuple[int, int]] = []
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
        """Whether a beam can still end with a better score than its sample's best sequence.

        A beam's score never rises, so the bound is its present score over the most favourable
        length.
        """
        norm = max(self.norms[len(history)], self.norms[-1])
        return bool(score > -np.inf and score * (1 - ROUNDING) / norm > self.best_score[sample])


def repeats(history: Tokens, size: int) -> list[int]:
    """The tokens that would repeat an n-gram of ``size`` tokens that ``history`` contains."""
    if size == 0 or len(history) + 1 < size:
        return []
    last = history[len(history) - size + 1:]
    return [history[i + size - 1] for i in range(len(history) - size + 1)
            if history[i:i + size - 1] == last]
