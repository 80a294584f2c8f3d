"""What several tests share: the reference material, the vocabulary, and tiktoken as a judge."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The top of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data and expected results, which is not part of the repository."""
    folder = Path(os.environ.get("E2E_SHARED") or ROOT.parent / "shared")
    if not (folder / "expected").is_dir():
        pytest.skip("no reference material; E2E_SHARED=DIR names its folder")
    return folder


@pytest.fixture(scope="session")
def vocab() -> Path:
    """The folder with encoder.json and vocab.bpe."""
    folder = ROOT / "vocab"
    if not all((folder / name).is_file() for name in ("encoder.json", "vocab.bpe")):
        pytest.skip("no vocabulary; python vocab/download_vocab.py vocab")
    return folder


@pytest.fixture(scope="session")
def tiktoken_gpt2(vocab):
    """tiktoken's gpt2 encoding, made from our vocabulary files instead of a download."""
    tiktoken = pytest.importorskip("tiktoken")
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    ranks = data_gym_to_mergeable_bpe_ranks(str(vocab / "vocab.bpe"), str(vocab / "encoder.json"))
    pattern = (r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$"""
               r"""|\s+(?!\S)|\s""")
    return tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": 50256}, explicit_n_vocab=50257)
