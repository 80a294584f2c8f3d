"""How much of the processors other programs took while a side computed, from Linux's /proc.

A round in which they took too much is dropped and measured again, see workers.in_turns.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LIMIT = 0.06  # the default of --quiet
TRIES = 3  # rounds measured at most, as a multiple of the rounds wanted
# A tick is 10 ms. Each counter is rounded to ticks, so that a few of them say nothing.
ROUNDING = 2


class Watch:
    """Measures the share of the processors that other work takes while a side computes.

    ``pids`` names the process of each side. A round is quiet if the share is at most ``limit`` in
    the turn of every side. Without /proc (outside Linux) every round is quiet.
    """

    def __init__(self, pids: dict[str, int], limit: float = LIMIT):
        self.pids, self.limit = pids, limit
        self.rounds: list[float] = []  # the largest share of each round
        self.kept: list[int] = []  # the numbers of the quiet rounds, in order

    def start_round(self) -> None:
        self.rounds.append(0.0)

    @contextmanager
    def turn(self, side: str) -> Iterator[None]:
        """Measures while the block runs: steal, and time of other processes than the side's."""
        before, own_before = _machine(), _own(self.pids[side])
        yield
        busy, idle, stolen = (b - a for a, b in zip(before, _machine()))
        foreign = busy - (_own(self.pids[side]) - own_before)
        disturbed = max(0, foreign + stolen - ROUNDING)
        self.rounds[-1] = max(self.rounds[-1], disturbed / max(1, busy + idle + stolen))

    def end_round(self) -> bool:
        """True if the round was quiet."""
        quiet = self.rounds[-1] <= self.limit
        if quiet:
            self.kept.append(len(self.rounds) - 1)
        return quiet

    def summary(self) -> dict:
        """What the result says of it."""
        return {"limit": self.limit, "kept": len(self.kept),
                "dropped": len(self.rounds) - len(self.kept), "shares": self.rounds}


def share(text: str) -> float:
    """An argparse type: a number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: give a share from 0 to 1")
    return value


def _machine() -> tuple[int, int, int]:
    """Ticks that the processors this process may use were busy, idle and stolen."""
    busy = idle = stolen = 0
    names = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    for line in _read("/proc/stat").splitlines():
        name, *counts = line.split()
        if name in names:
            user, nice, system, rest, waiting, irq, softirq, steal = map(int, counts[:8])
            busy += user + nice + system + irq + softirq
            idle += rest + waiting
            stolen += steal
    return busy, idle, stolen


def _own(pid: int) -> int:
    """Ticks that a process has used."""
    after_name = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return sum(map(int, after_name[11:13]))  # utime and stime


def peak_mib(pid: int) -> float | None:
    """The most memory that a process has held, in MiB."""
    for line in _read(f"/proc/{pid}/status").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
