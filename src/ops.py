"""Operators that Jittor's own are too slow for on the CPU, forward and backward.

There Jittor runs element-wise loops, reductions and batched matrix products on one thread and in
several passes over memory. Each operator here is one parallel pass in C++. On CUDA, where Jittor
is fast, and as the reference in tests, the ``plain_`` twin beside each is used, made of Jittor's
own operators. All tensors are float32.
"""

from __future__ import annotations

import math

import jittor as jt
import numpy as np

MASKED = -1e10  # a score that softmax turns into exactly 0; infinities do not survive -Ofast

_HEADER = "#include <algorithm>\n#include <cmath>\n#include <cstdint>\n#include <vector>\n"


# ---------------------------------------------------------------------------------------------
# Cross entropy with label smoothing (Szegedy et al., 2016)
# ---------------------------------------------------------------------------------------------

_ROW_LOSS = r"""
    #pragma omp parallel for
    for (int n = 0; n < in0_shape0; n++) {
        const float* x = in0_p + (int64)n * in0_shape1;
        float high = x[0], exp_sum = 0, sum = 0;
        for (int v = 0; v < in0_shape1; v++) { high = std::max(high, x[v]); sum += x[v]; }
        for (int v = 0; v < in0_shape1; v++) exp_sum += std::exp(x[v] - high);
        float lse = high + std::log(exp_sum), smooth = in2_p[0];
        out0_p[n] = lse - (1 - smooth) * x[in1_p[n]] - smooth * sum / in0_shape1;
        out1_p[n] = lse;
    }
"""
_ROW_GRAD = r"""
    #pragma omp parallel for
    for (int n = 0; n < in0_shape0; n++) {
        const float* x = in0_p + (int64)n * in0_shape1;
        float* dx = out0_p + (int64)n * in0_shape1;
        float lse = in3_p[n], g = in4_p[n], smooth = in2_p[0], share = smooth / in0_shape1;
        for (int v = 0; v < in0_shape1; v++) dx[v] = g * (std::exp(x[v] - lse) - share);
        dx[in1_p[n]] -= g * (1 - smooth);
    }
"""
class _CrossEntropy(jt.Function):
    def execute(self, logits, target, label_smooth):
        smooth = jt.array(np.float32([label_smooth]))
        rows = (logits.shape[0],)
        loss, lse = jt.code([rows, rows], ["float32", "float32"], [logits, target, smooth],
                            cpu_header=_HEADER, cpu_src=_ROW_LOSS)
        self.saved = logits, target, smooth, lse
        return loss

    def grad(self, grad_loss):
        logits, target, smooth, lse = self.saved
        grad_logits = jt.code(logits.shape, "float32", [logits, target, smooth, lse, grad_loss],
                              cpu_header=_HEADER, cpu_src=_ROW_GRAD)
        return grad_logits, None, None


def cross_entropy(logits: jt.Var, target: jt.Var, label_smooth: float = 0.0) -> jt.Var:
    """Per row (1 - s) * -log p[target] + s * mean over the vocabulary of -log p.

    logits (N, V) float32, target (N,) int32 in [0, V) -> (N,).
    """
    if jt.flags.use_cuda:
        return plain_cross_entropy(logits, target, label_smooth)
    return _CrossEntropy.apply(logits, target, label_smooth)


def plain_cross_entropy(logits: jt.Var, target: jt.Var, label_smooth: float = 0.0) -> jt.Var:
    """:func:`cross_entropy` in Jittor's own operators."""
    high = logits.max(dim=1, keepdims=True)  # (N, 1)
    lse = jt.log(jt.exp(logits - high).sum(dim=1)) + high[:, 0]  # (N,)
    hit = (jt.index(logits.shape, 1) == target.unsqueeze(1)) * logits  # (N, V), 0 but at the target
    return lse - (1 - label_smooth) * hit.sum(dim=1) - label_smooth * logits.mean(dim=1)


# ---------------------------------------------------------------------------------------------
# Layer normalisation (Ba et al., 2016)
# ---------------------------------------------------------------------------------------------

