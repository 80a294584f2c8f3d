"""One update of AdamW (Loshchilov & Hutter, 2019) in a single pass over memory."""

import jittor as jt

from ops.native import run, wants_plain


def adamw_update(weight: jt.Var, gradient: jt.Var, m: jt.Var, v: jt.Var, *, beta1: float,
                 beta2: float, epsilon: float, step_size: float,
                 decay: float) -> tuple[jt.Var, jt.Var, jt.Var]:
    """(weight, m, v) after one update; all of one shape, float32.

    m and v are the moving averages of the gradient and of its square. ``step_size`` is the learning
    rate with the correction of both averages' bias, ``decay`` the learning rate times weight decay.
    """
    if wants_plain():
        return plain_adamw_update(weight, gradient, m, v, beta1=beta1, beta2=beta2,
                                  epsilon=epsilon, step_size=step_size, decay=decay)
    return tuple(run(
        "adamw_update", "adamw_update",
        {"new_weight": weight.shape, "new_m": weight.shape, "new_v": weight.shape},
        {"weight": weight, "gradient": gradient, "m": m, "v": v}, "blocks_for(count), THREADS",
        count=weight.numel(), beta1=beta1, rest1=1 - beta1, beta2=beta2, rest2=1 - beta2,
        epsilon=epsilon, step_size=float(step_size), decay=float(decay)))


def plain_adamw_update(weight: jt.Var, gradient: jt.Var, m: jt.Var, v: jt.Var, *, beta1: float,
                       beta2: float, epsilon: float, step_size: float,
                       decay: float) -> tuple[jt.Var, jt.Var, jt.Var]:
    """:func:`adamw_update` in Jittor's own operators."""
    m = beta1 * m + (1 - beta1) * gradient
    v = beta2 * v + (1 - beta2) * gradient * gradient
    moved = weight - step_size * m / (jt.sqrt(v) + epsilon)
    return moved - decay * moved, m, v
