"""Attention of one new token a beam to its query and to the tokens generated before."""

from __future__ import annotations

import math

import jittor as jt

from ops.attention import MASKED, plain_softmax
from ops.native import ATTENTION, VECTORS, run, wants_plain

_HEADER = VECTORS + r"""
    #include <array>
    // inner and add_scaled of four vectors, each at `at` behind its pointer: a is read, and y
    // written, once.
    typedef std::array<const float*, 4> Quartet;
    static inline void inner_four(const float* a, const Quartet& b, int at, int D, float scale,
                                  float* to) {
        Eight sums[4] = {};
        int d = 0;
        for (; d + 8 <= D; d += 8) {
            const Eight x = eight(a + d);
            for (int i = 0; i < 4; i++) sums[i] += x * eight(b[i] + at + d);
        }
        Eight pairs[2];  // sums[0], sums[1], sums[0], ... : sums of two neighbours
        for (int i = 0; i < 2; i++) {
            const Eight even = sums[2 * i], odd = sums[2 * i + 1];
            pairs[i] = __builtin_shuffle(even, odd, Places{0, 8, 2, 10, 4, 12, 6, 14})
                     + __builtin_shuffle(even, odd, Places{1, 9, 3, 11, 5, 13, 7, 15});
        }
        Eight all = __builtin_shuffle(pairs[0], pairs[1], Places{0, 1, 8, 9, 4, 5, 12, 13})
                  + __builtin_shuffle(pairs[0], pairs[1], Places{2, 3, 10, 11, 6, 7, 14, 15});
        all += __builtin_shuffle(all, Places{4, 5, 6, 7, 4, 5, 6, 7});
        for (int i = 0; i < 4; i++) {
            float sum = all[i];
            for (int rest = d; rest < D; rest++) sum += a[rest] * b[i][at + rest];
            to[i] = sum * scale;
        }
    }
    static inline void add_four(float* y, const float* weights, const Quartet& from, int at,
                                int D) {
        int d = 0;
        for (; d + 8 <= D; d += 8) {
            Eight sum = eight(y + d);
            for (int i = 0; i < 4; i++) sum += weights[i] * eight(from[i] + at + d);
            std::memcpy(y + d, &sum, sizeof sum);
        }
        for (; d < D; d++)
            for (int i = 0; i < 4; i++) y[d] += weights[i] * from[i][at + d];
    }
"""
# in0: qkv (R, 3, H, D) of the new tokens, in1: prefix (P, 3, H, D), in2: spans (R, 2),
# in3: store (capacity, widest, 2, H, D), in4: ancestors (t + 1, R), the last row the rows' own
_BEAM_ATTENTION = r"""
    const int R = in0_shape0, H = in0_shape2, C = H * D, widest = in3_shape1, steps = in4_shape0;
    const float scale = 1 / std::sqrt((float)D);
    float* fresh = in3_p + (int64)(steps - 1) * widest * 2 * C;
    std::vector<int> blocks;  // of at most 4 rows with one query, whose keys are read once for all
    for (int row = 0; row < R; row++)
        if (blocks.empty() || row - blocks.back() == 4
                || in2_p[2 * row] != in2_p[2 * blocks.back()]) blocks.push_back(row);
    blocks.push_back(R);
    #pragma omp parallel for schedule(dynamic)
    for (int block = 0; block < (int)blocks.size() - 1; block++) {
        const int from = blocks[block], to = blocks[block + 1];
        const int begin = in2_p[2 * from], seen = in2_p[2 * from + 1] - begin, n = seen + steps;
        // Keys and values are taken four at a time: behind the n-th, the last one once more, with
        // no weight.
        const int padded = (n + 3) / 4 * 4;
        std::vector<float> p((int64_t)(to - from) * H * padded);  // (rows, H, padded)
        const auto weights = [&](int row, int j) {
            return &p[(int64_t)(row - from) * H * padded + j];
        };
        const auto four = [&](int row, int first) {  // keys (H, D); a value lies C behind its key
            Quartet keys;
            for (int i = 0; i < 4; i++) {
                const int j = std::min(first + i, n - 1), step = j - seen;
                keys[i] = step < 0
                    ? in1_p + ((int64)(begin + j) * 3 + 1) * C
                    : in3_p + ((int64)step * widest + in4_p[(int64)step * R + row]) * 2 * C;
            }
            return keys;
        };
        // The new keys and values, wanted by no other row yet, go where later steps look.
        for (int row = from; row < to; row++)
            std::copy_n(in0_p + ((int64)row * 3 + 1) * C, 2 * C, fresh + (int64)row * 2 * C);
        for (int j = 0; j < n; j += 4)
            for (int row = from; row < to; row++) {
                const Quartet keys = four(row, j);
                const float* q = in0_p + (int64)row * 3 * C;
                float* scores = weights(row, j);
                for (int h = 0; h < H; h++)
                    inner_four(q + h * D, keys, h * D, D, scale, scores + h * padded);
            }
        for (int64 i = 0; i < (int64)(to - from) * H; i++) {
            float *w = &p[i * padded], high = -1e30f, sum = 0;
            for (int j = 0; j < n; j++) high = std::max(high, w[j]);
            for (int j = 0; j < n; j++) sum += w[j] = std::exp(w[j] - high);
            for (int j = 0; j < n; j++) w[j] /= sum;
            std::fill(w + n, w + padded, 0.f);
        }
        std::fill_n(out0_p + (int64)from * C, (int64)(to - from) * C, 0.f);
        for (int j = 0; j < n; j += 4)
            for (int row = from; row < to; row++) {
                const Quartet keys = four(row, j);
                float *y = out0_p + (int64)row * C, *w = weights(row, j);
                for (int h = 0; h < H; h++)
                    add_four(y + h * D, w + h * padded, keys, C + h * D, D);
            }
    }
"""
_BEAM_CUDA = (ATTENTION + r"""
    __global__ static void keep(const float* qkv, int C, float* fresh) {
        const float* from = qkv + ((int64_t)blockIdx.x * 3 + 1) * C;
        float* to = fresh + (int64_t)blockIdx.x * 2 * C;
        for (int c = threadIdx.x; c < 2 * C; c += THREADS) to[c] = from[c];
    }
    struct Past {  // a row's query, then its ancestors
        const float *prefix, *store;  // the head's first key in each
        const int* ancestors;  // the row's first
        int begin, seen, widest, rows, C;
        __device__ const float* operator()(int j) const {
            if (j < seen) return prefix + (int64_t)(begin + j) * 3 * C;
            j -= seen;
            return store + ((int64_t)j * widest + ancestors[(int64_t)j * rows]) * 2 * C;
        }
    };
    __global__ static void attention(const float* qkv, const float* prefix, const int* spans,
                                     const float* store, const int* ancestors, int H, int D,
                                     int widest, int steps, float* mixed) {
        const int row = blockIdx.x, h = blockIdx.y, rows = gridDim.x, C = H * D;
        const int begin = spans[2 * row], seen = spans[2 * row + 1] - begin;
        const Past keys = {prefix + C + h * D, store + h * D, ancestors + row,
                           begin, seen, widest, rows, C};
        attend(qkv + (int64_t)row * 3 * C + h * D, keys, seen + steps, C, D,
               mixed + (int64_t)row * C + h * D);
    }
""", r"""
    const int R = in0_shape0, H = in0_shape2, D = in0_shape3, widest = in3_shape1;
    const int steps = in4_shape0, C = H * D;
    keep<<<R, THREADS>>>(in0_p, C, in3_p + (int64)(steps - 1) * widest * 2 * C);
    attention<<<dim3(R, H), ATTENTION_THREADS>>>(in0_p, in1_p, in2_p, in3_p, in4_p, H, D, widest,
                                                 steps, out0_p);
""")


