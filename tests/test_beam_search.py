"""Beam search compared with brute force, a simple reference, and PyTorch's on a real model."""

from __future__ import annotations

import gc
import itertools
import math
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import weights_of
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

IMPOSSIBLE = -1e6  # a logit


@pytest.fixture(scope="module")
def beam_search(jittor):
    import beam_search

    return beam_search


class TableModel:
    """A language model: ``logits_of(sequence)`` returns the logits of the token after a tuple."""

    def __init__(self, logits_of):
        self.logits_of, self.queries, self.steps = logits_of, [], 0

    def start(self, query, query_len, capacity, beams):
        sequences = [tuple(row[:n].tolist()) for row, n in zip(query, query_len)]
        self.queries += sequences
        return self._logits(sequences), SimpleNamespace(sequences=sequences, left=capacity)

    def step(self, token_ids, origin, cache):
        self.steps += 1
        cache.left -= 1
        assert cache.left >= 0
        cache.sequences = [cache.sequences[row] + (int(token),)
                           for row, token in zip(origin, np.ravel(token_ids))]
        return self._logits(cache.sequences)

    def _logits(self, sequences):
        import jittor

        return jittor.array(np.float32([self.logits_of(sequence) for sequence in sequences]))


def random_logits(seed: int, vocab: int, possible: int | None = None):
    """Random logits for each sequence; if given, only the first ``possible`` tokens are likely."""
    def logits_of(sequence):
        random = np.random.default_rng([seed, len(sequence), *sequence])
        logits = random.normal(scale=2.0, size=vocab)
        if possible:
            logits[possible:] = IMPOSSIBLE
        return logits
    return logits_of


def log_probs(logits, history, options) -> dict[int, float]:
    """The log probability of each token that is allowed after ``history``."""
    logits = dict(enumerate(np.float32(logits).tolist()))
    for token in set(history):
        penalty = options["repetition_penalty"]
        logits[token] *= penalty if logits[token] < 0 else 1 / penalty
    size = options["no_repeat_ngram_size"]
    for token in list(logits):
        ngrams = [(*history, token)[i:i + size] for i in range(len(history) + 2 - size)]
        repeated = size > 0 and len(ngrams) > 1 and ngrams[-1] in ngrams[:-1]
        too_early = token in options["eos_token_ids"] and len(history) < options["min_length"]
        if repeated or too_early:
            del logits[token]
    if not logits:
        return {}
    high = max(logits.values())
    log_sum = high + math.log(sum(math.exp(x - high) for x in logits.values()))
    return {token: x - log_sum for token, x in logits.items()}


def reference(logits_of, query, options) -> tuple[int, ...]:
    return next((tokens for _, tokens in finished(logits_of, query, options)), ())


def finished(logits_of, query, options) -> list[tuple[float, tuple[int, ...]]]:
    """The search in its simplest form: no cache, no early end, float64; all it finds, best first"""
    beams, found = [(0.0, ())], []
    for length in range(1, options["eval_len"] + 1):
        candidates = [(score + log_p, history + (token,)) for score, history in beams
                      for token, log_p in
                      log_probs(logits_of(query + history), history, options).items()]
        candidates.sort(key=lambda candidate: -candidate[0])
        beams = []
        for score, history in candidates[:options["beam"]]:
            if history[-1] in options["eos_token_ids"] or length == options["eval_len"]:
                found.append((score / length ** options["length_penalty"], history))
            else:
                beams.append((score, history))
    return sorted(found, key=lambda one: -one[0])


def brute_force(logits_of, query, options, tokens) -> tuple[int, ...]:
    """The best of all sequences of the given tokens, found without a beam."""
    @lru_cache(None)
    def following(history):
        return log_probs(logits_of(query + history), history, options)

    best = (-math.inf, ())
    for length in range(1, options["eval_len"] + 1):
        for history in itertools.product(tokens, repeat=length):
            ends = [token in options["eos_token_ids"] for token in history]
            if any(ends[:-1]) or not (ends[-1] or length == options["eval_len"]):
                continue
            score = 0.0
            for i, token in enumerate(history):
                score += following(history[:i]).get(token, -math.inf)
            best = max(best, (score / length ** options["length_penalty"], history))
    return best[1]


