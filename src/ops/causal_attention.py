"""Causal self-attention over whole sequences (Vaswani et al., 2017)."""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import Sequence

import jittor as jt
import numpy as np
from jittor import nn

from ops.native import constant, run, upload, wants_plain

Spans = Sequence[tuple[int, int]]

MASKED = -1e10  # a score whose softmax is exactly 0; -Ofast does not allow infinity


def causal_attention(qkv: jt.Var, lengths: Sequence[int],
                     prefixes: Spans | None = None) -> jt.Var:
    """Each position of a sequence attends to itself and to the positions before it.

    qkv (N, 3, H, D) float32 holds query, key and value of each head, for the sequences of the given
    ``lengths`` one after the other, whose sum is N -> (N, H, D). With ``prefixes``, each position
    of sequence i also attends to the tokens prefixes[i][0] to prefixes[i][1] - 1, which stand
    before it as another sequence; then there are no gradients.
    """
    if wants_plain():
        return plain_causal_attention(qkv, lengths, prefixes)
    if prefixes is None:
        return _CausalAttention.apply(qkv, list(lengths))
    return _forward(qkv, _starts(lengths), prefixes)[0]


class _CausalAttention(jt.Function):
    def execute(self, qkv, lengths):
        starts = _starts(lengths)
        y, log_sums = _forward(qkv, starts)
        self.saved = {"qkv (tokens, _, heads)": qkv, "starts": starts, "y": y, "log_sums": log_sums}
        self.sequences = len(lengths)
        return y

    def grad(self, dy):
        tokens, heads, depth = dy.shape
        dqkv, = _run("grad_causal_attention", {"dqkv": (tokens, 3, heads, depth)},
                     {**self.saved, "dy": dy}, depth, self.sequences)
        return dqkv, None


def _starts(lengths: Sequence[int]) -> jt.Var:
    return constant((0, *itertools.accumulate(lengths)))


def _forward(qkv: jt.Var, starts: jt.Var, prefixes: Spans | None = None) -> list[jt.Var]:
    """y (N, H, D) and log_sums (N, H), which the gradient needs."""
    tokens, _, heads, depth = qkv.shape
    return _run("causal_attention", {"y": (tokens, heads, depth), "log_sums": (tokens, heads)},
                {"qkv (tokens, _, heads)": qkv, "starts": starts,
                 "prefixes": None if prefixes is None else
                 constant(tuple(itertools.chain(*prefixes)))},
                depth, starts.shape[0] - 1)


def _run(function, outputs, inputs, depth, sequences):
    # The loops over a head's depth are short: they are faster if the compiler knows it.
    return run("causal_attention", f"{function}<{depth}>", outputs, inputs,
               "dim3(tokens, heads), ATTENTION_THREADS", sequences=sequences)


def plain_causal_attention(qkv: jt.Var, lengths: Sequence[int],
                           prefixes: Spans | None = None) -> jt.Var:
    """:func:`causal_attention` in Jittor's own operators, which compute padded sequences.

    Transposes leave the last axis where it is: others are made on the CPU, see docs/design.md.
    """
    prefixes = prefixes or [(0, 0)] * len(lengths)
    queries, keys, visible, kept = _padded(tuple(lengths), tuple(prefixes))
    _, _, H, D = qkv.shape
    (B, T), S = queries.shape, keys.shape[1]

    def heads(tokens: jt.Var, which: int) -> jt.Var:  # (B, _) -> (B * H, _, D)
        return qkv[tokens, which].transpose(0, 2, 1, 3).reshape((B * H, -1, D))

    q, k, v = heads(queries, 0), heads(keys, 1), heads(keys, 2)
    scores = (nn.bmm_transpose(q, k) / math.sqrt(D)).reshape((B, H, T, S))
    visible = visible.unsqueeze(1).broadcast(scores.shape)
    weights = plain_softmax(jt.ternary(visible, scores, jt.full(scores.shape, MASKED)))
    mixed = nn.bmm(weights.reshape((B * H, T, S)), v).reshape((B, H, T, D))
    return mixed.transpose(0, 2, 1, 3).reshape((B * T, H, D))[kept]  # (N, H, D)


@lru_cache(maxsize=2)
def _padded(lengths: tuple[int, ...],
            prefixes: tuple[tuple[int, int], ...]) -> tuple[jt.Var, jt.Var, jt.Var, jt.Var]:
    """How B sequences and their prefixes are padded: to T tokens, before them to P of a prefix.

    Which tokens the queries (B, T) and the keys (B, P + T) are; whether a query may see a key
    (B, T, P + T); where the N tokens are among the B * T. Padding repeats some token.
    """
    length, (begin, end) = np.array(lengths)[:, None], np.array(prefixes).T[:, :, None]  # (B, 1)
    first = np.cumsum(length)[:, None] - length  # (B, 1)
    t, p = np.arange(length.max()), np.arange((end - begin).max())  # (T,), (P,)
    queries = first + np.minimum(t, length - 1)  # (B, T)
    keys = np.concatenate([np.where(p < end - begin, begin + p, 0), queries], axis=1)
    shape = (len(lengths), len(t), len(p))
    visible = np.concatenate([np.broadcast_to((p < end - begin)[:, None], shape),
                              np.broadcast_to(t <= t[:, None], (*shape[:2], len(t)))], axis=2)
    return (upload(queries.astype(np.int32)), upload(keys.astype(np.int32)), upload(visible),
            upload(np.flatnonzero(t < length).astype(np.int32)))


def plain_softmax(scores: jt.Var, dim: int = -1) -> jt.Var:
    """Softmax over an axis, of the same shape; a score of MASKED becomes exactly 0."""
    weights = jt.exp(scores - scores.max(dim=dim, keepdims=True))
    return weights / weights.sum(dim=dim, keepdims=True)
