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
    """How to search; the defaults are those of the original's flags. Sampling ignores ``beam``."""

    beam: int = 1
    eval_len: int = 256  # most tokens to generate
    min_length: int = 0  # no end token before so many tokens
    length_penalty: float = 1.0  # a finished sequence scores log p / length ** length_penalty
    no_repeat_ngram_size: int = 4  # no n-gram of this size twice; 0: no such rule
    repetition_penalty: float = 1.0  # on tokens generated before (Keskar et al., 2019); 1: none
    eos_token_ids: frozenset[int] = frozenset({50256})


@dataclass(frozen=True)
class Hypothesis:
    """A continuation, with its end token if it has one, and its score."""

    tokens: Tokens
    score: np.float32


def predict(generator: Generator, queries: Sequence[Tokens], options: BeamOptions, batch_size: int,
            on_batch: Callable[[dict[Tokens, list[int]]], object] = lambda answers: None,
            ) -> list[list[int]]:
    """The best continuation of each query: at most eval_len token ids, the end token included.

    Equal queries are searched once. ``batch_size`` queries are searched at a time, which changes
    the speed only (on the CPU, scores are the same to the last bit). ``on_batch`` gets the answers
    of each batch, by query.
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
    return [list(found[0].tokens) if found else []
            for found in search_n_best(generator, queries, options, n=1)]


def search_n_best(generator: Generator, queries: Sequence[Tokens], options: BeamOptions,
                  n: int) -> list[list[Hypothesis]]:
    """The ``n`` finished sequences of the highest scores for each query, the best first.

    Up to ``beam`` there are always as many, unless the rules forbid all further tokens.
    """
    beams = _Beams(len(queries), options, n)
    with jt.no_grad():
        logits, cache = generator.start(*padded(queries), options.eval_len, options.beam)  # (B, V)
        origin = beams.advance(logits)
        while len(origin):
            newest = np.array([history[-1] for history in beams.histories])  # (R,)
            logits = generator.step(newest, origin, cache)  # (R, V)
            origin = beams.advance(logits)
    return beams.finished


def padded(queries: Sequence[Tokens]) -> tuple[np.ndarray, np.ndarray]:
    """Queries as Generator.start takes them: (B, Q) padded on the right, and lengths (B,)."""
    query_len = np.array([len(query) for query in queries])
    query = np.zeros((len(queries), query_len.max()), np.int32)
    for row, tokens in enumerate(queries):
        query[row, :len(tokens)] = tokens
    return query, query_len


class _Beams:
    """The live beams of B samples, R <= B * K in all, and each sample's n best finished ones."""

    def __init__(self, samples: int, options: BeamOptions, n: int):
        self.options, self.n = options, n
        lengths = range(1, options.eval_len + 1)
        self.norms = [np.float32(length ** options.length_penalty) for length in lengths]
        # One row for each live beam, at first one for each sample; the rows of a sample are
        # neighbours, the best first.
        self.sample = np.arange(samples)  # (R,): the sample that each row belongs to
        self.scores = np.zeros(samples, np.float32)  # (R,): log p of the row's tokens
        self.histories: list[Tokens] = [()] * samples
        self.finished: list[list[Hypothesis]] = [[] for _ in range(samples)]  # the best first

    def advance(self, logits: jt.Var) -> np.ndarray:
        """Continues each sample's beams by the K best next tokens, given logits (R, V).

        Returns for each new row the number of the old row that it continues; an empty array ends
        the search.
        """
        options, old = self.options, self.histories
        # The K likeliest tokens of each row, (R, K) each.
        values, tokens = ops.top_log_probs(logits, options.beam,
                                           *rules(old, options, logits.shape[1]))
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

    def _finish(self, sample: int, history: Tokens, score: np.float32) -> None:
        score = score / self.norms[len(history) - 1]
        found = self.finished[sample]
        if score > -np.inf:
            at = sum(1 for other in found if score <= other.score)  # behind equal ones
            found.insert(at, Hypothesis(history, score))
            del found[self.n:]

    def _may_win(self, sample: int, history: Tokens, score: np.float32) -> bool:
        """Whether a beam can still end with a better score than its sample's n-th best sequence.

        A beam's score never rises, so the bound is its present score over the most favourable
        length.
        """
        norm, found = max(self.norms[len(history)], self.norms[-1]), self.finished[sample]
        least = found[-1].score if len(found) == self.n else -np.inf
        return bool(score > -np.inf and score * (1 - ROUNDING) / norm > least)


def rules(histories: Sequence[Tokens], options: BeamOptions,
          vocab_size: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]], float]:
    """What the options demand of the next token of each row, as ops.top_log_probs takes it.

    Places (row, token) that min_length and the n-gram rule forbid, places of tokens seen before,
    and the penalty on these.
    """
    forbidden: list[tuple[int, int]] = []
    seen: list[tuple[int, int]] = []
    for row, history in enumerate(histories):
        if options.repetition_penalty != 1.0:
            seen += [(row, token) for token in set(history)]
        if len(history) < options.min_length:
            forbidden += [(row, token) for token in options.eos_token_ids if token < vocab_size]
        forbidden += [(row, token) for token in repeats(history, options.no_repeat_ngram_size)]
    return forbidden, seen, options.repetition_penalty


def repeats(history: Tokens, size: int) -> list[int]:
    """The tokens that would repeat an n-gram of ``size`` tokens that ``history`` contains."""
    if size == 0 or len(history) + 1 < size:
        return []
    last = history[len(history) - size + 1:]
    return [history[i + size - 1] for i in range(len(history) - size + 1)
            if history[i:i + size - 1] == last]