def rules(beam, eval_len):
    return st.fixed_dictionaries({
        "beam": beam, "eval_len": eval_len, "min_length": st.integers(0, 4),
        "length_penalty": st.sampled_from([1.0, 0.0, -1.0, 0.6, 2.5]),
        "no_repeat_ngram_size": st.integers(0, 4),
        "repetition_penalty": st.sampled_from([1.0, 1.5, 0.7]),
        "eos_token_ids": st.frozensets(st.integers(0, 4), max_size=3)})


# derandomize: if two scores agree to seven digits, float32 and float64 may order them differently
def examples(count):
    return settings(max_examples=count, deadline=None, derandomize=True,
                    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])


@examples(60)
@given(options=rules(st.just(64), st.integers(1, 4)), seed=st.integers(0, 2 ** 20))
def test_wide_beam_finds_the_best_of_all_sequences(beam_search, options, seed):
    """Four likely tokens make at most 64 sequences of length 3; a beam of 64 keeps them all."""
    logits_of = random_logits(seed, vocab=64, possible=4)
    best = brute_force(logits_of, (9,), options, tokens=range(4))
    assume(best)
    found = beam_search.search(TableModel(logits_of), [(9,)], beam_search.BeamOptions(**options))
    assert found == [list(best)]


@pytest.mark.filterwarnings("ignore:invalid value")  # a beam in which every token is forbidden
@examples(250)
@given(options=rules(st.integers(1, 5), st.integers(1, 8)), seed=st.integers(0, 2 ** 20),
       queries=st.lists(st.sampled_from([(1,), (2, 3), (4, 4, 4)]), min_size=1, max_size=3,
                        unique=True))
def test_narrow_beam(beam_search, options, seed, queries):
    logits_of = random_logits(seed, vocab=5)
    found = beam_search.search(TableModel(logits_of), queries, beam_search.BeamOptions(**options))
    assert found == [list(reference(logits_of, query, options)) for query in queries]


@pytest.mark.filterwarnings("ignore:invalid value")
@examples(150)
@given(options=rules(st.integers(1, 5), st.integers(1, 8)), seed=st.integers(0, 2 ** 20),
       n=st.integers(1, 6))
def test_n_best(beam_search, options, seed, n):
    logits_of, queries = random_logits(seed, vocab=5), [(1,), (2, 3)]
    found = beam_search.search_n_best(TableModel(logits_of), queries,
                                      beam_search.BeamOptions(**options), n)
    for query, best in zip(queries, found):
        wanted = finished(logits_of, query, options)[:n]
        assert [one.tokens for one in best] == [tokens for _, tokens in wanted]
        assert np.allclose([one.score for one in best], [score for score, _ in wanted], atol=1e-4)


def make_options(beam_search, **options):
    options = {"beam": 3, "eval_len": 6, "min_length": 0, "length_penalty": 1.0,
               "no_repeat_ngram_size": 0, "repetition_penalty": 1.0,
               "eos_token_ids": frozenset([0]), **options}
    return options, beam_search.BeamOptions(**options)