def beam_attention(qkv: jt.Var, prefix: jt.Var, spans: jt.Var, store: jt.Var | None,
                   ancestors: jt.Var, capacity: int, widest: int) -> tuple[jt.Var, jt.Var]:
    """One new token a row attends to its query and to its own ancestors.

    qkv (R, 3, H, D) of the new tokens, a row for each beam; prefix (P, 3, H, D) of all queries'
    tokens, of which those of row r are spans[r, 0] to spans[r, 1] (R, 2) int32; ancestors
    (t + 1, R) int32 names for each step and row the row of that step it descends from, itself at
    last. store, what this function returned a step ago (None at first), holds keys and values of
    at most ``capacity`` steps of at most ``widest`` rows. Returns (R, H, D) and the store, which
    here is one buffer that is written in place: fetch a step's result before the next.
    """
    rows, _, heads, depth = qkv.shape
    if wants_plain():
        return plain_beam_attention(qkv, prefix, spans, store, ancestors, capacity, widest)
    if store is None:
        store = jt.empty((capacity, widest, 2, heads, depth), "float32")
    mixed = run((rows, heads, depth), [qkv, prefix, spans, store, ancestors],
                f"const int D = {depth};\n" + _BEAM_ATTENTION, _HEADER, _BEAM_CUDA)
    return mixed, store


def plain_beam_attention(qkv: jt.Var, prefix: jt.Var, spans: jt.Var, store: jt.Var | None,
                         ancestors: jt.Var, capacity: int, widest: int) -> tuple[jt.Var, jt.Var]:
    """:func:`beam_attention` in Jittor's own operators."""
    rows, _, heads, depth = qkv.shape
    steps = ancestors.shape[0]
    if store is None:
        store = jt.zeros((capacity, widest, 2, heads, depth))
    store[steps - 1, :rows] = qkv[:, 1:]
    own = store[jt.index(ancestors.shape, 0), ancestors]  # (t + 1, R, 2, H, D)
    first, end = spans[:, 0], spans[:, 1]  # (R,) each
    shape = (int((end - first).max().item()), rows)  # (Q, R)
    place = jt.index(shape, 0)
    shared = prefix[jt.minimum(first.unsqueeze(0) + place, prefix.shape[0] - 1), 1:]
    past = jt.concat([shared, own], dim=0)  # (Q + t + 1, R, 2, H, D)
    scores = (past[:, :, 0] * qkv[:, 0]).sum(dim=3) / math.sqrt(depth)  # (Q + t + 1, R, H)
    real = place < (end - first).unsqueeze(0)  # (Q, R)
    real = jt.concat([real, jt.ones(ancestors.shape, "bool")], dim=0).unsqueeze(2)
    scores = jt.ternary(real.broadcast(scores.shape), scores, jt.full(scores.shape, MASKED))
    weights = plain_softmax(scores.transpose(1, 2, 0)).transpose(2, 0, 1)  # (Q + t + 1, R, H)
    return (weights.unsqueeze(3) * past[:, :, 1]).sum(dim=0), store
