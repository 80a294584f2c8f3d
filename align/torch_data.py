"""Samples, their padding and their order, with torch's own sampler and loader."""

from __future__ import annotations

import os
import random

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from common import InputError, read_jsonl


def read_samples(path: str | os.PathLike, vocab_size: int = 50257) -> list[dict]:
    """The samples of an encoded file, ``{"context": [id ...], "completion": [id ...]}`` each.

    Raises InputError naming file and line, also for an id outside the vocabulary.
    """
    samples = read_jsonl(path, {"context": list, "completion": list},
                         remedy="write it with src/gpt2_encode.py")
    for number, sample in enumerate(samples, start=1):
        largest = max(sample["context"] + sample["completion"], default=0)
        if largest >= vocab_size:
            raise InputError(f"{path}:{number}: token id {largest} is outside the vocabulary of "
                             f"{vocab_size}; write the file with src/gpt2_encode.py")
    return samples


class FTDataset(Dataset):
    """Padded samples; their number is rounded up to a whole number of batches.

    An index past the end draws a random sample at each access. The generator is not reset between
    epochs, so the fillers of one epoch differ from those of the next.
    """

    def __init__(self, samples: list[dict], batch_size: int, seq_len: int, joint_lm: bool = False):
        """``joint_lm`` trains on context and completion, not only on the completion."""
        self.samples, self.batch_size = samples, batch_size
        self.seq_len, self.joint_lm = seq_len, joint_lm
        self.num_batches = -(-len(samples) // batch_size)
        self.fillers = random.Random(911)

    def __len__(self) -> int:
        return self.num_batches * self.batch_size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """``id`` () int64; ``input``, ``target`` (seq_len) int64; ``mask`` (seq_len) float32.

        In a sample cut at seq_len, the last position has a target, but is not trained on.
        """
        if index >= len(self.samples):
            index = self.fillers.randint(0, len(self.samples) - 1)
        context, completion = self.samples[index]["context"], self.samples[index]["completion"]
        sequence = context + completion
        length = min(len(sequence), self.seq_len)
        if self.joint_lm:
            mask = [1.0] * (length - 1)
        else:
            mask = [0.0] * (len(context) - 1) + [1.0] * (length - len(context))
        return {"id": torch.tensor(index),
                "input": torch.tensor(self._pad(sequence, 0)),
                "target": torch.tensor(self._pad(sequence[1:], 0)),
                "mask": torch.tensor(self._pad(mask, 0.0))}

    def _pad(self, items: list, filler) -> list:
        return items[:self.seq_len] + [filler] * (self.seq_len - len(items))


def make_loader(dataset: FTDataset, seed: int, drop_last: bool) -> DataLoader:
    """Batches in the original's order, that of DistributedSampler with one process.

    ``loader.sampler.set_epoch(n)`` chooses the permutation. Training counts n from 1; validation
    always has n = 0.
    """
    sampler = DistributedSampler(dataset, num_replicas=1, rank=0, shuffle=True, seed=seed)
    return DataLoader(dataset, dataset.batch_size, sampler=sampler, drop_last=drop_last)
