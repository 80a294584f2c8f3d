"""One update of AdamW (Loshchilov & Hutter, 2019) in a single pass over memory."""

from __future__ import annotations

import jittor as jt

from ops.native import run, wants_plain

# in0: weight, in1: gradient, in2: m, in3: v; the outputs: what weight, m and v become
_UPDATE = r"""
    #pragma omp parallel for
    for (int64 i = 0; i < in0->num; i++) {
        const float g = in1_p[i];
        const float m = out1_p[i] = beta1 * in2_p[i] + rest1 * g;
        const float v = out2_p[i] = beta2 * in3_p[i] + rest2 * g * g;
        const float moved = in0_p[i] - step_size * m / (std::sqrt(v) + epsilon);
        out0_p[i] = moved - decay * moved;
    }
"""
_CUDA = (r"""
    __global__ static void update(const float* weight, const float* gradient, const float* m_before,
                                  const float* v_before, int64_t count, float beta1, float rest1,
                                  float beta2, float rest2, float epsilon, float step_size,
                                  float decay, float* weight_after, float* m_after,
                                  float* v_after) {
        const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
        if (i >= count) return;
        const float g = gradient[i];
        const float m = m_after[i] = beta1 * m_before[i] + rest1 * g;
        const float v = v_after[i] = beta2 * v_before[i] + rest2 * g * g;
        const float moved = weight[i] - step_size * m / (sqrtf(v) + epsilon);
        weight_after[i] = moved - decay * moved;
    }
""", r"""
    update<<<blocks_for(in0->num), THREADS>>>(
        in0_p, in1_p, in2_p, in3_p, in0->num, beta1, rest1, beta2, rest2, epsilon, step_size,
        decay, out0_p, out1_p, out2_p);
""")


def adamw_update(weight: jt.Var, gradient: jt.Var, m: jt.Var, v: jt.Var, *, beta1: float,
                 beta2: float, epsilon: float, step_size: float,
                 decay: float) -> tuple[jt.Var, jt.Var, jt.Var]:
    """(weight, m, v) after an update; all of one shape, ``decay`` the share that weight loses."""
    if wants_plain():
        return plain_adamw_update(weight, gradient, m, v, beta1=beta1, beta2=beta2,
                                  epsilon=epsilon, step_size=step_size, decay=decay)
    return tuple(run([weight.shape] * 3, [weight, gradient, m, v], _UPDATE, cuda=_CUDA,
                     beta1=beta1, rest1=1 - beta1, beta2=beta2, rest2=1 - beta2, epsilon=epsilon,
                     step_size=float(step_size), decay=float(decay)))


def plain_adamw_update(weight: jt.Var, gradient: jt.Var, m: jt.Var, v: jt.Var, *, beta1: float,
                       beta2: float, epsilon: float, step_size: float,
                       decay: float) -> tuple[jt.Var, jt.Var, jt.Var]:
    """:func:`adamw_update` in Jittor's own operators."""
    m = beta1 * m + (1 - beta1) * gradient
    v = beta2 * v + (1 - beta2) * gradient * gradient
    moved = weight - step_size * m / (jt.sqrt(v) + epsilon)
    return moved - decay * moved, m, v
