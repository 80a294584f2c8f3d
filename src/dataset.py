"""Encoded samples, and the order and shape in which training and beam search get them."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from typing import Iterator

import numpy as np

from runtime.errors import InputError
from runtime.formats import read_jsonl

FILL_SEED = 911  # of the generator that fills a data set up to whole batches

Sample = tuple[tuple[int, ...], tuple[int, ...]]  # the ids of a context and of its completion


@dataclass
class Batch:
    """B samples of a data set: arrays (B, seq_len), padded with 0 on the right."""

    input_ids: np.ndarray  # int32
    target: np.ndarray  # int32, input_ids shifted left by one
    mask: np.ndarray  # float32, 1 where the target is to be learned, else 0


class FTDataset:
    """The samples of an encoded ``.jsonl`` file, as the original's FT_Dataset gives them.

    Its length is rounded up to a whole number of batches; at a position past the last sample, each
    access draws a sample at random.
    """

    def __init__(self, path: str | os.PathLike, batch_size: int, seq_len: int, eval_len: int = 0,
                 joint_lm: bool = False, vocab_size: int = 50257, n_positions: int = 1024,
                 contexts_only: bool = False):
        """Reads ``path``; with ``joint_lm`` every token is a target, else the completion's.

        With ``contexts_only``, completions may be absent. Raises InputError for a malformed file,
        a token id outside the vocabulary, or a context longer than the model's ``n_positions``.
        """
        records = read_jsonl(path, {"context": list, "completion": list},
                             remedy="bash create_datasets.sh makes it, src/gpt2_encode.py others",
                             optional=["completion"] if contexts_only else [])
        self.samples = [(record["context"], record.get("completion", [])) for record in records]
        for number, (context, completion) in enumerate(self.samples, start=1):
            check_sample(f"{path}:{number}", context, completion, vocab_size, n_positions)
        self.batch_size, self.seq_len, self.eval_len = batch_size, seq_len, eval_len
        self.joint_lm = joint_lm
        self.num_batches = -(-len(self.samples) // batch_size)
        self._fill = random.Random(FILL_SEED)

    def __len__(self) -> int:
        return self.num_batches * self.batch_size

    @property
    def fill_state(self) -> list[int]:
        """The state of the generator that fills up batches: 625 integers in [0, 2**32)."""
        return list(self._fill.getstate()[1])

    @fill_state.setter
    def fill_state(self, state: list[int]) -> None:
        """Sets a state that this property gave before."""
        version, _, gauss = self._fill.getstate()
        self._fill.setstate((version, tuple(state), gauss))

    def lost(self) -> list[int]:
        """How many tokens of each completion are beyond ``seq_len``."""
        return [min(len(completion), max(0, len(context) + len(completion) - self.seq_len))
                for context, completion in self.samples]

    def learns(self) -> bool:
        """Whether any sample has a target."""
        return self.joint_lm or any(completion and len(context) < self.seq_len
                                    for context, completion in self.samples)

    def mean_tokens(self) -> float:
        """How many tokens of a sample are within ``seq_len``, on average."""
        return sum(min(len(context) + len(completion), self.seq_len)
                   for context, completion in self.samples) / len(self.samples)

    def _sample(self, item: int) -> tuple[list[int], list[int]]:
        """The sample at a position, cut at ``seq_len``."""
        if item >= len(self.samples):
            item = self._fill.randint(0, len(self.samples) - 1)
        context, completion = self.samples[item]
        return context[:self.seq_len], completion[:max(0, self.seq_len - len(context))]

    def batch(self, items: np.ndarray) -> Batch:
        """The samples at the given positions."""
        shape = (len(items), self.seq_len)
        batch = Batch(np.zeros(shape, np.int32), np.zeros(shape, np.int32),
                      np.zeros(shape, np.float32))
        for row, item in enumerate(items):
            context, completion = self._sample(int(item))
            ids = context + completion
            batch.input_ids[row, :len(ids)] = ids
            batch.target[row, :len(ids) - 1] = ids[1:]
            first = 0 if self.joint_lm else len(context) - 1
            batch.mask[row, first:len(ids) - 1] = 1
        return batch

    def batches(self, seed: int, epoch: int, rank: int = 0, world_size: int = 1,
                drop_last: bool = False, first: int = 0) -> Iterator[Batch]:
        """An epoch's batches for process ``rank`` of ``world_size``, from number ``first`` on.

        Shuffled and divided as PyTorch's DistributedSampler does: each process takes every
        world_size-th position, and the first ones again if that does not divide evenly.
        ``drop_last`` leaves out a last batch that is not full.
        """
        for items in self._positions(seed, epoch, rank, world_size)[first:]:
            if len(items) == self.batch_size or not drop_last:
                yield self.batch(items)

    def sample_batches(self, seed: int, epoch: int, rank: int = 0,
                       world_size: int = 1) -> list[list[Sample]]:
        """The samples of all of :meth:`batches`, cut at ``seq_len``, without padding."""
        return [[(tuple(context), tuple(completion))
                 for context, completion in (self._sample(int(item)) for item in items)]
                for items in self._positions(seed, epoch, rank, world_size)]

    def _positions(self, seed: int, epoch: int, rank: int, world_size: int) -> list[np.ndarray]:
        """The positions of the samples of each of an epoch's batches."""
        order = permutation(len(self), seed + epoch)
        share = -(-len(order) // world_size)
        order = np.resize(order, share * world_size)[rank::world_size]
        return [order[start:start + self.batch_size]
                for start in range(0, share, self.batch_size)]

    def full_batches(self, world_size: int) -> int:
        """The number of batches of an epoch in each process, without one that is not full."""
        return -(-len(self) // world_size) // self.batch_size

    def queries(self) -> list[tuple[int, ...]]:
        """Each sample's context, its last seq_len - eval_len tokens where it is longer."""
        keep = self.seq_len - self.eval_len
        return [tuple(context[-keep:]) for context, _ in self.samples]


def check_sample(where: str, context: list[int], completion: list[int], vocab_size: int,
                 n_positions: int) -> None:
    """Raises InputError, naming ``where``, unless the model can read the sample."""
    if not context:
        raise InputError(f"{where}: an empty context; encode with --add_bos")
    if len(context) > n_positions:
        raise InputError(f"{where}: a context of {len(context)} tokens, the model has "
                         f"{n_positions} positions; shorten it or remove the line")
    worst = max(context + completion)
    if worst >= vocab_size:
        raise InputError(f"{where}: token id {worst}, the vocabulary has {vocab_size}; encode "
                         "with the files in vocab/")


def permutation(n: int, seed: int) -> np.ndarray:
    """``torch.randperm(n, generator=torch.Generator().manual_seed(seed))`` from NumPy alone.

    Both draw from MT19937 with the same seeding: one 32-bit number for each position, after which
    position i is swapped with i + draw mod (n - i).
    """
    draws = np.random.RandomState(seed).randint(0, 2**32, max(n - 1, 0), dtype=np.uint32)
    order = np.arange(n)
    for i, draw in enumerate(draws):
        j = i + int(draw) % (n - i)
        order[i], order[j] = order[j], order[i]
    return order
