"""Causal self-attention over whole sequences."""

from __future__ import annotations

import math
from typing import Sequence

import jittor as jt
import numpy as np

from ops.native import ATTENTION, VECTORS, run, wants_plain

MASKED = -1e10  # a score that softmax turns into exactly 0; infinities do not survive -Ofast

# Each thread works on a head of a sequence in memory of its own: in qkv, the rows of a head lie
# kilobytes apart, and a first-level cache can hold only a few of those at once.
_HEADER = VECTORS + r"""
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
"""
_KERNELS = ATTENTION + r"""
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
_ATTENTION_CUDA = (_KERNELS, r"""
    const dim3 grid(in0_shape0, in0_shape2);
    attention<<<grid, ATTENTION_THREADS>>>(in0_p, in1_p, in0_shape2, in0_shape3, out0_p, out1_p);
""")
_GRAD_CUDA = (_KERNELS, r"""
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