_NORM = r"""
    #pragma omp parallel for
    for (int n = 0; n < in0_shape0; n++) {
        const int C = in0_shape1;
        const float* x = in0_p + (int64)n * C;
        float* y = out0_p + (int64)n * C;
        float mean = 0, variance = 0;
        for (int c = 0; c < C; c++) mean += x[c];
        mean /= C;
        for (int c = 0; c < C; c++) variance += (x[c] - mean) * (x[c] - mean);
        float scale = 1 / std::sqrt(variance / C + in3_p[0]);
        for (int c = 0; c < C; c++) y[c] = (x[c] - mean) * scale * in1_p[c] + in2_p[c];
        out1_p[2 * n] = mean;
        out1_p[2 * n + 1] = scale;
    }
"""
_NORM_GRAD_X = r"""
    #pragma omp parallel for
    for (int n = 0; n < in0_shape0; n++) {
        const int C = in0_shape1;
        const float *x = in0_p + (int64)n * C, *dy = in3_p + (int64)n * C, *w = in1_p;
        float* dx = out0_p + (int64)n * C;
        float mean = in2_p[2 * n], scale = in2_p[2 * n + 1], sum = 0, dot = 0;
        for (int c = 0; c < C; c++) {
            sum += dy[c] * w[c];
            dot += dy[c] * w[c] * (x[c] - mean);
        }
        sum /= C;
        dot *= scale * scale / C;
        for (int c = 0; c < C; c++) dx[c] = scale * (dy[c] * w[c] - sum - (x[c] - mean) * dot);
    }
"""
_NORM_GRAD_WEIGHTS = r"""
    #pragma omp parallel for
    for (int block = 0; block < in0_shape1; block += 16) {  // a cache line of columns a time
        const int C = in0_shape1, end = std::min(block + 16, C);
        for (int c = block; c < end; c++) out0_p[c] = out1_p[c] = 0;
        for (int n = 0; n < in0_shape0; n++)
            for (int c = block; c < end; c++) {
                float dy = in2_p[(int64)n * C + c];
                out0_p[c] += dy * (in0_p[(int64)n * C + c] - in1_p[2 * n]) * in1_p[2 * n + 1];
                out1_p[c] += dy;
            }
    }
"""


class _LayerNorm(jt.Function):
    def execute(self, x, weight, bias, epsilon):
        y, moments = jt.code([x.shape, (x.shape[0], 2)], ["float32", "float32"],
                             [x, weight, bias, jt.array(np.float32([epsilon]))],
                             cpu_header=_HEADER, cpu_src=_NORM)
        self.saved = x, weight, moments
        return y

    def grad(self, grad_y):
        x, weight, moments = self.saved
        grad_x = jt.code(x.shape, "float32", [x, weight, moments, grad_y],
                         cpu_header=_HEADER, cpu_src=_NORM_GRAD_X)
        grad_weight, grad_bias = jt.code([weight.shape, weight.shape], ["float32", "float32"],
                                         [x, moments, grad_y],
                                         cpu_header=_HEADER, cpu_src=_NORM_GRAD_WEIGHTS)
        return grad_x, grad_weight, grad_bias, None


def layer_norm(x: jt.Var, weight: jt.Var, bias: jt.Var, epsilon: float) -> jt.Var:
    """Each row of x (N, C) to mean 0 and variance 1, then times weight (C,) plus bias (C,)."""
    if jt.flags.use_cuda:
        return plain_layer_norm(x, weight, bias, epsilon)
    return _LayerNorm.apply(x, weight, bias, epsilon)


def plain_layer_norm(x: jt.Var, weight: jt.Var, bias: jt.Var, epsilon: float) -> jt.Var:
    """:func:`layer_norm` in Jittor's own operators."""
    centred = x - x.mean(dim=-1, keepdims=True)
    variance = (centred * centred).mean(dim=-1, keepdims=True)  # (N, 1)
    return centred / jt.sqrt(variance + epsilon) * weight + bias


# ---------------------------------------------------------------------------------------------
# GELU (Hendrycks & Gimpel, 2016), the tanh approximation that GPT-2 was trained with
# ---------------------------------------------------------------------------------------------

