"""LoRA's layer and functions compared with Microsoft's loralib."""

from __future__ import annotations

import numpy as np
import pytest

CARD = {"n_layer": 2, "n_embd": 24, "n_head": 3, "vocab_size": 61, "n_positions": 40}


@pytest.fixture(scope="module")
def lora(jittor):
    import lora

    return lora


@pytest.mark.parametrize("enable_lora", [(True,), (True, False, True), (False, True, False),
                                         (True, True), (True, True, True)])
def test_merged_linear(lora, jittor, torch_side, enable_lora):
    """Compares the output and the gradients of input, weight, bias and both LoRA matrices."""
    n_in, width, r, alpha = 7, 5, 2, 3
    layer = lora.MergedLinear(n_in, width * len(enable_lora), r, alpha, enable_lora=enable_lora)
    random = np.random.default_rng(0)
    for _, p in layer.named_parameters():
        p.assign(jittor.array(random.normal(size=p.shape).astype(np.float32)))
    x = random.normal(size=(4, n_in)).astype(np.float32)
    upstream = random.normal(size=(4, width * len(enable_lora))).astype(np.float32)
    arrays = {name: p.numpy() for name, p in layer.named_parameters()}
    truth = torch_side("merged_linear", {**arrays, "x": x, "upstream": upstream},
                       enable_lora=list(enable_lora), r=r, alpha=alpha)
    x = jittor.array(x)
    y = layer(x)
    variables = {"x": x, **dict(layer.named_parameters())}
    gradients = jittor.grad((y * jittor.array(upstream)).sum(), list(variables.values()))
    ours = {"y": y.numpy(), **{name: g.numpy() for name, g in zip(variables, gradients)}}
    assert ours.keys() == truth.keys()
    for name in truth:
        assert np.abs(ours[name] - truth[name]).max() < 1e-5 * np.abs(truth[name]).max(), name


def test_uneven_projections(lora):
    with pytest.raises(ValueError, match="evenly"):
        lora.MergedLinear(4, 10, r=2, enable_lora=(True, False, True))


def test_enable(lora, jittor):
    """LoRA on other projections: new matrices, the first again of zero effect, W stays."""
    layer = lora.MergedLinear(64, 96, r=4, lora_alpha=8, enable_lora=(True, False, True))
    weight = layer.weight.numpy()
    layer.enable((True, True, True))
    assert tuple(layer.lora_A.shape) == (12, 64) and tuple(layer.lora_B.shape) == (96, 4)
    assert np.array_equal(layer.weight.numpy(), weight) and (layer.lora_B.numpy() == 0).all()
    layer.lora_A.assign(jittor.array(np.eye(12, 64, dtype=np.float32)))
    layer.lora_B.assign(jittor.array(np.tile(np.eye(4, dtype=np.float32), (24, 1))))
    change = layer(jittor.array(np.eye(12, 64, dtype=np.float32))).numpy() - weight[:12]
    wanted = np.zeros((12, 96), np.float32)
    for third in range(3):  # rows 4 third to 4 third + 3 of A serve the columns of a third of W
        wanted[4 * third:4 * third + 4, 32 * third:32 * third + 32] = 2 * np.tile(np.eye(4), 8)
    assert np.allclose(change, wanted, atol=1e-5)


def test_training_starts_at_the_base_model(lora, jittor):
    layer = lora.MergedLinear(64, 96, r=4, lora_alpha=128, enable_lora=(True, False, True))
    x = jittor.array(np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32))
    base = (jittor.matmul(x, layer.weight) + layer.bias).numpy()
    assert (layer.lora_B.numpy() == 0).all()
    assert np.allclose(layer(x).numpy(), base, atol=1e-6)


def test_first_lora_A_is_kaiming_uniform(lora):
    """With a = sqrt(5), values are uniform between -b and b, where b = 1 / sqrt(in_features)."""
    values = lora.MergedLinear(400, 12, r=8).lora_A.numpy() * 20
    assert values.shape == (8, 400)
    assert 0.99 < np.abs(values).max() <= 1
    assert abs(values.mean()) < 0.05 and abs((values ** 2).mean() - 1 / 3) < 0.03


