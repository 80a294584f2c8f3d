"""The model compared with transformers' GPT-2 and loralib's layers in float64, weights equal."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, weights_of

CARD = {"n_layer": 2, "n_embd": 24, "n_head": 3, "vocab_size": 61, "n_positions": 40}
T = 9


def model_options(r):
    return {"card": CARD, "r": r, "alpha": 6}


def batch(kind: str):
    """Three samples padded to T; ``kind`` determines which targets the mask selects."""
    random = np.random.default_rng(0)
    ids, mask = np.zeros((3, T), np.int32), np.zeros((3, T), np.float32)
    target = ids.copy()
    # No sample reaches the last column. In "one column" the only target is in the first column.
    for row, (length, context) in enumerate([(8, 3), (5, 1), (2, 1)]):
        ids[row, :length] = random.integers(CARD["vocab_size"], size=length)
        target[row, :length - 1] = ids[row, 1:length]
        mask[row, 0 if kind == "jlm" else context - 1:length - 1] = 1
    if kind == "masked out":
        mask[:] = 0
    elif kind == "full":
        ids = random.integers(CARD["vocab_size"], size=(3, T)).astype(np.int32)
        target, mask[:] = np.roll(ids, -1, axis=1), 1
    elif kind == "one column":
        mask[:], mask[2, 0] = 0, 1
    return ids, target, mask


def close(ours, truth, tolerance=1e-4):
    assert ours.shape == truth.shape
    assert np.linalg.norm(ours - truth) <= tolerance * np.linalg.norm(truth)


def logits(model, ids):
    import jittor as jt

    import ops

    positions = np.tile(np.arange(ids.shape[1], dtype=np.int32), len(ids))
    hidden = model.transformer(jt.array(ids.ravel()), jt.array(positions), lambda layer, qkv:
                               ops.causal_attention(qkv, [ids.shape[1]] * len(ids)))
    return model.logits(hidden).numpy().reshape((*ids.shape, -1))


@pytest.mark.parametrize("r", [0, 3])
def test_logits(small_model, torch_side, r):
    model = small_model(seed=r, r=r)
    ids = batch("full")[0]
    truth = torch_side("logits", {**weights_of(model), "input_ids": ids}, **model_options(r))
    close(logits(model, ids), truth["logits"], 1e-5)
    close(logits(model, ids[:1, :1]), truth["logits"][:1, :1], 1e-5)


@pytest.mark.parametrize("kind, smooth", [("clm", 0.0), ("clm", 0.1), ("jlm", 0.1), ("full", 0.0),
                                          ("one column", 0.1)])
def test_loss_and_every_gradient_of_lora(jittor, small_model, torch_side, kind, smooth):
    import lora

    model = small_model(seed=1)
    lora.mark_only_lora_as_trainable(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * CARD["n_layer"]
    check_gradients(jittor, model, trained, torch_side, batch(kind), smooth, model_options(3))


def test_gradients_of_every_weight_without_lora(jittor, small_model, torch_side):
    model = small_model(seed=2, r=0)
    trained = dict(model.named_parameters())
    check_gradients(jittor, model, trained, torch_side, batch("jlm"), 0.1, model_options(0))


def check_gradients(jittor, model, trained, torch_side, samples, smooth, options):
    ids, target, mask = samples
    arrays = {"input_ids": ids, "target": target, "mask": mask}
    truth = torch_side("loss_and_gradients", {**weights_of(model), **arrays}, label_smooth=smooth,
                       **options)
    model.train()
    loss = model.loss(ids, target, mask, smooth)
    gradients = jittor.grad(loss, list(trained.values()))
    assert float(loss.item()) == pytest.approx(float(truth.pop("loss")), rel=1e-5)
    assert trained.keys() == truth.keys()
    for name, gradient in zip(trained, gradients):
        assert np.linalg.norm(truth[name]) > 0, name
        close(gradient.numpy(), truth[name])


def test_nothing_to_learn(jittor, small_model):
    """A batch without targets (only contexts) has a loss of 0 and gradients of 0."""
    model = small_model()
    trained = [p for name, p in model.named_parameters() if "lora_" in name]
    loss = model.loss(*batch("masked out"), 0.1)
    assert float(loss.item()) == 0
    assert all((g.numpy() == 0).all() for g in jittor.grad(loss, trained))


def test_padding_and_what_follows_change_nothing(small_model):
    """The loss depends neither on the token ids of the padding nor on its number of columns."""
    model = small_model()
    ids, target, mask = batch("clm")
    loss = float(model.loss(ids, target, mask).item())
    other = np.where(np.arange(T) < np.array([[8], [5], [2]]), ids, 60)
    assert float(model.loss(other, target, mask).item()) == pytest.approx(loss, rel=1e-6)
    assert float(model.loss(ids[:, :7], target[:, :7], mask[:, :7]).item()) \
        == pytest.approx(loss, rel=1e-6)


def test_cards():
    from config import MODEL_CARDS

    dims = {name: (c.n_layer, c.n_embd, c.n_head, c.vocab_size, c.n_positions)
            for name, c in MODEL_CARDS.items()}
    assert dims == {"gpt2.nano": (4, 128, 4, 50257, 1024), "gpt2.sm": (12, 768, 12, 50257, 1024),
                    "gpt2.md": (24, 1024, 16, 50257, 1024), "gpt2.lg": (36, 1280, 20, 50257, 1024)}


def test_parameter_names_are_those_of_transformers(small_model, torch_side):
    """torch_side fails if the names of the weights differ from transformers'."""
    weights = weights_of(small_model())
    assert "transformer.h.1.attn.c_attn.lora_B" in weights
    torch_side("logits", {**weights, "input_ids": np.zeros((1, 1))}, **model_options(3))


def test_the_mean_loss_of_many_tokens(jittor, small_model, monkeypatch):
    """As exact as float32 allows, however many losses are added up."""
    import ops

    seen, original = [], ops.cross_entropy

    def cross_entropy(*arguments):
        seen.append(original(*arguments))
        return seen[-1]

    monkeypatch.setattr(ops, "cross_entropy", cross_entropy)
    ids = np.random.default_rng(8).integers(61, size=(100, 40))
    loss = small_model(seed=8).loss(ids, np.roll(ids, -1, axis=1), np.ones(ids.shape))
    truth = np.float64(seen[0].numpy()).sum() / (ids.size + 0.0001)
    assert abs(loss.numpy() - truth) <= 1.2e-7 * truth


PACKING = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from runtime import backend
backend.start("cpu", seed=1)
import jittor as jt
from config import MODEL_CARDS
from model import GPT2LMModel

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
model = GPT2LMModel(MODEL_CARDS["gpt2.md"])
jt.sync_all(True)
before = peak()
model.pack("float32")
print(peak() - before)
"""


@pytest.mark.slow
def test_packing_needs_the_memory_of_one_matrix_more(jittor):
    """The largest of gpt2.md, the embedding, has 196 MiB; all of its matrices 1,350."""
    if jittor.flags.use_cuda:
        pytest.skip("measures the memory of the processor")
    said = subprocess.run([sys.executable, "-c", PACKING, ROOT / "src"], check=True, text=True,
                          capture_output=True).stdout
    assert int(said.split()[-1]) / 1024 < 300
