"""Samples and their order as in PyTorch's randperm, DistributedSampler and DataLoader."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset import FTDataset, permutation
from runtime.errors import InputError


@pytest.fixture
def encoded(tmp_path):
    """Writes samples, pairs of a context and a completion, to a file."""
    def write(samples):
        path = tmp_path / "samples.jsonl"
        path.write_text("".join(json.dumps({"context": c, "completion": t}) + "\n"
                                for c, t in samples))
        return path
    return write


def random_samples(n: int, longest: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    random = np.random.default_rng(seed)
    return [tuple(random.integers(1, 100, size=random.integers(1, longest)).tolist()
                  for _ in range(2)) for _ in range(n)]


def test_completions_may_be_absent_where_only_contexts_are_read(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text('{"context": [1, 2, 3]}\n{"context": [4], "completion": [5]}\n')
    data = FTDataset(path, 2, seq_len=4, eval_len=2, contexts_only=True)
    assert data.queries() == [(2, 3), (4,)] and data.samples[0][1] == []
    with pytest.raises(InputError, match='samples.jsonl:1: no "completion"'):
        FTDataset(path, 2, seq_len=4)
    path.write_text('{"context": [1], "completion": "x"}\n')
    with pytest.raises(InputError, match='samples.jsonl:1: "completion" must be a list'):
        FTDataset(path, 2, seq_len=4, contexts_only=True)


def test_permutation_is_torch_randperm(torch_side):
    sizes, seeds = [0, 1, 2, 3, 7, 46, 624, 625, 5000], [0, 1, 11, 2025, 2 ** 32 - 1]
    truth = torch_side("permutations", sizes=sizes, seeds=seeds)
    for n in sizes:
        for seed in seeds:
            assert np.array_equal(permutation(n, seed), truth[f"{n} {seed}"]), (n, seed)


@pytest.mark.parametrize("n, batch_size, seq_len, joint_lm", [
    (6, 3, 16, False),  # whole batches
    (7, 3, 16, False),  # two positions are filled with random samples
    (1, 4, 16, True),  # a single sample
    (9, 4, 8, False),  # samples longer than seq_len; in some, the context alone is longer
    (9, 4, 8, True),
])
def test_batches_are_those_of_the_original(encoded, torch_side, n, batch_size, seq_len, joint_lm):
    path = encoded(random_samples(n, 12, seed=n))
    for epochs, drop_last in (([1, 2, 3], True), ([0, 0], False)):
        truth = torch_side("batches", path=str(path), batch_size=batch_size, seq_len=seq_len,
                           joint_lm=joint_lm, seed=10, epochs=epochs, drop_last=drop_last)
        data, seen = FTDataset(path, batch_size, seq_len, joint_lm=joint_lm), {}
        for turn, epoch in enumerate(epochs):
            for number, batch in enumerate(data.batches(10, epoch)):
                seen.update({f"{turn} {number} input": batch.input_ids,
                             f"{turn} {number} target": batch.target,
                             f"{turn} {number} mask": batch.mask})
        assert seen.keys() == truth.keys()
        assert data.num_batches * len(epochs) * 3 == len(truth)
        for name, array in seen.items():
            if name.endswith("target"):  # the last target of a cut sample is not counted
                array, truth[name] = array[:, :-1], truth[name][:, :-1]
            elif name.endswith("mask"):
                assert not array[:, -1].any()
            assert np.array_equal(array, truth[name]), name


tokens = st.lists(st.integers(0, 50256), max_size=7)
pairs = st.lists(st.tuples(tokens.filter(len), tokens), min_size=1, max_size=9)


@settings(max_examples=60, deadline=None)
@given(samples=pairs, batch_size=st.integers(1, 4), seq_len=st.integers(2, 10),
       joint_lm=st.booleans(), seed=st.integers(0, 2 ** 20))
def test_properties_of_an_epoch(tmp_path_factory, samples, batch_size, seq_len, joint_lm, seed):
    path = tmp_path_factory.getbasetemp() / "properties.jsonl"
    path.write_text("".join(json.dumps({"context": c, "completion": t}) + "\n"
                            for c, t in samples))
    data = FTDataset(path, batch_size, seq_len, joint_lm=joint_lm)
    wanted = []  # (inputs, targets that count) of each sample
    for context, completion in samples:
        ids = (context + completion)[:seq_len]
        first = 1 if joint_lm else len(context)
        wanted.append((tuple(ids), tuple(ids[first:])))
    seen = []
    for batch in data.batches(seed, 1):
        assert batch.input_ids.shape == batch.target.shape == batch.mask.shape \
            == (batch_size, seq_len)
        assert batch.input_ids.dtype == batch.target.dtype == np.int32
        for ids, target, mask in zip(batch.input_ids, batch.target, batch.mask):
            counted = mask.astype(bool)
            assert (target[:-1][counted[:-1]] == ids[1:][counted[:-1]]).all() and not counted[-1]
            seen.append((ids, tuple(target[counted])))
    assert len(seen) == len(data) == -(-len(samples) // batch_size) * batch_size
    for ids, targets in wanted:  # every sample occurs at least once
        padded = np.array(list(ids) + [0] * (seq_len - len(ids)))
        assert any(np.array_equal(padded, i) and targets == t for i, t in seen)


def arrays(batches) -> list[tuple]:
    return [(b.input_ids.tolist(), b.target.tolist(), b.mask.tolist()) for b in batches]


def test_fillers_continue_from_a_state(encoded):
    """A data set that takes over the state of another draws the same samples from then on."""
    path = encoded(random_samples(9, 12))
    first, second, unaware = (FTDataset(path, 8, 24) for _ in range(3))  # 7 positions are filled
    arrays(first.batches(10, 1))
    second.fill_state = json.loads(json.dumps(first.fill_state))  # as stored in a state file
    for epoch in (2, 3):
        going_on = arrays(first.batches(10, epoch))
        assert arrays(second.batches(10, epoch)) == going_on
        assert arrays(unaware.batches(10, epoch)) != going_on
    assert second.fill_state == first.fill_state != unaware.fill_state


@pytest.mark.parametrize("change", [
    lambda state: [], lambda state: state[:-1], lambda state: [*state, 0],
    lambda state: [*state[:-1], 625], lambda state: [*state[:-1], -1]])
def test_a_malformed_state_of_fillers(encoded, change):
    data = FTDataset(encoded([([1], [2])]), 2, 8)
    with pytest.raises(ValueError):
        data.fill_state = change(data.fill_state)


@pytest.mark.parametrize("rank, world_size, drop_last", [(0, 1, False), (0, 1, True), (1, 2, True)])
def test_the_batches_from_a_number_on(encoded, rank, world_size, drop_last):
    """An epoch that starts at a later batch has the remaining batches of the whole epoch."""
    data = FTDataset(encoded(random_samples(13, 12)), 3, 24)
    for epoch in (1, 2):
        states, whole = [data.fill_state], []
        for batch in data.batches(10, epoch, rank, world_size, drop_last):
            whole += arrays([batch])
            states.append(data.fill_state)
        assert len(whole) == (5 if world_size == 1 else 2)
        for first, state in enumerate(states):
            data.fill_state = state
            assert arrays(data.batches(10, epoch, rank, world_size, drop_last, first)
                          ) == whole[first:]
            assert data.fill_state == states[-1]


def test_queries_keep_the_end_of_a_context(encoded):
    path = encoded([(list(range(1, 9)), [50]), ([3, 4], [60, 61])])
    assert FTDataset(path, 8, seq_len=7, eval_len=3).queries() == [(5, 6, 7, 8), (3, 4)]


@pytest.mark.parametrize("line, message", [
    ('{"context": [], "completion": [1]}', "empty context.*--add_bos"),
    ('{"context": [1], "completion": [50257]}', "token id 50257.*50257.*vocab/"),
    ('{"context": [50300], "completion": []}', "token id 50300"),
    ('{"context": [1]}', '"completion"'),
    ('{"context": [-1], "completion": [1]}', '"context"'),
    ('{"context": "text", "completion": "text"}', '"context"'),
    ("[1, 2]", "JSON object"),
    ("{", "JSON object"),
])
def test_error_names_file_line_and_remedy(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"context": [1], "completion": [2]}\n' + line + "\n")
    with pytest.raises(InputError, match=message) as error:
        FTDataset(path, 2, 8)
    assert str(error.value).startswith(f"{path}:2: ") and ";" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_context_longer_than_the_model(encoded):
    path = encoded([([1], [2]), ([1] * 1025, [2])])
    with pytest.raises(InputError, match=r":2: a context of 1025 tokens, .* 1024 positions; "):
        FTDataset(path, 2, 8)
    assert len(FTDataset(encoded([([1] * 1024, [2])]), 1, 8)) == 1


@pytest.mark.parametrize("samples, lost, learns", [
    ([([1] * 7, [2]), ([1] * 8, [2]), ([1] * 9, [2])], [0, 1, 1], True),  # seq_len is 8
    ([([1] * 8, [2]), ([1] * 20, [2, 3])], [1, 2], False),
    ([([1] * 5, [2] * 3), ([1] * 5, [2] * 4), ([1] * 5, [2] * 9)], [0, 1, 6], True),
    ([([1], []), ([1] * 9, [])], [0, 0], False),
])
def test_completions_that_are_cut(encoded, samples, lost, learns):
    path = encoded(samples)
    data = FTDataset(path, 1, 8)
    assert (data.lost(), data.learns()) == (lost, learns)
    assert learns == any(batch.mask.any() for batch in data.batches(1, 1))
    assert FTDataset(path, 1, 8, joint_lm=True).learns()


def test_missing_and_empty_file(tmp_path):
    with pytest.raises(InputError, match="no such file; bash create_datasets.sh"):
        FTDataset(tmp_path / "none.jsonl", 2, 8)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(InputError, match="empty"):
        FTDataset(tmp_path / "empty.jsonl", 2, 8)
