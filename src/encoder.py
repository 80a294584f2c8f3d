"""GPT-2's byte-level BPE (Radford et al., 2019, section 2.2): text to token ids and back.

A text is split into words (a blank belongs to the word after it). The tokens of a word are at first
its UTF-8 bytes; then, of all neighbouring tokens in the merge table, the pair of the lowest rank is
merged, until no pair of the table is left.
"""

from __future__ import annotations

import os
from functools import lru_cache
from heapq import heapify, heappop, heappush
from pathlib import Path
from typing import Iterable

import regex

from runtime.errors import InputError
from runtime.formats import read_json, read_lines

END_OF_TEXT = "<|endoftext|>"

# What \p{L} and \p{N} hold depends on the Unicode version that `regex` knows, hence the exact pin
# in requirement.txt: 2025.9.18 knows Unicode 16, as tiktoken 0.12 does.
WORD = regex.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

CACHED_WORDS = 1 << 16
CACHED_LENGTH = 64  # bytes; longer words are rare, and would make the cache's memory unbounded


def byte_symbols() -> list[str]:
    """The printable character that stands for each byte in GPT-2's vocabulary files.

    A printable Latin-1 character stands for itself, the other bytes for U+0100, U+0101, ...
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


class Encoder:
    """Encodes and decodes with a vocabulary, token -> id, and its merges, lowest rank first.

    Tokens are spelled in ``byte_symbols``. Raises ValueError where the two do not fit together:
    the tokens must be the 256 symbols in the order of their code points, what the merges make, and
    ``<|endoftext|>``, numbered from 0 on as in GPT-2, whose weights depend on it.
    """

    def __init__(self, vocabulary: dict[str, int], merges: list[tuple[str, str]]):
        symbols = byte_symbols()
        made = [left + right for left, right in merges]
        ids = {token: i for i, token in enumerate([*sorted(symbols), *made, END_OF_TEXT])}
        try:
            self._merges = {(ids[left], ids[right]): ids[left + right] for left, right in merges}
        except KeyError as error:
            raise ValueError(f"a merge is of {error}, which is no token") from None
        if len(ids) != 257 + len(merges):
            raise ValueError("two merges make the same token")
        for token in (*ids, *vocabulary):
            if vocabulary.get(token) != ids.get(token):
                raise ValueError(f"the id of {token[:50]!r} should be {ids.get(token, 'none')}, "
                                 f"not {vocabulary.get(token, 'none')}")

        self.end_of_text = ids[END_OF_TEXT]
        self._byte_ids = [ids[symbol] for symbol in symbols]
        byte_of = {symbol: byte for byte, symbol in enumerate(symbols)}
        self._bytes = {token_id: bytes(byte_of[symbol] for symbol in token)
                       for token, token_id in ids.items()}
        self._merge_cached = lru_cache(CACHED_WORDS)(self._merge)

    def encode(self, text: str) -> list[int]:
        """The token ids of a text; ``<|endoftext|>`` in it is text like any other.

        Raises UnicodeEncodeError for a lone surrogate, which has no UTF-8 form.
        """
        ids = []
        for match in WORD.finditer(text):
            word = match.group().encode("utf-8")
            ids.extend(self._merge_cached(word) if len(word) <= CACHED_LENGTH
                       else self._merge(word))
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD.

        Raises ValueError for an id outside the vocabulary.
        """
        try:
            return b"".join(self._bytes[token_id] for token_id in ids).decode("utf-8", "replace")
        except KeyError as error:
            raise ValueError(f"token id {error} is outside the vocabulary "
                             f"(0 to {len(self._bytes) - 1})") from None

    def _merge(self, word: bytes) -> list[int]:
        """The token ids of one word.

        The candidate pairs are in a heap and the tokens form a linked list, so a word of n bytes
        takes O(n log n). An entry of the heap is valid only if both its tokens are still there.
        """
        n, gone = len(word), -1
        ids = [self._byte_ids[byte] for byte in word] + [gone]  # index n, and so index -1: no token
        before, after = list(range(-1, n)), [*range(1, n + 1), n]

        def candidate(i: int) -> tuple | None:
            pair = ids[i], ids[after[i]]
            return (self._merges[pair], i, pair) if pair in self._merges else None

        heap = [entry for entry in map(candidate, range(n)) if entry]
        heapify(heap)
        while heap:
            merged, i, pair = heappop(heap)
            j = after[i]
            if pair != (ids[i], ids[j]):
                continue
            ids[i], ids[j] = merged, gone
            after[i], before[after[j]] = after[j], i
            for neighbour in (before[i], i):
                entry = candidate(neighbour)
                if entry:
                    heappush(heap, entry)
        return [token_id for token_id in ids if token_id != gone]


def get_encoder(vocab_dir: str | os.PathLike) -> Encoder:
    """The encoder of a folder's ``encoder.json`` and ``vocab.bpe``.

    Raises InputError for a file that is missing or damaged, or if the two do not fit together.
    """
    remedy = f"run: python vocab/download_vocab.py {vocab_dir}"
    tokens, table = Path(vocab_dir, "encoder.json"), Path(vocab_dir, "vocab.bpe")

    vocabulary = read_json(tokens, remedy)
    if not isinstance(vocabulary, dict) or not all(type(v) is int for v in vocabulary.values()):
        raise InputError(f"{tokens}: not a JSON object of token ids; {remedy}")

    merges, known = [], set(byte_symbols())
    for number, line in enumerate(read_lines(table, remedy), start=1):
        if number == 1 and line.startswith("#version"):
            continue
        pair = tuple(line.split(" "))
        if len(pair) != 2 or not known.issuperset(pair) or "".join(pair) in known:
            raise InputError(f"{table}:{number}: not two tokens with a blank between them, each a "
                             f"byte or made by a line above, that make a new one; {remedy}")
        merges.append(pair)
        known.add("".join(pair))

    try:
        return Encoder(vocabulary, merges)
    except ValueError as error:
        raise InputError(f"{vocab_dir}: encoder.json and vocab.bpe do not fit together: {error}; "
                         f"{remedy}") from None
