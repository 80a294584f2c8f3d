"""Beam search over GPT-2, as the original experiment does it.

Scores live in NumPy: Jittor's CPU kernels are built with -Ofast, where infinities do not survive.
Shapes in comments: B samples, K beams, V tokens in the vocabulary, t tokens generated so far.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Sequence

import jittor as jt
import numpy as np

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
    state = _Beams(len(queries), options)
    query_len = np.array([len(query) for query in queries])
    padded = np.zeros((len(queries), query_len.max()), np.int32)
    for row, query in enumerate(queries):
        padded[row, :len(query)] = query
    model.eval()
    with jt.no_grad():
        logits, cache = model.start(padded, query_len, capacity=options.eval_len)  # (B, V)
        origin = state.advance(logits.numpy())
        while not state.over():
            logits = model.step(state.last_tokens(), origin, cache)  # (B * K, V)
            origin = state.advance(logits.numpy())
    return state.finish()


class _Beams:
    """The K beams of B samples, and the best finished sequence of each sample."""

    def __init__(self, samples: int, options: BeamOptions):
        self.samples, self.options = samples, options
        self.histories: list[Tokens] = [()] * samples  # of B * K rows, one a sample at first
        self.scores = np.zeros((samples, 1), np.float32)  # (B, K): log p, -inf once finished
        self.best_score = np.full(samples, -np.inf, np.float32)
        self.best: list[Tokens] = [()] * samples

    def advance(self, logits: np.ndarray) -> np.ndarray:
        """Chooses the K best next tokens of each sample from logits (B * K, V).

        Returns for each new row the row (B * K,) it goes on from.
        """
        options, beams = self.options, self.scores.shape[1]
        self._forbid(logits)
        values, tokens = top_log_probs(logits, options.beam)  # (B * K, K) each
        # The K best pairs of a sample are among the K best tokens of each of its beams.
        totals = self.scores.reshape(-1, 1) + values
        totals, tokens = (x.reshape(self.samples, -1) for x in (totals, tokens))  # (B, K * K)
        chosen = np.argsort(-totals, axis=1, kind="stable")[:, :options.beam]  # (B, K)
        self.scores = np.take_along_axis(totals, chosen, axis=1)
        tokens = np.take_along_axis(tokens, chosen, axis=1).ravel()
        origin = (chosen // options.beam + np.arange(self.samples)[:, None] * beams).ravel()
        self.histories = [self.histories[row] + (int(token),)
                          for row, token in zip(origin, tokens)]
        self._collect(lambda history: history[-1] in options.eos_token_ids)
        return origin

    def _forbid(self, logits: np.ndarray) -> None:
        """Applies the repetition penalty, min_length and the n-gram rule to logits in place."""
        options, length = self.options, len(self.histories[0])
        ends = [token for token in options.eos_token_ids if token < logits.shape[1]]
        for row, history in zip(logits, self.histories):
            if options.repetition_penalty != 1.0 and history:
                seen = np.unique(history)
                row[seen] = np.where(row[seen] < 0, row[seen] * options.repetition_penalty,
                                     row[seen] / options.repetition_penalty)
            if length < options.min_length:
                row[ends] = -np.inf
            row[repeats(history, options.no_repeat_ngram_size)] = -np.inf

    def _collect(self, finished: Callable[[Tokens], bool]) -> None:
        """Takes finished beams out of the search and keeps each sample's best."""
        beams = self.scores.shape[1]
        for row, history in enumerate(self.histories):
            sample, beam = divmod(row, beams)
            if finished(history):
                score = self.scores[sample, beam] / self._norm(len(history))
                if score > self.best_score[sample]:
                    self.best_score[sample], self.best[sample] = score, history
                self.scores[sample, beam] = -np.inf

    def _norm(self, length: int) -> np.float32:
        return np.float32(length ** self.options.length_penalty)

    def over(self) -> bool:
        """Whether no step is left that could change an answer.

        A beam's score only falls, so it can end no better than with its score of now and the
        length that divides it best.
        """
        length, longest = len(self.histories[0]), self.options.eval_len
        if length == longest:
            return True
        kindest = max(self._norm(length + 1), self._norm(longest))
        ceiling = self.scores.max(axis=1) * (1 - ROUNDING) / kindest  # scores are negative
        return bool((self.best_score >= ceiling).all())

    def last_tokens(self) -> np.ndarray:
        """The newest token of each beam: (B, K)."""
        return np.array([history[-1] for history in self.histories]).reshape(self.scores.shape)

    def finish(self) -> list[list[int]]:
        """Each sample's best sequence, zeros after it; beams that have not ended compete, too."""
        if len(self.histories[0]) == self.options.eval_len:
            self._collect(lambda history: True)
        return [list(best) + [0] * (self.options.eval_len - len(best)) for best in self.best]


def top_log_probs(logits: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest log softmax values of each row of (N, V) and their tokens, by token id."""
    high = logits.max(axis=1, keepdims=True)  # (N, 1)
    log_sum = np.log(np.exp(logits - high).sum(axis=1, keepdims=True)) + high
    tokens = np.sort(np.argpartition(logits, -k, axis=1)[:, -k:], axis=1)  # (N, k)
    return np.take_along_axis(logits, tokens, axis=1) - log_sum, tokens


def repeats(history: Tokens, size: int) -> list[int]:
    """The tokens that would end an n-gram of ``size`` tokens which ``history`` already has."""
    if size == 0 or len(history) + 1 < size:
        return []
    last = history[len(history) - size + 1:]
    return [history[i + size - 1] for i in range(len(history) - size + 1)
            if history[i:i + size - 1] == last]
