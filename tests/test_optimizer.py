"""AdamW, clipping and schedules compared with PyTorch."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.fixture(scope="module")
def optimizer(jittor):
    import optimizer

    return optimizer


@pytest.mark.parametrize("options, no_decay_bias", [
    ({}, False),
    ({"correct_bias": True}, False),
    ({"weight_decay": 0.3}, True),
    ({"weight_decay": 0.0, "eps": 1e-3, "betas": (0.8, 0.9), "correct_bias": True}, False),
])
def test_adamw_over_20_updates(optimizer, jittor, torch_side, options, no_decay_bias):
    random = np.random.default_rng(0)
    shapes = {"weight": (3, 5), "bias": (3,)}
    start = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    gradients = {name: random.normal(scale=0.1, size=(20, *shape)).astype(np.float32)
                 for name, shape in shapes.items()}
    gradients["bias"][:, 0] = 0  # v is 0 here, so sqrt(v) + epsilon is epsilon
    rates = np.linspace(1e-2, 1e-4, 20).tolist()
    truth = torch_side("adamw", {**start, **{f"grad_{n}": g for n, g in gradients.items()}},
                       rates=rates, no_decay_bias=no_decay_bias, **options)

    beta1, beta2 = options.get("betas", (0.9, 0.98))
    parameters = {name: jittor.array(a) for name, a in start.items()}
    adamw = optimizer.AdamW(parameters, beta1=beta1, beta2=beta2, epsilon=options.get("eps", 1e-6),
                            weight_decay=options.get("weight_decay", 0.01),
                            correct_bias=options.get("correct_bias", False),
                            no_decay=["bias"] if no_decay_bias else [])
    for step, rate in enumerate(rates):
        adamw.step({name: jittor.array(g[step]) for name, g in gradients.items()}, rate)
        for name, p in parameters.items():
            moved, wanted = p.numpy() - start[name], truth[name][step] - start[name]
            assert np.abs(moved - wanted).max() < 1e-4 * np.abs(wanted).max() + 1e-7, (name, step)


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e3])
def test_clipping_is_by_the_norm_of_all(optimizer, jittor, torch_side, max_norm):
    random = np.random.default_rng(0)
    arrays = {"a": random.normal(size=(4, 3)).astype(np.float32),
              "b": random.normal(scale=9, size=7).astype(np.float32)}
    truth = torch_side("clip", arrays, max_norm=max_norm)
    ours = optimizer.clip_gradients({n: jittor.array(a) for n, a in arrays.items()}, max_norm)
    assert ours.keys() == truth.keys()
    for name, gradient in ours.items():
        assert np.allclose(gradient.numpy(), truth[name], rtol=1e-5, atol=0)


def test_clipping_no_gradient_at_all(optimizer, jittor):
    ours = optimizer.clip_gradients({"a": jittor.zeros(3)}, 1.0)
    assert (ours["a"].numpy() == 0).all()


CYCLE = {"i_steps": [0, 4, 10, 25], "i_lrs": [0.1, 0.8, 0.3, 0.05]}
LATE_CYCLE = {"i_steps": [3, 6, 20], "i_lrs": [0.1, 0.8, 0.3]}  # no point before step 3


@pytest.mark.parametrize("name, warmup_step, points", [
    ("linear", 0, {}), ("linear", 6, {}), ("linear", 25, {}), ("constant", 0, {}),
    ("constant", 6, {}), ("cosine", 0, {}), ("cosine", 6, {}), ("inv_sqrt", 6, {}),
    ("dev_perf", 0, {}), ("cycle", 0, CYCLE), ("cycle", 0, LATE_CYCLE)])
def test_schedule_at_every_step(optimizer, torch_side, name, warmup_step, points):
    points = points or {"i_steps": [0], "i_lrs": [0.00025]}
    truth = torch_side("schedule", steps=30, scheduler=name, lr=0.7, max_step=25,
                       warmup_step=warmup_step, **points)["rates"]
    rule = optimizer.make_schedule(name, 0.7, warmup_step, 25, points["i_steps"], points["i_lrs"])
    assert np.allclose([rule(step) for step in range(30)], truth, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["linear", "constant"])
@pytest.mark.parametrize("warmup_step", [0, 6])
def test_schedule_of_transformers(optimizer, torch_side, name, warmup_step):
    truth = torch_side("transformers_schedule", name=name, lr=0.7, warmup_step=warmup_step,
                       max_step=25, steps=30)["rates"]
    rule = optimizer.make_schedule(name, 0.7, warmup_step, 25, [0], [0.0])
    assert np.allclose([rule(step) for step in range(30)], truth, rtol=1e-12, atol=0)


def test_schedules_by_hand(optimizer):
    """Values computed by hand, in case both implementations have the same error."""
    def rates(name, *steps, warmup=4, points=([0], [0.0])):
        rule = optimizer.make_schedule(name, 2.0, warmup, 12, *points)
        return [pytest.approx(rule(step)) for step in steps]

    assert rates("linear", 0, 2, 4, 8, 12, 99) == [0, 1, 2, 1, 0, 0]
    assert rates("constant", 0, 2, 4, 99) == [0, 1, 2, 2]
    assert rates("cosine", 0, 2, 6, 12, 99) == [0, 1, 1, 0, 0]
    assert rates("cosine", 0, 1, warmup=0) == [0, 2 * (1 + np.cos(np.pi / 12)) / 2]
    assert rates("cycle", 0, 5, 10, 15, 99, points=([0, 10, 20], [0.0, 1.0, 0.5])) \
        == [0, 0.5, 1, 0.75, 0.5]
    assert rates("inv_sqrt", 0, 50) == rates("dev_perf", 0, 50) == [2, 2]
