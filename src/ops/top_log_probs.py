"""The likeliest next tokens of each beam, as candidates of beam search."""

from typing import Sequence

import jittor as jt
import numpy as np

from ops.native import run, upload

Places = Sequence[tuple[int, int]]  # (row, token)


def top_log_probs(logits: jt.Var, k: int, forbidden: Places = (), seen: Places = (),
                  repetition_penalty: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """The k largest log softmax values of each row of logits (N, V) and their tokens, by token id.

    Before the softmax, the logits of places ``seen`` are penalised (negative ones multiplied,
    positive ones divided; Keskar et al., 2019) and those of places ``forbidden`` become -inf, in
    place. Returns (N, k) float32 and int32; of equal values, the first tokens are taken. CUDA
    always runs the kernel, since logits that are copied to the host take much longer.
    """
    rows, vocab = logits.shape
    positions = np.array([row * vocab + token for row, token in [*seen, *forbidden]], np.int32)
    # Jittor does not accept an empty input: a 0 is appended, and ``changed`` does not count it.
    values, tokens = run(
        "top_log_probs", "top_log_probs", {"values": (rows, k), "tokens": (rows, k)},
        {"logits (rows, vocab)": logits, "positions": upload(np.append(positions, np.int32(0)))},
        "rows, THREADS", ["float32", "int32"], k=k, seen=len(seen), changed=len(positions),
        penalty=float(repetition_penalty))
    values, tokens = jt.fetch_sync([values, tokens])  # waits for a GPU once
    values[values < -1e29] = -np.inf  # top_log_probs.h's LOW
    return values, tokens


def plain_top_log_probs(logits: np.ndarray, k: int, forbidden: Places = (), seen: Places = (),
                        repetition_penalty: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """:func:`top_log_probs` in NumPy, its reference in the tests."""
    values = plain_log_probs(logits, forbidden, seen, repetition_penalty)  # (N, V)
    tokens = np.sort(np.argsort(-logits, axis=1, kind="stable")[:, :k], axis=1)  # (N, k)
    return np.take_along_axis(values, tokens, axis=1), tokens.astype(np.int32)


def plain_log_probs(logits: np.ndarray, forbidden: Places = (), seen: Places = (),
                    repetition_penalty: float = 1.0) -> np.ndarray:
    """The log softmax of logits (N, V), which change in place as in :func:`top_log_probs`."""
    for places, change in ((seen, lambda x: np.where(x < 0, x * repetition_penalty,
                                                     x / repetition_penalty)),
                           (forbidden, lambda x: -np.inf)):
        if places:
            at = tuple(np.transpose(places))
            logits[at] = change(logits[at])
    high = logits.max(axis=1, keepdims=True)  # (N, 1)
    return logits - (np.log(np.exp(logits - high).sum(axis=1, keepdims=True)) + high)
