"""Cross entropy with label smoothing (Szegedy et al., 2016)."""

from __future__ import annotations

import jittor as jt

from ops.native import run, wants_plain

_LOSS = r"""
    #pragma omp parallel for
    for (int n = 0; n < in0_shape0; n++) {
        const float* x = in0_p + (int64)n * in0_shape1;
        float high = x[0], exp_sum = 0, sum = 0;
        for (int v = 0; v < in0_shape1; v++) { high = std::max(high, x[v]); sum += x[v]; }
        for (int v = 0; v < in0_shape1; v++) exp_sum += std::exp(x[v] - high);
        float lse = high + std::log(exp_sum);
        out0_p[n] = lse - (1 - smooth) * x[in1_p[n]] - smooth * sum / in0_shape1;
        out1_p[n] = lse;
    }
"""
_GRAD = r"""
    #pragma omp parallel for
    for (int n = 0; n < in0_shape0; n++) {
        const float* x = in0_p + (int64)n * in0_shape1;
        float* dx = out0_p + (int64)n * in0_shape1;
        float lse = in2_p[n], g = in3_p[n], share = smooth / in0_shape1;
        for (int v = 0; v < in0_shape1; v++) dx[v] = g * (std::exp(x[v] - lse) - share);
        dx[in1_p[n]] -= g * (1 - smooth);
    }
"""
# A block for each row.
_KERNELS = r"""
    __global__ static void losses(const float* logits, const int* target, int V, float smooth,
                                  float* loss, float* log_sum) {
        const int n = blockIdx.x;
        const float* x = logits + (int64_t)n * V;
        float high = -1e30f, sum = 0, exp_sum = 0;
        for (int v = threadIdx.x; v < V; v += THREADS) { high = fmaxf(high, x[v]); sum += x[v]; }
        high = max_of(high);
        sum = sum_of(sum);
        for (int v = threadIdx.x; v < V; v += THREADS) exp_sum += expf(x[v] - high);
        const float lse = high + logf(sum_of(exp_sum));
        if (threadIdx.x) return;
        loss[n] = lse - (1 - smooth) * x[target[n]] - smooth * sum / V;
        log_sum[n] = lse;
    }
    __global__ static void grad_logits(const float* logits, const int* target,
                                       const float* log_sum, const float* grad, int V,
                                       float smooth, float* grad_x) {
        const int n = blockIdx.x;
        const float *x = logits + (int64_t)n * V, lse = log_sum[n], g = grad[n];
        float* dx = grad_x + (int64_t)n * V;
        for (int v = threadIdx.x; v < V; v += THREADS)
            dx[v] = g * (expf(x[v] - lse) - smooth / V - (v == target[n] ? 1 - smooth : 0));
    }
"""
_CUDA = (_KERNELS, r"""
    losses<<<in0_shape0, THREADS>>>(in0_p, in1_p, in0_shape1, smooth, out0_p, out1_p);
""")
_GRAD_CUDA = (_KERNELS, r"""
    grad_logits<<<in0_shape0, THREADS>>>(in0_p, in1_p, in2_p, in3_p, in0_shape1, smooth, out0_p);
""")


class _CrossEntropy(jt.Function):
    def execute(self, logits, target, label_smooth):
        rows = (logits.shape[0],)
        loss, lse = run([rows, rows], [logits, target], _LOSS, cuda=_CUDA,
                        smooth=float(label_smooth))
        self.saved = logits, target, lse, label_smooth
        return loss

    def grad(self, grad_loss):
        logits, target, lse, label_smooth = self.saved
        return run(logits.shape, [logits, target, lse, grad_loss], _GRAD,
                   cuda=_GRAD_CUDA, smooth=float(label_smooth)), None, None


def cross_entropy(logits: jt.Var, target: jt.Var, label_smooth: float = 0.0) -> jt.Var:
    """Per row (1 - s) * -log p[target] + s * mean over the vocabulary of -log p.

    logits (N, V) float32, target (N,) int32 in [0, V) -> (N,).
    """
    if wants_plain():
        return plain_cross_entropy(logits, target, label_smooth)
    return _CrossEntropy.apply(logits, target, label_smooth)


def plain_cross_entropy(logits: jt.Var, target: jt.Var, label_smooth: float = 0.0) -> jt.Var:
    """:func:`cross_entropy` in Jittor's own operators."""
    high = logits.max(dim=1, keepdims=True)  # (N, 1)
    lse = jt.log(jt.exp(logits - high).sum(dim=1)) + high[:, 0]  # (N,)
    hit = (jt.index(logits.shape, 1) == target.unsqueeze(1)) * logits  # (N, V), 0 but at the target
    return lse - (1 - label_smooth) * hit.sum(dim=1) - label_smooth * logits.mean(dim=1)
