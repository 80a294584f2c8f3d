"""Sampling from GPT-2: temperature, top-k (Fan et al., 2018) and top-p (Holtzman et al., 2020).

Each text has a random generator of its own, so that it depends on its seed alone.
Shapes in comments: B queries, R live texts, V tokens in the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

import jittor as jt
import numpy as np

import ops
from beam_search import BeamOptions, Hypothesis, Tokens, padded, rules
from generator import Generator


@dataclass(frozen=True)
class SampleOptions:
    """How to draw the next token; the defaults draw from the model's own distribution."""

    temperature: float = 1.0  # logits are divided by it
    top_k: int = 0  # only the k likeliest tokens, and those as likely as the k-th; 0: all
    top_p: float = 1.0  # only the fewest likeliest tokens that have this probability together


def sample(generator: Generator, queries: Sequence[Tokens], options: BeamOptions,
           how: SampleOptions, seeds: Sequence[Sequence[Sequence[int]]]) -> list[list[Hypothesis]]:
    """As many texts for each query as it has ``seeds`` (B, n), the best score first.

    A seed is what np.random.default_rng takes. The rules are those of beam search, and so is the
    score: the model's log p of the tokens, whatever the temperature, / length ** length_penalty.
    """
    n = len(seeds[0])
    draws = [np.random.default_rng(seed) for of_query in seeds for seed in of_query]
    texts: list[Tokens] = [()] * len(draws)
    scores = np.zeros(len(draws), np.float32)
    live = np.arange(len(draws))  # (R,): the text that each row continues
    with jt.no_grad():
        first, cache = generator.start(*padded(queries), options.eval_len, n)
        logits, origin = first.numpy()[live // n], live // n  # (R, V), (R,)
        while True:
            log_probs = ops.plain_log_probs(
                logits, *rules([texts[text] for text in live], options, logits.shape[1]))
            going = []  # the rows that are continued
            for row, text in enumerate(live):
                if not np.isfinite(log_probs[row].max()):
                    continue  # the rules forbid all tokens
                token = draw(warp(log_probs[row], how), draws[text])
                texts[text] += (token,)
                scores[text] += log_probs[row, token]
                if token not in options.eos_token_ids and len(texts[text]) < options.eval_len:
                    going.append(row)
            if not going:
                break
            live, origin = live[going], origin[going]
            newest = np.array([texts[text][-1] for text in live])  # (R,)
            logits, origin = generator.step(newest, origin, cache).numpy(), np.arange(len(live))
    found = [Hypothesis(text, score / np.float32(max(len(text), 1) ** options.length_penalty))
             for text, score in zip(texts, scores)]
    return [sorted(found[i:i + n], key=lambda one: -one.score) for i in range(0, len(found), n)]


def warp(scores: np.ndarray, how: SampleOptions) -> np.ndarray:
    """Logits or log probabilities (V,) after temperature, top-k and top-p, in this order.

    Float64; -inf for tokens that cannot be drawn.
    """
    scores = scores.astype(np.float64) / how.temperature
    if 0 < how.top_k < len(scores):
        scores[scores < np.partition(scores, -how.top_k)[-how.top_k]] = -np.inf
    if how.top_p < 1:
        order = np.argsort(scores, kind="stable")  # the least likely token first
        p = np.exp(scores[order] - scores.max())
        unlikely = np.cumsum(p) / p.sum() <= 1 - how.top_p
        unlikely[-1] = False
        scores[order[unlikely]] = -np.inf
    return scores


def draw(scores: np.ndarray, random: np.random.Generator) -> int:
    """A token drawn from the softmax of scores (V,), by the Gumbel-max trick.

    Another batch size changes the last bits of the scores. Here that matters only if the two
    largest sums agree in them; a point on the sum of 50,000 probabilities would often hit another
    token.
    """
    return int(np.argmax(scores + random.gumbel(size=len(scores))))
