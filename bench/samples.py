"""The samples for all sides: E2E's if data/e2e/ has them, else random ones of similar lengths."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from shared import ROOT, SAMPLES, WORK, write_jsonl

# Lengths in E2E's training set, as create_datasets.sh draws it, in tokens: mean, standard
# deviation, minimum, maximum.
CONTEXT = (29.0, 6.6, 13, 42)
COMPLETION = (25.2, 8.1, 10, 56)
SHARE = COMPLETION[0] / (CONTEXT[0] + COMPLETION[0])  # share of the tokens that are trained on


def of_e2e(name: str) -> tuple[Path, str]:
    """The file of "train" or "test", and a description of its source."""
    path = ROOT / "data" / "e2e" / f"{name}.jsonl"
    if path.is_file():
        return path, f"data/e2e/{name}.jsonl"
    random = np.random.default_rng(2025)
    lengths = [(_draw(random, CONTEXT), _draw(random, COMPLETION)) for _ in range(SAMPLES)]
    path = WORK / f"like_e2e_{name}.jsonl"
    _write(path, lengths, random)
    return path, f"{SAMPLES} samples of random tokens, as long as E2E's (data/e2e/ has none)"


def of_length(tokens: int, count: int) -> Path:
    """``count`` samples of ``tokens`` random tokens, trained on the same share of them as E2E."""
    completion = round(tokens * SHARE)
    path = WORK / f"random_{tokens}.jsonl"
    _write(path, [(tokens - completion, completion)] * count, np.random.default_rng(tokens))
    return path


def _draw(random: np.random.Generator, distribution: tuple[float, float, int, int]) -> int:
    mean, deviation, least, most = distribution
    return int(np.clip(random.normal(mean, deviation), least, most).round())


def _write(path: Path, lengths: list[tuple[int, int]], random: np.random.Generator) -> None:
    write_jsonl(path, ({"context": random.integers(50256, size=context).tolist(),
                        "completion": random.integers(50256, size=completion).tolist()}
                       for context, completion in lengths))
