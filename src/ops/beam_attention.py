"""Attention of each beam's new token to its query and to the tokens generated before."""

from __future__ import annotations

import math

import jittor as jt

from ops.causal_attention import MASKED, plain_softmax
from ops.native import run, wants_plain


def beam_attention(qkv: jt.Var, prefix: jt.Var, spans: jt.Var, store: jt.Var | None,
                   ancestors: jt.Var, capacity: int, widest: int,
                   longest: int) -> tuple[jt.Var, jt.Var]:
    """One new token per row attends to its query, to its own ancestors and to itself.

    qkv (R, 3, H, D) of the new tokens, a row for each beam; prefix (P, 3, H, D) of all queries'
    tokens, of which those of row r are spans[r, 0] to spans[r, 1] - 1; spans (R, 2) int32;
    ancestors (t + 1, R) int32, for each step and row the row of that step it descends from, in the
    last step itself. store, what this function returned a step ago (None at first), holds keys and
    values of at most ``capacity`` steps of at most ``widest`` rows; no query has more than
    ``longest`` tokens. All others are float32.

    Returns (R, H, D) and the store, which is one buffer written in place: jt.Vars are lazy, so the
    caller must sync what it got from a step before the next one, as generator.KeyValueCache does.
    """
    rows, _, heads, depth = qkv.shape
    if wants_plain():
        return plain_beam_attention(qkv, prefix, spans, store, ancestors, capacity, widest, longest)
    if store is None:
        store = jt.empty((capacity, widest, 2, heads, depth), "float32")
    y, = run("beam_attention", f"beam_attention<{depth}>",
             {"y (rows, heads)": (rows, heads, depth)},
             {"store (_, widest)": store, "qkv": qkv, "prefix": prefix, "spans": spans,
              "ancestors (steps)": ancestors}, "dim3(rows, heads), ATTENTION_THREADS")
    return y, store


def plain_beam_attention(qkv: jt.Var, prefix: jt.Var, spans: jt.Var, store: jt.Var | None,
                         ancestors: jt.Var, capacity: int, widest: int,
                         longest: int) -> tuple[jt.Var, jt.Var]:
    """:func:`beam_attention` in Jittor's own operators."""
    rows, _, heads, depth = qkv.shape
    steps = ancestors.shape[0]
    if store is None:
        store = jt.zeros((capacity, widest, 2, heads, depth))
    store[steps - 1, :rows] = qkv[:, 1:]
    own = store[jt.index(ancestors.shape, 0), ancestors]  # (t + 1, R, 2, H, D)
    first, end = spans[:, 0], spans[:, 1]  # (R,) each
    place = jt.index((longest, rows), 0)  # (Q, R), Q = longest
    shared = prefix[jt.minimum(first.unsqueeze(0) + place, prefix.shape[0] - 1), 1:]
    past = jt.concat([shared, own], dim=0)  # (Q + t + 1, R, 2, H, D)
    scores = (past[:, :, 0] * qkv[:, 0]).sum(dim=3) / math.sqrt(depth)  # (Q + t + 1, R, H)
    real = place < (end - first).unsqueeze(0)  # (Q, R)
    real = jt.concat([real, jt.ones(ancestors.shape, "bool")], dim=0).unsqueeze(2)
    scores = jt.ternary(real.broadcast(scores.shape), scores, jt.full(scores.shape, MASKED))
    weights = plain_softmax(scores, dim=0)  # (Q + t + 1, R, H)
    return (weights.unsqueeze(3) * past[:, :, 1]).sum(dim=0), store
