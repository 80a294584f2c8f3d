"""The likeliest next tokens of each beam."""

from __future__ import annotations

from typing import Sequence

import jittor as jt
import numpy as np

from ops.native import HEADER

Places = Sequence[tuple[int, int]]  # (row, token)

# in0: logits (N, V), changed in place; in1: seen, in2: forbidden, places as row * V + token.
# Outputs: values (N, k), tokens (N, k) by token
_TOP = r"""
    const int V = in0_shape1, k = out0_shape1;
    const float penalty = data["penalty"], low = -1e30f;
    for (int i = 0; i < in1_shape0; i++) {
        float& x = in0_p[in1_p[i]];
        x = x < 0 ? x * penalty : x / penalty;
    }
    for (int i = 0; i < in2_shape0; i++) in0_p[in2_p[i]] = low;
    #pragma omp parallel for
    for (int n = 0; n < in0_shape0; n++) {
        const float* x = in0_p + (int64)n * V;
        std::vector<std::pair<float, int>> best;  // the k largest so far, largest first
        float high = low, sum = 0, least = -2e30f;
        for (int begin = 0; begin < V; begin += 256) {
            const int end = std::min(begin + 256, V);
            float largest = low;
            for (int v = begin; v < end; v++) largest = std::max(largest, x[v]);
            high = std::max(high, largest);
            if (largest <= least) continue;
            for (int v = begin; v < end; v++) {
                if (x[v] <= least) continue;
                auto place = best.end();
                while (place != best.begin() && place[-1].first < x[v]) --place;
                best.insert(place, {x[v], v});
                if ((int)best.size() > k) best.pop_back();
                if ((int)best.size() == k) least = best.back().first;
            }
        }
        for (int v = 0; v < V; v++) sum += std::exp(x[v] - high);
        const float log_sum = std::log(sum) + high;
        std::sort(best.begin(), best.end(), [](const std::pair<float, int>& a,
                  const std::pair<float, int>& b) { return a.second < b.second; });
        for (int i = 0; i < k; i++) {
            out0_p[n * k + i] = best[i].first == low ? low : best[i].first - log_sum;
            out1_p[n * k + i] = best[i].second;
        }
    }
"""


def top_log_probs(logits: jt.Var, k: int, forbidden: Places = (), seen: Places = (),
                  repetition_penalty: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """The k largest log softmax values of each row of logits (N, V) and their tokens, by token id.

    Before the softmax, the logits of places ``seen`` are penalised (negative ones multiplied,
    positive ones divided) and those of places ``forbidden`` become -inf, in place. Returns (N, k)
    float32 and int32; of equal values, the first tokens are taken.
    """
    if jt.flags.use_cuda:
        return plain_top_log_probs(logits.numpy(), k, forbidden, seen, repetition_penalty)
    rows, vocab = logits.shape
    places = [jt.array(np.int64([row * vocab + token for row, token in some])).int64()
              if some else jt.zeros((0,), "int64") for some in (seen, forbidden)]
    values, tokens = jt.code([(rows, k)] * 2, ["float32", "int32"], [logits, *places],
                             cpu_header=HEADER, cpu_src=_TOP, data={"penalty": repetition_penalty})
    values, tokens = values.numpy(), tokens.numpy()
    values[values < -1e29] = -np.inf  # infinities do not survive -Ofast
    return values, tokens


def plain_top_log_probs(logits: np.ndarray, k: int, forbidden: Places = (), seen: Places = (),
                        repetition_penalty: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """:func:`top_log_probs` in NumPy."""
    for places, change in ((seen, lambda x: np.where(x < 0, x * repetition_penalty,
                                                     x / repetition_penalty)),
                           (forbidden, lambda x: -np.inf)):
        if places:
            at = tuple(np.transpose(places))
            logits[at] = change(logits[at])
    high = logits.max(axis=1, keepdims=True)  # (N, 1)
    log_sum = np.log(np.exp(logits - high).sum(axis=1, keepdims=True)) + high
    tokens = np.sort(np.argsort(-logits, axis=1, kind="stable")[:, :k], axis=1)  # (N, k)
    return np.take_along_axis(logits, tokens, axis=1) - log_sum, tokens.astype(np.int32)
