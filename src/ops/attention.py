"""Causal self-attention over whole sequences, and of one new token a beam."""

from __future__ import annotations

import math
from typing import Sequence

import jittor as jt
import numpy as np

from ops.native import run, wants_plain

MASKED = -1e10  # a score that softmax turns into exactly 0; infinities do not survive -Ofast

# Each thread works on a head of a sequence in memory of its own: in qkv, the rows of a head lie
# kilobytes apart, and a first-level cache can hold only a few of those at once.
_HEADER = r"""
    #include <array>
    #include <cstring>
    struct Head {
        const int T, D;
        std::vector<float> numbers;  // (pieces, T, D)
        Head(int T, int D, int pieces) : T(T), D(D), numbers((int64_t)pieces * T * D) {}
        float* operator[](int piece) { return numbers.data() + (int64_t)piece * T * D; }
        void read(int piece, const float* from, int64_t stride) {
            for (int t = 0; t < T; t++) std::copy_n(from + t * stride, D, (*this)[piece] + t * D);
        }
        void write(int piece, float* to, int64_t stride) {
            for (int t = 0; t < T; t++) std::copy_n((*this)[piece] + t * D, D, to + t * stride);
        }
    };
    // In vectors of our own: left to itself, the compiler runs vectors across heads or positions
    // and collects their numbers from all over memory.
    typedef float Eight __attribute__((vector_size(32)));
    typedef int Places __attribute__((vector_size(32)));
    static inline Eight eight(const float* p) { Eight v; std::memcpy(&v, p, sizeof v); return v; }
    static inline float inner(const float* a, const float* b, int D) {
        Eight sums = {};
        int d = 0;
        for (; d + 8 <= D; d += 8) sums += eight(a + d) * eight(b + d);
        sums += __builtin_shuffle(sums, Places{4, 5, 6, 7, 4, 5, 6, 7});
        sums += __builtin_shuffle(sums, Places{2, 3, 2, 3, 2, 3, 2, 3});
        float sum = sums[0] + sums[1];
        for (; d < D; d++) sum += a[d] * b[d];
        return sum;
    }
    static inline void add_scaled(float* to, float weight, const float* from, int D) {
        int d = 0;
        for (; d + 8 <= D; d += 8) {
            Eight sum = eight(to + d) + weight * eight(from + d);
            std::memcpy(to + d, &sum, sizeof sum);
        }
        for (; d < D; d++) to[d] += weight * from[d];
    }
    // The same of four vectors, each at `at` behind its pointer: a is read, and y written, once.
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
# On CUDA a block works on a head of a token. A value stands C = H * D numbers behind its key.
_KERNELS = r"""
    const int ATTENTION_THREADS = 64;  // as many as a head is deep, and about as many as keys

    __device__ static float inner(const float* a, const float* b, int D) {
        float sum = 0;
        for (int d = 0; d < D; d++) sum += a[d] * b[d];
        return sum;
    }
    // y becomes the mixture of n values, each weighted by what q thinks of its key; returns the
    // log of the sum of exponents. Keys come by pieces of a block's threads, and what was summed
    // so far shrinks where a larger score comes (Milakov & Gimelshein, 2018).
    template <class Keys>
    __device__ static float attend(const float* q, Keys key, int n, int C, int D, float* y) {
        __shared__ float weights[ATTENTION_THREADS];
        const int t = threadIdx.x;
        const float scale = 1 / sqrtf((float)D);
        float high = -1e30f, sum = 0;
        for (int d = t; d < D; d += ATTENTION_THREADS) y[d] = 0;
        for (int begin = 0; begin < n; begin += ATTENTION_THREADS) {
            const int count = min(ATTENTION_THREADS, n - begin);
            const float score = t < count ? inner(q, key(begin + t), D) * scale : -1e30f;
            const float higher = fmaxf(high, max_of(score)), shrink = expf(high - higher);
            const float weight = t < count ? expf(score - higher) : 0;
            weights[t] = weight;  // the piece before has been read: max_of waited for all threads
            sum = sum * shrink + sum_of(weight);
            high = higher;
            for (int d = t; d < D; d += ATTENTION_THREADS) {
                float mixed = y[d] * shrink;
                for (int j = 0; j < count; j++) mixed += weights[j] * key(begin + j)[C + d];
                y[d] = mixed;
            }
        }
        for (int d = t; d < D; d += ATTENTION_THREADS) y[d] /= sum;
        return high + logf(sum);
    }
