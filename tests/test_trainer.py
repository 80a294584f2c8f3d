"""The training step and the validation, compared with micro-batches and samples computed alone."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from conftest import weights_of
from hypothesis import given
from hypothesis import strategies as st

GRAD_ACC = 3


@pytest.fixture(scope="module")
def trainer(jittor):
    import trainer

    return trainer


@pytest.fixture
def encoded(tmp_path):
    """Makes a data set of pairs of a context and a completion."""
    from dataset import FTDataset

    def make(samples, batch_size, seq_len):
        path = tmp_path / "samples.jsonl"
        path.write_text("".join(json.dumps({"context": context, "completion": completion}) + "\n"
                                for context, completion in samples))
        return FTDataset(path, batch_size, seq_len)

    return make


def random_ids(random, low, high):
    return random.integers(61, size=random.integers(low, high)).tolist()


@pytest.fixture
def start(trainer, small_model):
    """A trainer of the small model; ``joined`` micro-batches are computed as one."""
    import lora
    from optimizer import AdamW, make_schedule

    def make(joined, dropout=0.4, **options):
        model = small_model(dropout=dropout)
        lora.mark_only_lora_as_trainable(model)
        return trainer.Trainer(
            model, AdamW(lora.lora_state_dict(model)),
            make_schedule("linear", 0.01, 2, 40, [], []),
            trainer.TrainOptions(grad_acc=GRAD_ACC, joined=joined, label_smooth=0.1, **options))

    return make


def train(runner, batches):
    """The losses of the batches; checks that each unit is as long as it may be."""
    losses = []
    while left := len(batches) - len(losses):
        size = runner.unit(left)
        assert size == min(left, runner.options.joined)
        losses += runner.backward(batches[len(losses):len(losses) + size])
        for _ in range(size):
            runner.step()
    return losses


def test_joined_micro_batches_are_those_computed_alone(start, encoded):
    """Losses with dropout's masks, the weights after two updates, gradients after a part of one."""
    random = np.random.default_rng(0)
    data = encoded([(random_ids(random, 1, 9), random_ids(random, 0, 9)) for _ in range(16)], 2, 14)
    batches = list(data.batches(5, 1))
    assert len(batches) == 8  # two updates, two thirds of one
    alone, joined = start(1), start(GRAD_ACC)
    losses = train(alone, batches)
    assert train(joined, batches) == pytest.approx(losses, rel=2e-6)
    assert train(start(GRAD_ACC, dropout=0.0), batches) != pytest.approx(losses, rel=1e-3)
    assert joined.steps == alone.steps == 8
    untrained = weights_of(start(1).model)
    for name, gradient in alone.gradients.items():
        for ours, theirs in ((joined.gradients[name].numpy(), gradient.numpy()),
                             (weights_of(joined.model)[name] - untrained[name],
                              weights_of(alone.model)[name] - untrained[name])):
            assert np.linalg.norm(ours - theirs) <= 1e-4 * np.linalg.norm(theirs) > 0, name


def test_a_loss_that_is_not_finite_is_named(start, encoded, jittor, monkeypatch):
    data = encoded([([1, 2], [3, 4])] * 6, 2, 8)
    batches, runner = list(data.batches(5, 1)), start(GRAD_ACC)
    train(runner, batches)
    loss = runner.model.loss
    monkeypatch.setattr(runner.model, "loss", lambda *arguments: loss(*arguments) * jittor.array(
        np.float32([1, 1, math.nan])))
    with pytest.raises(FloatingPointError, match="^the loss is nan at step 6$"):
        runner.backward(batches)
    assert runner.steps == 3


@given(grad_acc=st.integers(1, 9), joined=st.integers(1, 9), first=st.integers(0, 30),
       steps=st.integers(1, 30))
def test_units_end_where_they_do_without_a_stop(trainer, grad_acc, joined, first, steps):
    """From any step on, units end with updates, with every joined-th step since, and at the end."""
    runner = object.__new__(trainer.Trainer)
    runner.options = trainer.TrainOptions(grad_acc=grad_acc, joined=joined)
    runner.steps, last, ends = first, first + steps, []
    while runner.steps < last:
        size = runner.unit(last - runner.steps)
        assert 1 <= size <= joined
        runner.steps += size
        ends.append(runner.steps)
    assert ends == [step for step in range(first + 1, last + 1)
                    if step == last or step % grad_acc == 0 or step % grad_acc % joined == 0]


def test_how_many_micro_batches_are_joined(trainer, encoded):
    data = encoded([([1] * 10, [2] * 10), ([1] * 30, [2] * 90)], 2, 60)  # 40 tokens on average
    limit = trainer.TOKENS_AT_ONCE // 80
    assert trainer.joined_batches(data, 1) == 1 and trainer.joined_batches(data, 99) == limit > 1
    data.batch_size = 1000
    assert trainer.joined_batches(data, 99) == 1


@pytest.mark.parametrize("at_once", [1, 40, 10_000])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_validation_is_the_mean_over_batches(trainer, start, encoded, monkeypatch, at_once,
                                             batch_size):
    """As the loss of each batch gives it, which test_model.py compares with PyTorch's."""
    random = np.random.default_rng(1)
    contexts = [random_ids(random, 1, 9) for _ in range(4)] + [random_ids(random, 17, 18)] * 2
    samples = [(contexts[random.integers(6)], random_ids(random, 1, 12)) for _ in range(20)]
    samples += [(contexts[0], [5]), (contexts[0], []), (contexts[1][:1], contexts[1][1:] + [3]),
                samples[0], (contexts[4], [7]), ([9], [8]), ([9] * 15, [8] * 4)]
    data, other = (encoded(samples, batch_size, 16) for _ in range(2))
    runner = start(1)
    monkeypatch.setattr(trainer, "TOKENS_AT_ONCE", at_once)
    for _ in range(2):  # samples that fill up the last batch are drawn anew
        runner.model.eval()
        losses = [float(runner.model.loss(batch.input_ids, batch.target, batch.mask).item())
                  for batch in other.batches(runner.options.seed, 0)]
        assert runner.evaluate(data) == pytest.approx(np.mean(losses), rel=2e-6)
        assert data.fill_state == other.fill_state
    assert runner.model.is_training()


def test_a_context_is_computed_once(start, encoded, monkeypatch):
    """The model gets each distinct context, and each completion but its last token, once."""
    samples = [([1, 2, 3], [4, 5]), ([7, 8], [9]), ([1, 2, 3], [6, 7, 8]), ([1, 2, 3], [4, 5])]
    runner, seen = start(1), []
    model = runner.model.transformer
    execute = model.execute
    monkeypatch.setattr(model, "execute", lambda ids, positions, *rest: (
        seen.append((ids.tolist(), positions.tolist())), execute(ids, positions, *rest))[1])
    runner.evaluate(encoded(samples, 2, 16))
    assert seen == [([1, 2, 3, 4, 6, 7, 7, 8], [0, 1, 2, 3, 3, 4, 0, 1])]
