"""Causal self-attention over whole sequences (Vaswani et al., 2017)."""

from __future__ import annotations

import math
from typing import Sequence

import jittor as jt
import numpy as np

from ops.native import run, wants_plain

MASKED = -1e10  # a score whose softmax is exactly 0; -Ofast does not allow infinity


def causal_attention(qkv: jt.Var, lengths: Sequence[int],
                     prefixes: Sequence[tuple[int, int]] | None = None) -> jt.Var:
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
    return jt.array(np.cumsum([0, *lengths], dtype=np.int32))


def _forward(qkv: jt.Var, starts: jt.Var,
             prefixes: Sequence[tuple[int, int]] | None = None) -> list[jt.Var]:
    """y (N, H, D) and log_sums (N, H), which the gradient needs."""
    tokens, _, heads, depth = qkv.shape
    return _run("causal_attention", {"y": (tokens, heads, depth), "log_sums": (tokens, heads)},
                {"qkv (tokens, _, heads)": qkv, "starts": starts,
                 "prefixes": None if prefixes is None else jt.array(np.array(prefixes, np.int32))},
                depth, starts.shape[0] - 1)


def _run(function, outputs, inputs, depth, sequences):
    # The loops over a head's depth are short: they are faster if the compiler knows it.
    return run("causal_attention", f"{function}<{depth}>", outputs, inputs,
               "dim3(tokens, heads), ATTENTION_THREADS", sequences=sequences)


def plain_causal_attention(qkv: jt.Var, lengths: Sequence[int],
                           prefixes: Sequence[tuple[int, int]] | None = None) -> jt.Var:
    """:func:`causal_attention` in Jittor's own operators."""
    mixed, first = [], 0
    for length, (begin, end) in zip(lengths, prefixes or [(0, 0)] * len(lengths)):
        own = qkv[first:first + length]  # (T, 3, H, D)
        seen = jt.concat([qkv[begin:end], own], dim=0) if end > begin else own  # (S + T, 3, H, D)
        q, k, v = (x.transpose(1, 0, 2) for x in (own[:, 0], seen[:, 1], seen[:, 2]))  # (H, _, D)
        scores = jt.matmul(q, k.transpose(0, 2, 1)) / math.sqrt(q.shape[-1])  # (H, T, S + T)
        past = jt.index(scores.shape, 2) <= jt.index(scores.shape, 1) + (end - begin)
        weights = plain_softmax(jt.ternary(past, scores, jt.full(scores.shape, MASKED)))
        mixed.append(jt.matmul(weights, v).transpose(1, 0, 2))  # (T, H, D)
        first += length
    return jt.concat(mixed, dim=0)


def plain_softmax(scores: jt.Var) -> jt.Var:
    """Softmax over the last axis, of the same shape; a score of MASKED becomes exactly 0."""
    weights = jt.exp(scores - scores.max(dim=-1, keepdims=True))
    return weights / weights.sum(dim=-1, keepdims=True)