"""
_CAUSAL_KERNELS = _KERNELS + r"""
    __device__ static int sequence_of(int token, const int* starts) {
        int b = 0;
        while (starts[b + 1] <= token) b++;
        return b;
    }
    struct Neighbours {
        const float* first;
        int stride;
        __device__ const float* operator()(int j) const { return first + (int64_t)j * stride; }
    };
    __global__ static void attention(const float* qkv, const int* starts, int H, int D,
                                     float* mixed, float* log_sums) {
        const int i = blockIdx.x, h = blockIdx.y, C = H * D;
        const int first = starts[sequence_of(i, starts)];
        const float* q = qkv + (int64_t)i * 3 * C + h * D;
        const Neighbours keys = {qkv + ((int64_t)first * 3 + 1) * C + h * D, 3 * C};
        const float lse = attend(q, keys, i - first + 1, C, D, mixed + (int64_t)i * C + h * D);
        if (threadIdx.x == 0) log_sums[(int64_t)i * H + h] = lse;
    }

    struct Slopes { float p, g; };  // a probability, the gradient of its score
    struct Head {  // pointers to the head's numbers of token 0
        const float *qkv, *mixed, *log_sums, *grad;
        int H, D;
        __device__ const float* part(int64_t token, int which) const {
            return qkv + (token * 3 + which) * H * D;
        }
        __device__ Slopes slopes(int64_t i, int64_t j) const {  // of query i for key j
            const float scale = 1 / sqrtf((float)D), *dy = grad + i * H * D;
            const float mean = inner(dy, mixed + i * H * D, D);
            const float p = expf(inner(part(i, 0), part(j, 1), D) * scale - log_sums[i * H]);
            return {p, p * (inner(dy, part(j, 2), D) - mean) * scale};
        }
    };
    __global__ static void grad_attention(const float* qkv, const int* starts, const float* mixed,
                                          const float* log_sums, const float* grad, int H, int D,
                                          float* grad_qkv) {
        __shared__ Slopes slopes[ATTENTION_THREADS];
        const int token = blockIdx.x, h = blockIdx.y, C = H * D, t = threadIdx.x;
        const int b = sequence_of(token, starts), first = starts[b], end = starts[b + 1];
        const Head head = {qkv + h * D, mixed + h * D, log_sums + h, grad + h * D, H, D};
        float* dq = grad_qkv + (int64_t)token * 3 * C + h * D;
        float *dk = dq + C, *dv = dk + C;
        for (int d = t; d < D; d += ATTENTION_THREADS) dq[d] = dk[d] = dv[d] = 0;
        for (int begin = first; begin <= token; begin += ATTENTION_THREADS) {  // as a query
            const int count = min(ATTENTION_THREADS, token + 1 - begin);
            __syncthreads();  // the piece before has been read
            if (t < count) slopes[t] = head.slopes(token, begin + t);
            __syncthreads();
            for (int d = t; d < D; d += ATTENTION_THREADS)
                for (int j = 0; j < count; j++)
                    dq[d] += slopes[j].g * head.part(begin + j, 1)[d];
        }
        for (int begin = token; begin < end; begin += ATTENTION_THREADS) {  // as a key
            const int count = min(ATTENTION_THREADS, end - begin);
            __syncthreads();
            if (t < count) slopes[t] = head.slopes(begin + t, token);
            __syncthreads();
            for (int d = t; d < D; d += ATTENTION_THREADS)
                for (int i = 0; i < count; i++) {
                    dk[d] += slopes[i].g * head.part(begin + i, 0)[d];
                    dv[d] += slopes[i].p * head.grad[(int64_t)(begin + i) * C + d];
                }
        }
    }
"""
_ATTENTION_CUDA = (_CAUSAL_KERNELS, r"""
    const dim3 grid(in0_shape0, in0_shape2);
    attention<<<grid, ATTENTION_THREADS>>>(in0_p, in1_p, in0_shape2, in0_shape3, out0_p, out1_p);
""")
_GRAD_CUDA = (_CAUSAL_KERNELS, r"""
    const dim3 grid(in0_shape0, in0_shape2);
    grad_attention<<<grid, ATTENTION_THREADS>>>(in0_p, in1_p, in2_p, in3_p, in4_p, in0_shape2,
                                                in0_shape3, out0_p);
""")
# in0: qkv (N, 3, H, D), in1: starts (B + 1), where the sequences begin and the last one ends.
# Outputs: mixed values (N, H, D); log of the sum of exponents (N, H)
_ATTENTION = r"""
    const int B = in1_shape0 - 1, H = in0_shape2, C = H * D;
    const float scale = 1 / std::sqrt((float)D);
    #pragma omp parallel for collapse(2) schedule(dynamic)
    for (int b = 0; b < B; b++)
        for (int h = 0; h < H; h++) {
            const int64 first = in1_p[b];
            const int T = in1_p[b + 1] - first;
            Head head(T, D, 4);
            float *q = head[0], *k = head[1], *v = head[2], *y = head[3];
            for (int i = 0; i < 3; i++) head.read(i, in0_p + (first * 3 + i) * C + h * D, 3 * C);
            std::vector<float> p(T);
            for (int i = 0; i < T; i++) {
                float high = -1e30f, sum = 0;
                for (int j = 0; j <= i; j++) p[j] = inner(q + i * D, k + j * D, D) * scale;
                for (int j = 0; j <= i; j++) high = std::max(high, p[j]);
                for (int j = 0; j <= i; j++) { p[j] = std::exp(p[j] - high); sum += p[j]; }
                for (int j = 0; j <= i; j++) add_scaled(y + i * D, p[j] / sum, v + j * D, D);
                out1_p[(first + i) * H + h] = high + std::log(sum);
            }
            head.write(3, out0_p + first * C + h * D, C);
        }