def test_defaults_are_those_of_the_original(beam_search):
    options = beam_search.BeamOptions()
    assert options.no_repeat_ngram_size == 4 and options.eos_token_ids == {50256}
    assert options.beam == 1 and options.length_penalty == options.repetition_penalty == 1


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_batch_size_changes_nothing(beam_search, batch_size):
    plain, options = make_options(beam_search)
    queries = [(3, 1), (2,), (3, 1), (4, 4, 4, 1), (2,), (1,), (3, 1)]
    model, done = TableModel(random_logits(5, vocab=5)), []
    answers = beam_search.predict(model, queries, options, batch_size, done.append)
    assert answers == [list(reference(model.logits_of, query, plain)) for query in queries]
    assert sorted(model.queries) == sorted(set(queries))  # equal queries are decoded once
    assert len(done) == -(-4 // batch_size)
    found = {query: ids for batch in done for query, ids in batch.items()}
    assert [found[query] for query in queries] == answers


def test_search_ends_where_nothing_can_change(beam_search):
    """Token 0 ends a sequence and has nearly all probability from the second step on."""
    def logits_of(sequence):
        return [-9.0, 1.0, 0.5, 0.0, 0.0] if len(sequence) == 1 else [9.0, 0.0, 0.0, 0.0, 0.0]

    for length_penalty, steps in ((1.0, 7), (0.0, 3), (-1.0, 2)):
        plain, options = make_options(beam_search, eval_len=200, length_penalty=length_penalty)
        model = TableModel(logits_of)
        assert beam_search.search(model, [(4,)], options) \
            == [list(reference(logits_of, (4,), plain))]
        assert 0 < model.steps <= steps * 3


def test_last_beams_compete_unfinished(beam_search):
    """A likely sequence without an end token is better than one with an unlikely end token."""
    def logits_of(sequence):
        return [-5.0, 3.0, 0.0, -1.0, -1.0]

    _, options = make_options(beam_search, eval_len=3)
    assert beam_search.search(TableModel(logits_of), [(4,)], options) == [[1, 1, 1]]


def test_repeats(beam_search):
    assert beam_search.repeats((), 1) == [] and beam_search.repeats((1, 2, 1), 0) == []
    assert set(beam_search.repeats((1, 2, 1), 1)) == {1, 2}
    assert beam_search.repeats((1, 2, 1), 2) == [2]
    assert beam_search.repeats((1, 2, 1, 2), 3) == [1]
    assert sorted(beam_search.repeats((1, 2, 1, 3, 1), 2)) == [2, 3]
    assert beam_search.repeats((1, 2, 3), 4) == []


@pytest.mark.slow
def test_real_model_against_pytorch(beam_search, small_model, torch_side):
    from generator import Generator

    model = small_model(seed=5)
    queries = [(3, 1, 4), (1, 5, 9, 2, 6, 5, 35, 8), (9,), (7, 9, 3, 2), (38, 46)]
    base = {"num_beams": 4, "eval_len": 12, "eos": [5, 17, 23], "no_repeat_ngram_size": 4}
    variants = [base, {**base, "num_beams": 1}, {**base, "length_penalty": 0.0},
                {**base, "length_penalty": -0.5, "repetition_penalty": 1.3, "min_length": 3},
                {**base, "num_beams": 10, "no_repeat_ngram_size": 1, "eos": [5]}]
    card = {"n_layer": 2, "n_embd": 24, "n_head": 3, "vocab_size": 61, "n_positions": 40}
    truth = torch_side("beam_search", weights_of(model), queries=queries, options=variants,
                       model={"card": card, "r": 3, "alpha": 6})
    generator, answers = Generator(model), set()
    for number, variant in enumerate(variants):
        names = {"num_beams": "beam", "eos": "eos_token_ids"}
        options = {names.get(name, name): value for name, value in variant.items()}
        options["eos_token_ids"] = frozenset(options["eos_token_ids"])
        wanted = [[token for token in ids if token >= 0] for ids in truth[str(number)].tolist()]
        options = beam_search.BeamOptions(**options)
        for batch_size in (2, 5) if number == 0 else (5,):
            assert beam_search.predict(generator, queries, options, batch_size) == wanted
        answers.add(str(wanted))
    assert len(answers) == len(variants)  # every variant changes the result
    lengths = (truth["0"] >= 0).sum(axis=1)
    assert lengths.min() < 12  # some sequences ended


def test_memory_of_a_search_is_given_back_at_once(beam_search, jittor, small_model):
    """Keys and values take gigabytes, so they must be freed without Python's cycle collector."""
    from generator import Generator

    generator, queries = Generator(small_model(seed=6)), [(3, 1, 4), (1, 5)]
    options = beam_search.BeamOptions(beam=3, eval_len=4)
    lived = []
    gc.disable()
    try:
        for _ in range(3):
            beam_search.predict(generator, queries, options, 2)
            lived.append(jittor.number_of_lived_vars())
    finally:
        gc.enable()
    assert lived[0] == lived[1] == lived[2]
