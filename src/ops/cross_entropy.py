"""Cross entropy with label smoothing (Szegedy et al., 2016)."""

import jittor as jt

from ops.native import run, wants_plain


def cross_entropy(logits: jt.Var, target: jt.Var, label_smooth: float = 0.0) -> jt.Var:
    """Per row (1 - s) * -log p[target] + s * mean over the vocabulary of -log p, s = label_smooth.

    logits (N, V) float32, target (N,) int32 in [0, V) -> (N,) float32.
    """
    if wants_plain():
        return plain_cross_entropy(logits, target, label_smooth)
    return _CrossEntropy.apply(logits, target, float(label_smooth))


class _CrossEntropy(jt.Function):
    def execute(self, logits, target, smooth):
        rows = logits.shape[:1]
        inputs = {"logits (rows, vocab)": logits, "target": target}
        loss, log_sum = run("cross_entropy", "cross_entropy", {"loss": rows, "log_sum": rows},
                            inputs, "rows, THREADS", smooth=smooth)
        self.saved, self.smooth, self.shape = {**inputs, "log_sum": log_sum}, smooth, logits.shape
        return loss

    def grad(self, dloss):
        dlogits, = run("cross_entropy", "grad_cross_entropy", {"dlogits": self.shape},
                       {**self.saved, "dloss": dloss}, "rows, THREADS", smooth=self.smooth)
        return dlogits, None, None


def plain_cross_entropy(logits: jt.Var, target: jt.Var, label_smooth: float = 0.0) -> jt.Var:
    """:func:`cross_entropy` in Jittor's own operators."""
    high = logits.max(dim=1, keepdims=True)  # (N, 1)
    log_sum = jt.log(jt.exp(logits - high).sum(dim=1)) + high[:, 0]  # (N,)
    hit = (jt.index(logits.shape, 1) == target.unsqueeze(1)) * logits  # (N, V), 0 but at the target
    return log_sum - (1 - label_smooth) * hit.sum(dim=1) - label_smooth * logits.mean(dim=1)