# 0.5 (1 + tanh u) is the logistic function of 2u, whose exp the compiler vectorises.
_GELU_HEADER = _HEADER + r"""
    static inline float gate(float x) {
        float u = 0.7978845608f * (x + 0.044715f * x * x * x);
        return 1 / (1 + std::exp(std::min(-2 * u, 80.f)));
    }
"""
_GELU = r"""
    const int C = in0_shape1;
    #pragma omp parallel for
    for (int n = 0; n < in0_shape0; n++)
        for (int c = 0; c < C; c++) {
            float x = in0_p[(int64)n * C + c] + in1_p[c];
            out0_p[(int64)n * C + c] = x * gate(x);
        }
"""
_GELU_GRAD = r"""
    const int C = in0_shape1;
    #pragma omp parallel for
    for (int n = 0; n < in0_shape0; n++)
        for (int c = 0; c < C; c++) {
            int64 i = (int64)n * C + c;
            float x = in0_p[i] + in1_p[c], g = gate(x);
            float slope = 1.5957691216f * (1 + 0.134145f * x * x);
            out0_p[i] = in2_p[i] * (g + x * g * (1 - g) * slope);
        }
"""


class _BiasGelu(jt.Function):
    def execute(self, x, bias):
        self.saved = x, bias
        return jt.code(x.shape, "float32", [x, bias], cpu_header=_GELU_HEADER, cpu_src=_GELU)

    def grad(self, grad):
        x, bias = self.saved
        grad_x = jt.code(x.shape, "float32", [x, bias, grad],
                         cpu_header=_GELU_HEADER, cpu_src=_GELU_GRAD)
        return grad_x, grad_x.sum(dim=0)


def bias_gelu(x: jt.Var, bias: jt.Var) -> jt.Var:
    """GELU of x (N, C) + bias (C,)."""
    return plain_bias_gelu(x, bias) if jt.flags.use_cuda else _BiasGelu.apply(x, bias)