"""
# in0, in1 as above; in2, in3: the outputs; in4: gradient of the mixed values.
# Dao et al., 2022 (FlashAttention), appendix B: probabilities are computed anew, and the sum over
# j of p_ij dp_ij is dy_i y_i.
_GRAD = r"""
    const int B = in1_shape0 - 1, H = in0_shape2, C = H * D;
    const float scale = 1 / std::sqrt((float)D);
    #pragma omp parallel for collapse(2) schedule(dynamic)
    for (int b = 0; b < B; b++)
        for (int h = 0; h < H; h++) {
            const int64 first = in1_p[b];
            const int T = in1_p[b + 1] - first;
            Head head(T, D, 8);
            float *q = head[0], *k = head[1], *v = head[2], *y = head[3], *dy = head[4];
            float *dq = head[5], *dk = head[6], *dv = head[7];
            for (int i = 0; i < 3; i++) head.read(i, in0_p + (first * 3 + i) * C + h * D, 3 * C);
            head.read(3, in2_p + first * C + h * D, C);
            head.read(4, in4_p + first * C + h * D, C);
            std::vector<float> p(T * T), g(T * T);
            for (int i = 0; i < T; i++) {
                const float lse = in3_p[(first + i) * H + h];
                const float mean = inner(dy + i * D, y + i * D, D);
                float *pi = &p[i * T], *gi = &g[i * T];
                for (int j = 0; j <= i; j++) pi[j] = inner(q + i * D, k + j * D, D) * scale - lse;
                for (int j = 0; j <= i; j++) gi[j] = inner(dy + i * D, v + j * D, D) - mean;
                for (int j = 0; j <= i; j++) { pi[j] = std::exp(pi[j]); gi[j] *= pi[j] * scale; }
                for (int j = 0; j <= i; j++) add_scaled(dq + i * D, gi[j], k + j * D, D);
            }
            for (int j = 0; j < T; j++)
                for (int i = j; i < T; i++) {
                    add_scaled(dv + j * D, p[i * T + j], dy + i * D, D);
                    add_scaled(dk + j * D, g[i * T + j], q + i * D, D);
                }
            for (int i = 0; i < 3; i++)
                head.write(5 + i, out0_p + (first * 3 + i) * C + h * D, 3 * C);
        }
"""


class _CausalAttention(jt.Function):
    def execute(self, qkv, lengths):
        tokens, _, heads, depth = qkv.shape
        starts = jt.array(np.cumsum([0, *lengths], dtype=np.int32))
        # The loops over a head's depth are short: the compiler should know it.
        self.depth = f"const int D = {depth};\n"
        mixed, log_sums = run([(tokens, heads, depth), (tokens, heads)], [qkv, starts],
                              self.depth + _ATTENTION, _HEADER, _ATTENTION_CUDA)
        self.saved = qkv, starts, mixed, log_sums
        return mixed

    def grad(self, grad_mixed):
        return run(self.saved[0].shape, [*self.saved, grad_mixed], self.depth + _GRAD,
                   _HEADER, _GRAD_CUDA), None


def causal_attention(qkv: jt.Var, lengths: Sequence[int]) -> jt.Var:
    """Each position of a sequence attends to itself and those before it.

    qkv (N, 3, H, D) holds query, key and value of each head, the sequences of the given
    ``lengths``, N in all, one behind the other -> (N, H, D).
    """
    if wants_plain():
        return plain_causal_attention(qkv, lengths)
    return _CausalAttention.apply(qkv, list(lengths))


def plain_causal_attention(qkv: jt.Var, lengths: Sequence[int]) -> jt.Var:
    """:func:`causal_attention` in Jittor's own operators."""
    mixed, first = [], 0
    for length in lengths:
        q, k, v = (qkv[first:first + length, i].transpose(1, 0, 2) for i in range(3))  # (H, T, D)
        scores = jt.matmul(q, k.transpose(0, 2, 1)) / math.sqrt(q.shape[-1])  # (H, T, T)
        past = jt.index(scores.shape, 2) <= jt.index(scores.shape, 1)
        weights = plain_softmax(jt.ternary(past, scores, jt.full(scores.shape, MASKED)))
        mixed.append(jt.matmul(weights, v).transpose(1, 0, 2))  # (T, H, D)
        first += length
    return jt.concat(mixed, dim=0)


def plain_softmax(scores: jt.Var) -> jt.Var:
    """Over the last axis; scores of MASKED come out as exactly 0."""
    weights = jt.exp(scores - scores.max(dim=-1, keepdims=True))
    return weights / weights.sum(dim=-1, keepdims=True)


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
            float *weights = &p[i * padded], high = -1e30f, sum = 0;
            for (int j = 0; j < n; j++) high = std::max(high, weights[j]);
            for (int j = 0; j < n; j++) sum += weights[j] = std::exp(weights[j] - high);
            for (int j = 0; j < n; j++) weights[j] /= sum;
            std::fill(weights + n, weights + padded, 0.f);
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
_BEAM_CUDA = (_KERNELS + r"""
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
