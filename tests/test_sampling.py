"""Sampling: transformers' warpers, the distribution of what is drawn, seeds, rules and scores."""

from __future__ import annotations

import numpy as np
import pytest
from test_beam_search import TableModel, log_probs, make_options, random_logits


@pytest.fixture(scope="module")
def sampling(jittor):
    import sampling

    return sampling


@pytest.fixture(scope="module")
def beam_search(jittor):
    import beam_search

    return beam_search


@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.0])
@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (7, 1.0), (1, 1.0), (500, 1.0), (0, 0.9),
                                          (0, 0.05), (0, 0.0), (20, 0.6)])
def test_warp_is_that_of_transformers(sampling, torch_side, temperature, top_k, top_p):
    scores = np.random.default_rng(1).normal(scale=3, size=(5, 100)).astype(np.float32)
    scores[0, 3:] = -np.inf
    truth = torch_side("warp", {"scores": scores}, temperature=temperature, top_k=top_k,
                       top_p=top_p)["scores"]
    for row, wanted in zip(scores, truth):
        found = sampling.warp(row, sampling.SampleOptions(temperature, top_k, top_p))
        assert np.array_equal(np.isinf(found), np.isinf(wanted))
        assert np.allclose(found, wanted, rtol=1e-6)


def test_draws_follow_the_distribution(sampling):
    scores = np.array([0.0, 1.0, -np.inf, 2.0, -1.0])
    p = np.exp(scores) / np.exp(scores).sum()
    random, n = np.random.default_rng(5), 20000
    counts = np.bincount([sampling.draw(scores, random) for _ in range(n)], minlength=5)
    assert counts[2] == 0
    assert (np.abs(counts - n * p) <= 4.5 * np.sqrt(n * p * (1 - p))).all()


def draw(sampling, model, queries, options, seeds, **how):
    return sampling.sample(model, queries, options, sampling.SampleOptions(**how), seeds)


def test_a_text_depends_on_its_seed_alone(sampling, beam_search):
    _, options = make_options(beam_search, eval_len=8)
    model = TableModel(random_logits(3, vocab=5))
    queries = [(1,), (2, 3), (1,), (4,)]
    seeds = [[(7, number, n) for n in range(3)] for number in range(4)]
    together = draw(sampling, model, queries, options, seeds)
    assert together == [draw(sampling, model, [query], options, [of_query])[0]
                        for query, of_query in zip(queries, seeds)]
    alone = draw(sampling, model, queries, options, [of_query[:1] for of_query in seeds])
    assert all(one in three for (one,), three in zip(alone, together))
    assert together[0] != together[2]  # the same input twice
    assert together != draw(sampling, model, queries, options,
                            [[(8, *rest) for _, *rest in of_query] for of_query in seeds])


@pytest.mark.parametrize("how", [{}, {"temperature": 0.5, "top_k": 3, "top_p": 0.9}])
def test_rules_and_scores(sampling, beam_search, how):
    plain, options = make_options(beam_search, eval_len=9, min_length=3, no_repeat_ngram_size=2,
                                  repetition_penalty=1.5, length_penalty=0.6)
    logits_of = random_logits(4, vocab=6)
    found, = draw(sampling, TableModel(logits_of), [(1, 2)], options,
                  [[(1, n) for n in range(200)]], **how)
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    lengths = set()
    for one in found:
        score = sum(log_probs(logits_of((1, 2) + one.tokens[:i]), one.tokens[:i], plain)[token]
                    for i, token in enumerate(one.tokens))  # KeyError: a token that is forbidden
        assert one.score == pytest.approx(score / len(one.tokens) ** 0.6, rel=1e-4)
        assert 0 not in one.tokens[:-1] and (one.tokens[-1] == 0 or len(one.tokens) == 9)
        lengths.add(len(one.tokens))
    assert min(lengths) >= 4 and len(lengths) > 2


def test_the_likeliest_token_alone_is_a_greedy_search(sampling, beam_search):
    for how in ({"top_k": 1}, {"top_p": 0.0}):
        for seed in range(20):
            _, options = make_options(beam_search, beam=1, no_repeat_ngram_size=3)
            model, queries = TableModel(random_logits(seed, vocab=5)), [(1,), (2, 3)]
            found = draw(sampling, model, queries, options, [[0], [1]], **how)
            assert [list(one.tokens) for one, in found] == beam_search.search(model, queries,
                                                                              options)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_all_tokens_forbidden_ends_a_text(sampling, beam_search):
    _, options = make_options(beam_search, eval_len=9, no_repeat_ngram_size=1, min_length=9)
    (found,), = draw(sampling, TableModel(random_logits(1, vocab=5)), [(1,)], options, [[1]])
    assert sorted(found.tokens) == [1, 2, 3, 4]


@pytest.mark.parametrize("how", [{}, {"top_k": 5}])
def test_a_real_model_whatever_the_batch_size(sampling, beam_search, small_model, how):
    from generator import Generator

    generator = Generator(small_model(seed=5))
    options = beam_search.BeamOptions(eval_len=8, eos_token_ids=frozenset([5, 17]))
    queries = [(3, 1, 4), (1, 5, 9, 2, 6, 5, 35, 8), (9,), (7, 9, 3, 2)]
    seeds = [[(1, number, n) for n in range(2)] for number in range(4)]
    together = draw(sampling, generator, queries, options, seeds, **how)
    for query, of_query, wanted in zip(queries, seeds, together):
        found, = draw(sampling, generator, [query], options, [of_query], **how)
        assert [one.tokens for one in found] == [one.tokens for one in wanted]