def plain_bias_gelu(x: jt.Var, bias: jt.Var) -> jt.Var:
    """:func:`bias_gelu` in Jittor's own operators."""
    x = x + bias
    return 0.5 * x * (1 + jt.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


# ---------------------------------------------------------------------------------------------
# LoRA's way up: from rank r back to the width of the enabled projections
# ---------------------------------------------------------------------------------------------

# in0: y (N, out), in1: bias (out), in2: low (N, r * groups), in3: lora_B (width * groups, r),
# in4: scaling, in5: for each group the first column of its projection
_LORA_UP = r"""
    const int C = in0_shape1, R = in3_shape1, groups = in5_shape0, width = in3_shape0 / groups;
    #pragma omp parallel for
    for (int n = 0; n < in0_shape0; n++) {
        float* out = out0_p + (int64)n * C;
        for (int c = 0; c < C; c++) out[c] = in0_p[(int64)n * C + c] + in1_p[c];
        for (int group = 0; group < groups; group++) {
            const float* low = in2_p + ((int64)n * groups + group) * R;
            const float* up = in3_p + (int64)group * width * R;
            float* part = out + in5_p[group];
            for (int c = 0; c < width; c++) {
                float dot = 0;
                for (int r = 0; r < R; r++) dot += low[r] * up[c * R + r];
                part[c] += dot * in4_p[0];
            }
        }
    }
"""
# in0: gradient (N, out), in1: low, in2: lora_B, in3: scaling, in4: columns
_LORA_UP_GRAD_LOW = r"""
    const int C = in0_shape1, R = in2_shape1, groups = in4_shape0, width = in2_shape0 / groups;
    #pragma omp parallel for
    for (int n = 0; n < in0_shape0; n++)
        for (int group = 0; group < groups; group++) {
            const float* g = in0_p + (int64)n * C + in4_p[group];
            const float* up = in2_p + (int64)group * width * R;
            float* low = out0_p + ((int64)n * groups + group) * R;
            for (int r = 0; r < R; r++) low[r] = 0;
            for (int c = 0; c < width; c++)
                for (int r = 0; r < R; r++) low[r] += g[c] * up[c * R + r] * in3_p[0];
        }
"""
_LORA_UP_GRAD_B = r"""
    const int C = in0_shape1, R = in2_shape1, groups = in4_shape0, width = in2_shape0 / groups;
    #pragma omp parallel for
    for (int row = 0; row < in2_shape0; row++) {
        const int group = row / width, column = in4_p[group] + row % width;
        float* up = out0_p + (int64)row * R;
        for (int r = 0; r < R; r++) up[r] = 0;
        for (int n = 0; n < in0_shape0; n++) {
            const float* low = in1_p + ((int64)n * groups + group) * R;
            float g = in0_p[(int64)n * C + column] * in3_p[0];
            for (int r = 0; r < R; r++) up[r] += g * low[r];
        }
    }
"""


class _LoRAUp(jt.Function):
    def execute(self, y, bias, low, lora_B, scaling, columns):
        scaling, columns = jt.array(np.float32([scaling])), jt.array(np.int32(columns))
        self.saved = low, lora_B, scaling, columns
        return jt.code(y.shape, "float32", [y, bias, low, lora_B, scaling, columns],
                       cpu_header=_HEADER, cpu_src=_LORA_UP)

    def grad(self, grad):
        low, lora_B, scaling, columns = self.saved
        inputs = [grad, low, lora_B, scaling, columns]
        grad_low = jt.code(low.shape, "float32", inputs,
                           cpu_header=_HEADER, cpu_src=_LORA_UP_GRAD_LOW)
        grad_B = jt.code(lora_B.shape, "float32", inputs,
                         cpu_header=_HEADER, cpu_src=_LORA_UP_GRAD_B)
        return grad, grad.sum(dim=0), grad_low, grad_B, None, None


def lora_up(y: jt.Var, bias: jt.Var, low: jt.Var, lora_B: jt.Var, scaling: float,
            columns: list[int]) -> jt.Var:
    """y (N, out) + bias (out,) + scaling * low lora_B^T in the columns of the enabled projections.

    low (N, r * groups), lora_B (width * groups, r); group g adds its (N, width) from columns[g] on.
    """
    if jt.flags.use_cuda:
        return plain_lora_up(y, bias, low, lora_B, scaling, columns)
    return _LoRAUp.apply(y, bias, low, lora_B, scaling, columns)


def plain_lora_up(y: jt.Var, bias: jt.Var, low: jt.Var, lora_B: jt.Var, scaling: float,
                  columns: list[int]) -> jt.Var:
    """:func:`lora_up` in Jittor's own operators."""
    rank, width = lora_B.shape[1], lora_B.shape[0] // len(columns)
    parts, end = [], 0
    for group, column in enumerate(columns):
        if column > end:
            parts.append(jt.zeros((y.shape[0], column - end)))
        own = low[:, group * rank:(group + 1) * rank]  # (N, r)
        parts.append(jt.nn.matmul_transpose(own, lora_B[group * width:(group + 1) * width]))
        end = column + width
    if end < y.shape[1]:
        parts.append(jt.zeros((y.shape[0], y.shape[1] - end)))
    return y + bias + jt.concat(parts, dim=1) * scaling


# ---------------------------------------------------------------------------------------------
# Causal self-attention
# ---------------------------------------------------------------------------------------------

# in0: qkv (B, T, 3, H, D); probabilities (B, H, T, T), none above the diagonal
_ATTENTION = r"""
    const int B = in0_shape0, T = in0_shape1, H = in0_shape3, D = in0_shape4, row = 3 * H * D;
    const float scale = 1 / std::sqrt((float)D);
    #pragma omp parallel for collapse(2)
    for (int b = 0; b < B; b++)
        for (int h = 0; h < H; h++) {
            const float* q = in0_p + (int64)b * T * row + h * D;
            const float *k = q + H * D, *v = k + H * D;
            for (int i = 0; i < T; i++) {
                float* p = out1_p + (((int64)b * H + h) * T + i) * T;
                float* y = out0_p + (((int64)b * T + i) * H + h) * D;
                float high = -1e30f, sum = 0;
                for (int j = 0; j <= i; j++) {
                    float dot = 0;
                    for (int d = 0; d < D; d++)
                        dot += q[(int64)i * row + d] * k[(int64)j * row + d];
                    p[j] = dot * scale;
                    high = std::max(high, p[j]);
                }
                for (int j = 0; j <= i; j++) { p[j] = std::exp(p[j] - high); sum += p[j]; }
                for (int d = 0; d < D; d++) y[d] = 0;
                for (int j = 0; j <= i; j++) {
                    p[j] /= sum;
                    for (int d = 0; d < D; d++) y[d] += p[j] * v[(int64)j * row + d];
                }
            }
        }
"""
# in0: qkv, in1: probabilities, in2: gradient (B, T, H, D)
_ATTENTION_GRAD = r"""
    const int B = in0_shape0, T = in0_shape1, H = in0_shape3, D = in0_shape4, row = 3 * H * D;
    const float scale = 1 / std::sqrt((float)D);
    #pragma omp parallel for collapse(2)
    for (int b = 0; b < B; b++)
        for (int h = 0; h < H; h++) {
            const float* q = in0_p + (int64)b * T * row + h * D;
            const float *k = q + H * D, *v = k + H * D;
            float* dq = out0_p + (int64)b * T * row + h * D;
            float *dk = dq + H * D, *dv = dk + H * D;
            std::vector<float> ds(T);
            for (int i = 0; i < T; i++)
                for (int d = 0; d < D; d++) {
                    int64 at = (int64)i * row + d;
                    dq[at] = dk[at] = dv[at] = 0;
                }
            for (int i = 0; i < T; i++) {
                const float* p = in1_p + (((int64)b * H + h) * T + i) * T;
                const float* dy = in2_p + (((int64)b * T + i) * H + h) * D;
                float mean = 0;
                for (int j = 0; j <= i; j++) {
                    float dot = 0;
                    for (int d = 0; d < D; d++) dot += dy[d] * v[(int64)j * row + d];
                    ds[j] = dot;
                    mean += p[j] * dot;
                }
                for (int j = 0; j <= i; j++) {
                    float g = p[j] * (ds[j] - mean) * scale;
                    int64 at_i = (int64)i * row, at_j = (int64)j * row;
                    for (int d = 0; d < D; d++) {
                        dv[at_j + d] += p[j] * dy[d];
                        dq[at_i + d] += g * k[at_j + d];
                        dk[at_j + d] += g * q[at_i + d];
                    }
                }
            }
        }
"""


class _CausalAttention(jt.Function):
    def execute(self, qkv):
        batch, time, _, heads, depth = qkv.shape
        mixed, probabilities = jt.code(
            [(batch, time, heads, depth), (batch, heads, time, time)], ["float32", "float32"],
            [qkv], cpu_header=_HEADER, cpu_src=_ATTENTION)
        self.saved = qkv, probabilities
        return mixed

    def grad(self, grad_mixed):
        qkv, probabilities = self.saved
        return jt.code(qkv.shape, "float32", [qkv, probabilities, grad_mixed],
                       cpu_header=_HEADER, cpu_src=_ATTENTION_GRAD)


def causal_attention(qkv: jt.Var) -> jt.Var:
    """Each of T positions attends to itself and those before it.

    qkv (B, T, 3, H, D) holds query, key and value of each head -> (B, T, H, D).
    """
    return plain_causal_attention(qkv) if jt.flags.use_cuda else _CausalAttention.apply(qkv)


def plain_causal_attention(qkv: jt.Var) -> jt.Var:
    """:func:`causal_attention` in Jittor's own operators."""
    q, k, v = (qkv[:, :, i].transpose(0, 2, 1, 3) for i in range(3))  # (B, H, T, D) each
    scores = jt.matmul(q, k.transpose(0, 1, 3, 2)) / math.sqrt(q.shape[-1])  # (B, H, T, T)
    past = jt.index(scores.shape, 3) <= jt.index(scores.shape, 2)
    weights = plain_softmax(jt.ternary(past, scores, jt.full(scores.shape, MASKED)))
    return jt.matmul(weights, v).transpose(0, 2, 1, 3)


def plain_softmax(scores: jt.Var) -> jt.Var:
    """Over the last axis; scores of MASKED come out as exactly 0."""
    weights = jt.exp(scores - scores.max(dim=-1, keepdims=True))
    return weights / weights.sum(dim=-1, keepdims=True)


# ---------------------------------------------------------------------------------------------
# Attention of one new token a beam
# ---------------------------------------------------------------------------------------------

# in0: qkv (B, K, 3, H, D) of the new tokens, in1: prefix (B, Q, 3, H, D), in2: query_len (B)
# in3: store (capacity, B * K, 2, H, D), in4: ancestors (t + 1, B * K), the last row the beams'own
_BEAM_ATTENTION = r"""
    const int K = in0_shape1, H = in0_shape3, D = in0_shape4, Q = in1_shape1;
    const int rows = in0_shape0 * K, steps = in4_shape0, width = H * D;
    const float scale = 1 / std::sqrt((float)D);
    float* store = in3_p + (int64)(steps - 1) * rows * 2 * width;
    for (int row = 0; row < rows; row++)  // the new keys and values stand behind the query
        std::copy_n(in0_p + ((int64)row * 3 + 1) * width, 2 * width,
                    store + (int64)row * 2 * width);
    #pragma omp parallel for
    for (int item = 0; item < rows * H; item++) {
        const int row = item / H, h = item % H, b = row / K, seen = in2_p[b];
        const float* q = in0_p + (int64)row * 3 * width + h * D;
        const float* prefix = in1_p + (int64)b * Q * 3 * width + h * D;
        float* y = out0_p + (int64)row * width + h * D;
        std::vector<float> p(seen + steps);
        auto key = [&](int j) -> const float* {
            if (j < seen) return prefix + (int64)j * 3 * width + width;
            j -= seen;
            return in3_p + ((int64)j * rows + in4_p[(int64)j * rows + row]) * 2 * width + h * D;
        };
        float high = -1e30f, sum = 0;
        for (int j = 0; j < seen + steps; j++) {
            const float* k = key(j);
            float dot = 0;
            for (int d = 0; d < D; d++) dot += q[d] * k[d];
            p[j] = dot * scale;
            high = std::max(high, p[j]);
        }
        for (auto& weight : p) { weight = std::exp(weight - high); sum += weight; }
        for (int d = 0; d < D; d++) y[d] = 0;
        for (int j = 0; j < seen + steps; j++) {
            const float* v = key(j) + width;
            for (int d = 0; d < D; d++) y[d] += p[j] / sum * v[d];
        }
    }
"""


def beam_attention(qkv: jt.Var, prefix: jt.Var, query_len: jt.Var, store: jt.Var | None,
                   ancestors: jt.Var, capacity: int) -> tuple[jt.Var, jt.Var]:
    """One new token a beam attends to its sample's query and to its own ancestors.

    qkv (B, K, 3, H, D) of the new tokens; prefix (B, Q, 3, H, D) of the queries, of which
    query_len (B,) are real; store, what this function returned a step ago (None at first), holds
    keys and values of ``capacity`` steps; ancestors (t + 1, B * K) int32 names for each step and
    row the row of that step it descends from, itself at last. Returns (B, K, H, D) and the store,
    which on the CPU is one buffer that is written in place: fetch a step's result before the next.
    """
    if jt.flags.use_cuda:
        return plain_beam_attention(qkv, prefix, query_len, store, ancestors)
    batch, beams, _, heads, depth = qkv.shape
    if store is None:
        store = jt.empty((capacity, batch * beams, 2, heads, depth), "float32")
    mixed = jt.code((batch, beams, heads, depth), "float32",
                    [qkv, prefix, query_len, store, ancestors],
                    cpu_header=_HEADER, cpu_src=_BEAM_ATTENTION)
    return mixed, store


def plain_beam_attention(qkv: jt.Var, prefix: jt.Var, query_len: jt.Var, store: jt.Var | None,
                         ancestors: jt.Var) -> tuple[jt.Var, jt.Var]:
    """:func:`beam_attention` in Jittor's own operators, the store growing by a step each time."""
    batch, beams, _, heads, depth = qkv.shape
    rows, steps, length = batch * beams, ancestors.shape[0], prefix.shape[1]
    fresh = qkv[:, :, 1:].reshape((1, rows, 2, heads, depth))
    store = fresh if store is None else jt.concat([store, fresh], dim=0)  # (t + 1, B * K, 2, H, D)
    step = jt.index(ancestors.shape, 0)
    own = store.reshape((-1, 2, heads, depth))[(step * rows + ancestors).reshape(-1)]
    own = own.reshape((steps, rows, 2, heads, depth)).transpose(2, 1, 3, 0, 4)  # (2, BK, H, t+1, D)

    q = qkv[:, :, 0] / math.sqrt(depth)  # (B, K, H, D)
    shared = prefix[:, :, 1:].transpose(2, 0, 3, 1, 4)  # (2, B, H, Q, D)
    on_query = jt.matmul(q.transpose(0, 2, 1, 3), shared[0].transpose(0, 1, 3, 2))  # (B, H, K, Q)
    real = jt.index(on_query.shape, 3) < query_len.broadcast(on_query.shape, [1, 2, 3])
    on_query = jt.ternary(real, on_query, jt.full(on_query.shape, MASKED))
    on_own = jt.matmul(q.reshape((rows, heads, 1, depth)), own[0].transpose(0, 1, 3, 2))
    on_own = on_own.reshape((batch, beams, heads, steps)).transpose(0, 2, 1, 3)  # (B, H, K, t + 1)
    weights = plain_softmax(jt.concat([on_query, on_own], dim=3))  # (B, H, K, Q + t + 1)
    mixed = jt.matmul(weights[:, :, :, :length], shared[1])  # (B, H, K, D)
    on_own = weights[:, :, :, length:].transpose(0, 2, 1, 3).reshape((rows, heads, 1, steps))
    mine = jt.matmul(on_own, own[1]).reshape((batch, beams, heads, depth))
    return mixed.transpose(0, 2, 1, 3) + mine, store


# ---------------------------------------------------------------------------------------------
# Dropout whose mask is a hash of (seed, position)
# ---------------------------------------------------------------------------------------------

_KEEP = r"""
    static inline __attribute__((always_inline)) QUALIFIER
    float keep_scale(uint32_t i, uint32_t seed, float p) {
        uint32_t h = i * 0x9E3779B9u ^ seed;  // mixed by Wellons' "lowbias32" (2018)
        h ^= h >> 16; h *= 0x7FEB352Du; h ^= h >> 15; h *= 0x846CA68Bu; h ^= h >> 16;
        return (h >> 8) * (1.f / 16777216.f) < p ? 0.f : 1.f / (1.f - p);
    }
"""
_DROPOUT_CPU = r"""
    uint32_t seed = in1_p[0];
    float p = in2_p[0];
    #pragma omp parallel for
    for (int64 i = 0; i < in0->num; i++) out0_p[i] = in0_p[i] * keep_scale(i, seed, p);
"""
_DROPOUT_CUDA = r"""
    __global__ static void dropout(@ARGS_DEF) {
        @PRECALC
        int64 i = blockIdx.x * (int64)blockDim.x + threadIdx.x;
        if (i < (int64)in0_shape0 * in0_shape1)
            out0_p[i] = in0_p[i] * keep_scale(i, in1_p[0], in2_p[0]);
    }
    dropout<<<((int64)in0_shape0 * in0_shape1 + 255) / 256, 256>>>(@ARGS);
"""


class _Dropout(jt.Function):
    def execute(self, x, p, seed):
        self.seed, self.p = jt.array(np.int32([seed])), jt.array(np.float32([p]))
        return self._masked(x)

    def grad(self, grad):
        return self._masked(grad), None, None

    def _masked(self, x):
        return jt.code(x.shape, "float32", [x, self.seed, self.p],
                       cpu_header=_HEADER + _KEEP.replace("QUALIFIER", ""), cpu_src=_DROPOUT_CPU,
                       cuda_header=_HEADER + _KEEP.replace("QUALIFIER", "__device__"),
                       cuda_src=_DROPOUT_CUDA)


def dropout(x: jt.Var, p: float, seed: int) -> jt.Var:
    """Zeroes each element of x (N, C) with probability p and scales the rest by 1 / (1 - p).

    The mask is a function of ``seed`` (int32 >= 0) and the element's position alone, the same on
    every device.
    """
    return _Dropout.apply(x, p, seed)
