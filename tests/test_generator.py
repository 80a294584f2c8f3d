"""Step-by-step decoding with a key/value cache, compared with PyTorch without a cache."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import weights_of

CARD = {"n_layer": 2, "n_embd": 24, "n_head": 3, "vocab_size": 61, "n_positions": 40}


@pytest.fixture
def generator(jittor, small_model):
    from generator import Generator

    return Generator(small_model(seed=3))


# lengths of the queries, number of beams; in the second case the longest query is not the last
@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("lengths, beams", [((4,), 1), ((1, 6, 3), 2)])
def test_cached_decoding(jittor, small_model, generator, torch_side, lengths, beams, at_once):
    """Each step's logits equal those computed from the whole sequence, also if beams are dropped,
    duplicated or reordered, and whether logits are fetched at each step or all at the end."""
    steps, random = 4, np.random.default_rng(beams)
    queries = [random.integers(CARD["vocab_size"], size=n).tolist() for n in lengths]
    padded = np.zeros((len(lengths), max(lengths)), np.int32)
    for row, query in enumerate(queries):
        padded[row, :len(query)] = query

    sequences, ours = list(queries), []  # each sequence, and our logits for its next token
    with jittor.no_grad():
        out, cache = generator.start(padded, np.array(lengths), steps, beams)
        ours.append(out.numpy() if at_once else out)
        # start() returns one row for each query; the first step makes all beams from it.
        current, origin = queries, np.repeat(np.arange(len(lengths)), beams)
        for _ in range(steps):
            tokens = random.integers(CARD["vocab_size"], size=(len(lengths), beams))
            current = [current[row] + [int(token)] for row, token in zip(origin, tokens.ravel())]
            out = generator.step(tokens, origin, cache)
            sequences += current
            ours.append(out.numpy() if at_once else out)
            origin = (random.integers(beams, size=(len(lengths), beams))
                      + beams * np.arange(len(lengths))[:, None]).ravel()

    ours = [row for out in ours for row in np.asarray(out if at_once else out.numpy())]
    ids = np.zeros((len(sequences), max(map(len, sequences))), np.int32)
    for row, sequence in enumerate(sequences):
        ids[row, :len(sequence)] = sequence
    truth = torch_side("logits", {**weights_of(small_model(seed=3)), "input_ids": ids},
                       card=CARD, r=3, alpha=6)["logits"]
    assert len(ours) == len(sequences)
    for row, sequence in enumerate(sequences):
        wanted = truth[row, len(sequence) - 1]
        assert np.abs(ours[row] - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("precision, least, most", [("bf16", 1e-4, 2e-2), ("int8", 1e-3, 5e-2)])
def test_precision(jittor, small_model, generator, precision, least, most):
    """The logits differ from those in float32 as far as the rounding of factors explains."""
    from generator import Generator

    def logits(generator):
        with jittor.no_grad():
            return generator.start(np.array([[5, 17, 3, 40]]), np.array([4]), 1, 1)[0].numpy()

    exact = logits(generator)
    far = np.linalg.norm(logits(Generator(small_model(seed=3), precision)) - exact)
    assert least < far / np.linalg.norm(exact) < most


def test_of_a_packed_model(jittor, small_model, generator):
    """The same as of the model before it was packed."""
    from generator import Generator

    model = small_model(seed=3)
    model.pack("float32")
    query, length = np.array([[5, 17, 3, 40]]), np.array([4])
    with jittor.no_grad():
        ours, plain = (one.start(query, length, 1, 1)[0].numpy()
                       for one in (Generator(model), generator))
    assert np.array_equal(ours, plain)


def test_a_query_has_the_same_logits_whatever_is_beside_it(jittor, small_model):
    """To the last bit: 12 queries at once, and in parts, with 10 rows each in every step."""
    from generator import Generator

    generator = Generator(small_model(seed=4, n_embd=128, n_head=4))
    random, beams, steps = np.random.default_rng(4), 10, 3
    lengths = random.integers(1, 30, size=12)
    queries = random.integers(CARD["vocab_size"], size=(12, 30))
    tokens = random.integers(CARD["vocab_size"], size=(steps, 12, beams))

    def logits(part):
        with jittor.no_grad():
            count = len(lengths[part])
            out, cache = generator.start(queries[part], lengths[part], steps, beams)
            found, origin = [out.numpy().copy()], np.repeat(np.arange(count), beams)
            for step in range(steps):
                out = generator.step(tokens[step, part], origin, cache)
                found.append(out.numpy().copy())
                origin = (np.arange(count)[:, None] * beams + np.arange(beams)[::-1]).ravel()
        return [out.reshape(count, -1) for out in found]

    whole = logits(slice(None))
    for size in (1, 5):
        for first in range(0, 12, size):
            part = slice(first, first + size)
            for ours, wanted in zip(logits(part), whole):
                np.testing.assert_array_equal(ours, wanted[part])


def test_two_caches_are_independent(jittor, generator):
    query, token, origin = np.array([[5, 9, 2]], np.int32), np.array([[7]]), np.array([0])

    def decode(other=None):
        with jittor.no_grad():
            _, cache = generator.start(query, np.array([3]), 2, 1)
            if other is not None:
                _, second = generator.start(other, np.array([3]), 2, 1)
                generator.step(np.array([[1]]), origin, second)
            generator.step(token, origin, cache)
            return generator.step(token, origin, cache).numpy()

    assert np.array_equal(decode(), decode(other=np.array([[8, 8, 8]], np.int32)))


def test_the_model_stays_as_it_was(jittor, small_model):
    """Making a Generator does not change the model, which is in training mode with dropout."""
    import lora
    from generator import Generator

    model = small_model(dropout=0.5)
    lora.mark_only_lora_as_trainable(model)
    model.train()
    before, trained = weights_of(model), [n for n, p in model.named_parameters() if p.requires_grad]
    generator = Generator(model)
    query = np.array([[5, 9, 2]], np.int32)
    with jittor.no_grad():
        logits = [generator.start(query, np.array([3]), 1, 1)[0].numpy() for _ in range(2)]
    assert np.array_equal(*logits)  # the generator does not use dropout
    assert trained == [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(layer.is_training() for layer in model.modules())
    after = weights_of(model)
    assert before.keys() == after.keys()
    assert all(np.array_equal(array, after[name]) for name, array in before.items())


def test_a_generator_can_only_generate(generator):
    public = {name for name in dir(generator) if not name.startswith("_")}
    assert public == {"config", "start", "step"}