def test_rank_0_is_a_plain_linear_layer(lora, jittor):
    layer = lora.MergedLinear(3, 6, r=0)
    assert dict(layer.named_parameters()).keys() == {"weight", "bias"}
    layer.bias.assign(jittor.array(np.arange(6, dtype=np.float32)))
    assert np.allclose(layer(jittor.zeros((2, 3))).numpy(), [range(6)] * 2)


def test_only_lora_is_trainable(lora, small_model):
    model = small_model()
    lora.mark_only_lora_as_trainable(model)
    for name, p in model.named_parameters():
        assert p.requires_grad == name.endswith(("lora_A", "lora_B")), name


def test_state_dict_is_the_original_ones(lora, small_model, torch_side):
    ours = {name: tuple(p.shape) for name, p in lora.lora_state_dict(small_model()).items()}
    truth = torch_side("lora_state", card=CARD, r=3, alpha=6)
    assert ours == {name: a.shape for name, a in truth.items()} and len(ours) == 4


def dropped_out(jittor, layer, step=1, seed=1):
    """The layer's output for each unit vector; it is 0 where dropout drops the input."""
    import lora

    lora.seed_dropout(layer, seed, [step])
    layer.train()
    return layer(jittor.array(np.eye(24, dtype=np.float32))).numpy()


@pytest.fixture
def layer(lora, jittor):
    """A layer whose frozen weight is 0, so that its output is LoRA's alone; dropout is 0.5."""
    layer = lora.MergedLinear(24, 12, r=2, lora_alpha=2, lora_dropout=0.5)
    layer.weight.assign(jittor.zeros((24, 12)))
    layer.lora_B.assign(jittor.ones((12, 2)))
    return layer


def test_dropout_is_on_the_input_of_the_detour(layer, jittor):
    layer.lora_A.assign(jittor.ones((2, 24)))
    x = jittor.ones((1, 24))
    layer.train()
    from ops import dropout

    for seed in (3, 4):
        layer.dropout_seeds = [seed]
        kept = float(dropout(x, 0.5, [seed]).numpy().sum())  # twice the number of kept inputs
        assert np.allclose(layer(x).numpy(), 2 * kept) and 0 < kept < 48
    layer.eval()
    assert np.allclose(layer(x).numpy(), 48)


def test_dropout_mask_is_of_seed_step_and_layer(layer, lora, jittor):
    first = dropped_out(jittor, layer)
    assert np.array_equal(first, dropped_out(jittor, layer))
    assert not np.array_equal(first, dropped_out(jittor, layer, step=2))
    assert not np.array_equal(first, dropped_out(jittor, layer, seed=2))
    # the mask must not depend on the joined digits of seed and step, here "112" in both
    assert not np.array_equal(dropped_out(jittor, layer, step=12),
                              dropped_out(jittor, layer, step=2, seed=11))


def test_layers_of_a_model_have_masks_of_their_own(lora, small_model):
    model = small_model(n_layer=3, dropout=0.1)
    seeds = set()
    for step in (1, 2):
        lora.seed_dropout(model, 5, [step, step + 2])
        seeds |= {s for block in model.transformer.h for s in block.attn.c_attn.dropout_seeds}
    assert len(seeds) == 12 and all(0 <= seed < 2 ** 31 for seed in seeds)


def test_dropout_reaches_the_loss_of_a_model(lora, small_model):
    model = small_model(dropout=0.5)
    ids = np.arange(12, dtype=np.int32).reshape(2, 6)

    def loss(step):
        lora.seed_dropout(model, 1, [step])
        return float(model.loss(ids, ids, np.ones((2, 6), np.float32)).item())

    model.train()
    first = loss(1)
    assert loss(1) == first != loss(2)
    model.eval()
    assert loss(1) == loss(2) != first
