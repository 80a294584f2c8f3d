"""Causal self-attention over whole sequences (Vaswani et al., 2017)."""

import math
from typing import Sequence

import jittor as jt
import numpy as np

from ops.native import run, wants_plain

MASKED = -1e10  # a score whose softmax is exactly 0; -Ofast does not allow infinity


def causal_attention(qkv: jt.Var, lengths: Sequence[int]) -> jt.Var:
    """Each position of a sequence attends to itself and to the positions before it.

    qkv (N, 3, H, D) float32 holds query, key and value of each head, for the sequences of the given
    ``lengths`` one after the other, whose sum is N -> (N, H, D).
    """
    if wants_plain():
        return plain_causal_attention(qkv, lengths)
    return _CausalAttention.apply(qkv, list(lengths))


class _CausalAttention(jt.Function):
    def execute(self, qkv, lengths):
        tokens, _, heads, self.depth = qkv.shape
        starts = jt.array(np.cumsum([0, *lengths], dtype=np.int32))
        self.sequences = len(lengths)
        self.saved = {"qkv (tokens, _, heads)": qkv, "starts": starts}
        outputs = {"y": (tokens, heads, self.depth), "log_sums": (tokens, heads)}
        y, log_sums = self._run("causal_attention", outputs, self.saved)
        self.saved.update(y=y, log_sums=log_sums)
        return y

    def grad(self, dy):
        shape = (dy.shape[0], 3, *dy.shape[1:])
        dqkv, = self._run("grad_causal_attention", {"dqkv": shape}, {**self.saved, "dy": dy})
        return dqkv, None

    def _run(self, function, outputs, inputs):
        # The loops over a head's depth are short: they are faster if the compiler knows it.
        return run("causal_attention", f"{function}<{self.depth}>", outputs, inputs,
                   "dim3(tokens, heads), ATTENTION_THREADS", sequences=self.sequences)


def plain_causal_attention(qkv: jt.Var, lengths: Sequence[int]) -> jt.Var:
    """:func:`causal_attention` in Jittor's own operators."""
    mixed, first = [], 0
    for length in lengths:
        q, k, v = (qkv[first:first + length, i].transpose(1, 0, 2) for i in range(3))  # (H, T, D)
        scores = jt.matmul(q, k.transpose(0, 2, 1)) / math.sqrt(q.shape[-1])  # (H, T, T)
        past = jt.index(scores.shape, 2) <= jt.index(scores.shape, 1)  # (H, T, T)
        weights = plain_softmax(jt.ternary(past, scores, jt.full(scores.shape, MASKED)))
        mixed.append(jt.matmul(weights, v).transpose(1, 0, 2))  # (T, H, D)
        first += length
    return jt.concat(mixed, dim=0)


def plain_softmax(scores: jt.Var) -> jt.Var:
    """Softmax over the last axis, of the same shape; a score of MASKED becomes exactly 0."""
    weights = jt.exp(scores - scores.max(dim=-1, keepdims=True))
    return weights / weights.sum(dim=-1, keepdims=True)
