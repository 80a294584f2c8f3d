"""The likeliest next tokens of each beam."""

from __future__ import annotations

from typing import Sequence

import jittor as jt
import numpy as np

from ops.native import run, wants_plain

Places = Sequence[tuple[int, int]]  # (row, token)

# in0: logits (N, V), changed in place; in1: places as row * V + token, those seen come first.
# Outputs: values (N, k), tokens (N, k) by token
_TOP = r"""
    const int V = in0_shape1, k = out0_shape1;
    const float low = -1e30f;
    for (int i = 0; i < seen; i++) {
        float& x = in0_p[in1_p[i]];
        x = x < 0 ? x * penalty : x / penalty;
    }
    for (int i = seen; i < places; i++) in0_p[in1_p[i]] = low;
    #pragma omp parallel for
    for (int n = 0; n < in0_shape0; n++) {
        const float* x = in0_p + (int64)n * V;
        std::vector<std::pair<float, int>> best;  // the k largest so far, largest first
        float high = low, sum = 0, least = -2e30f;
        for (int begin = 0; begin < V; begin += 256) {
            const int end = std::min(begin + 256, V);
            float largest = low;
            for (int v = begin; v < end; v++) largest = std::max(largest, x[v]);
            if (largest > high) {
                sum *= std::exp(high - largest);
                high = largest;
            }
            for (int v = begin; v < end; v++) sum += std::exp(x[v] - high);
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
        const float log_sum = std::log(sum) + high;
        std::sort(best.begin(), best.end(), [](const std::pair<float, int>& a,
                  const std::pair<float, int>& b) { return a.second < b.second; });
        for (int i = 0; i < k; i++) {
            out0_p[n * k + i] = best[i].first == low ? low : best[i].first - log_sum;
            out1_p[n * k + i] = best[i].second;
        }
    }
"""
# On CUDA a block works on a row and reads it k + 1 times: it seeks the largest number, then the
# largest behind that one, and so on.
_CUDA = (r"""
    const float LOW = -1e30f;

    __global__ static void change(float* logits, const int* places, int begin, int end,
                                  bool forbid, float penalty) {
        const int i = begin + blockIdx.x * THREADS + threadIdx.x;
        if (i >= end) return;
        const float x = logits[places[i]];
        logits[places[i]] = forbid ? LOW : x < 0 ? x * penalty : x / penalty;
    }
    struct Pick { float value; int token; };
    __device__ static bool precedes(Pick a, Pick b) {
        return a.value > b.value || (a.value == b.value && a.token < b.token);
    }
    struct First {
        __device__ Pick operator()(Pick a, Pick b) const { return precedes(a, b) ? a : b; }
    };
    __global__ static void top(const float* logits, int V, int k, float* values, int* tokens) {
        const float* x = logits + (int64_t)blockIdx.x * V;
        values += (int64_t)blockIdx.x * k;
        tokens += (int64_t)blockIdx.x * k;
        Pick last = {-2 * LOW, -1};
        float log_sum = 0;
        for (int found = 0; found < k; found++) {
            Pick best = {2 * LOW, V};
            for (int v = threadIdx.x; v < V; v += THREADS) {
                const Pick pick = {x[v], v};
                if (precedes(last, pick) && precedes(pick, best)) best = pick;
            }
            last = reduce(best, First());
            if (found == 0) {
                float sum = 0;
                for (int v = threadIdx.x; v < V; v += THREADS) sum += expf(x[v] - last.value);
                log_sum = logf(sum_of(sum)) + last.value;
            }
            if (threadIdx.x) continue;
            int place = found;  // by token
            for (; place && tokens[place - 1] > last.token; place--) {
                tokens[place] = tokens[place - 1];
                values[place] = values[place - 1];
            }
            tokens[place] = last.token;
            values[place] = last.value == LOW ? LOW : last.value - log_sum;
        }
    }
""", r"""
    if (seen > 0)
        change<<<blocks_for(seen), THREADS>>>(in0_p, in1_p, 0, seen, false, penalty);
    if (places > seen)
        change<<<blocks_for(places - seen), THREADS>>>(in0_p, in1_p, seen, places, true, penalty);
    top<<<in0_shape0, THREADS>>>(in0_p, in0_shape1, out0_shape1, out0_p, out1_p);
""")


def top_log_probs(logits: jt.Var, k: int, forbidden: Places = (), seen: Places = (),
                  repetition_penalty: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """The k largest log softmax values of each row of logits (N, V) and their tokens, by token id.

    Before the softmax, the logits of places ``seen`` are penalised (negative ones multiplied,
    positive ones divided) and those of places ``forbidden`` become -inf, in place. Returns (N, k)
    float32 and int32; of equal values, the first tokens are taken.
    """
    if wants_plain():
        return plain_top_log_probs(logits.numpy(), k, forbidden, seen, repetition_penalty)
    rows, vocab = logits.shape
    places = np.int32([row * vocab + token for row, token in [*seen, *forbidden]])
    # An input must not be empty; how many places count is said apart.
    values, tokens = run([(rows, k)] * 2, [logits, jt.array(np.append(places, np.int32(0)))],
                         _TOP, cuda=_CUDA, dtypes=["float32", "int32"], seen=len(seen),
                         places=len(places), penalty=float(repetition_penalty))
    values, tokens = values.numpy(), tokens.numpy()
    values[values < -1e29] = -np.inf  # infinities do not survive -Ofast
    return values, tokens


def plain_top_log_probs(logits: np.ndarray, k: int, forbidden: Places = (), seen: Places = (),
                        repetition_penalty: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """:func:`top_log_probs` in NumPy, for which all logits have to come from the GPU."""
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
