"""How many contexts are searched at a time."""

from __future__ import annotations

import argparse

import pytest
from hypothesis import given
from hypothesis import strategies as st

GIB = 2**30


@pytest.fixture(scope="module")
def at_a_time(jittor):
    """generation.contexts_at_a_time for gpt2.sm, with so many bytes and processes to share them."""
    import generation
    from config import MODEL_CARDS

    def call(batch_size, contexts=None, rows=10, hold=False, free=64 * GIB, processes=1):
        args = argparse.Namespace(batch_size=batch_size, hold_batch_size=hold, seq_len=512,
                                  eval_len=64)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(generation.memory, "available", lambda: free)
            patch.setenv("OMPI_COMM_WORLD_LOCAL_SIZE", str(processes))
            return generation.contexts_at_a_time(args, MODEL_CARDS["gpt2.sm"], contexts, rows)

    return call


def test_more_than_asked_where_that_is_faster(at_a_time):
    assert at_a_time(1) == 16 and at_a_time(1, rows=1) == 160
    assert at_a_time(1, hold=True) == 1
    assert at_a_time(20) == 20 and at_a_time(1, rows=200) == 1


def test_less_memory_fewer_contexts(at_a_time):
    """A context has keys and values of 64 tokens for each row and of 448 of its own, and logits."""
    one = 4 * (10 * (2 * 12 * 768 * 64 + 50257) + 3 * 12 * 768 * 448)
    weights = 4 * 124439808
    for count in (3, 7):
        assert at_a_time(1, free=weights + 2 * count * one) == count
        assert at_a_time(1, free=weights + 2 * count * one - 2) == count - 1
        assert at_a_time(1, free=2 * (weights + 2 * count * one), processes=2) == count
    assert at_a_time(1, free=weights + one) == 1  # what was asked for, while it fits at all


@given(st.integers(1, 50), st.integers(1, 20), st.integers(1, 64), st.integers(1, 4))
def test_never_fewer_than_asked(at_a_time, batch_size, rows, gib, processes):
    from runtime.errors import InputError

    try:
        count = at_a_time(batch_size, rows=rows, free=gib * GIB, processes=processes)
    except InputError as error:
        assert "take a smaller --batch_size" in str(error)
    else:
        assert count >= batch_size == at_a_time(batch_size, rows=rows, free=gib * GIB, hold=True)
