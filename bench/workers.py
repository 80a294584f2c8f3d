"""The parent process of a benchmark: it runs each side as a process and asks them in turn.

PyTorch, Jittor and CTranslate2 conflict within one process. So each side is a process that runs
until the end. While one computes, the others wait for a request and use no processor time.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext

from quiet import TRIES, Watch
from shared import ROOT, InputError

# OpenMP's threads may busy-wait for 0.2 s after their work, which would slow the next side down.
PAUSE = 0.3


class Worker:
    """Runs one side, bench/SCRIPT, in a process of its own. A context manager."""

    def __init__(self, script: str):
        self.script = script
        self.stderr = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "bench" / script], text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self.stderr, cwd=ROOT, start_new_session=True,
            # OMP_NUM_THREADS of the caller would slow down some sides and not others.
            env={**os.environ, "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))})

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)  # with Jittor's compiler processes
            self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.stderr):
            stream.close()

    def ask(self, call: str, **arguments):
        """Calls the side's method ``call``; returns its value or raises InputError."""
        try:
            self.process.stdin.write(json.dumps({"call": call, "with": arguments}) + "\n")
            self.process.stdin.flush()
            answer = json.loads(self.process.stdout.readline() or "null")
        except BrokenPipeError:
            answer = None
        if answer is None:
            self.stderr.seek(0)
            last = (self.stderr.read().strip().splitlines() or ["no message"])[-1]
            raise InputError(f"bench/{self.script} ended ({last}); if packages are missing: "
                             "pip install -r requirement-bench.txt")
        if "error" in answer:
            raise InputError(f"bench/{self.script}, {call}: {answer['error'].splitlines()[0]}")
        return answer["value"]


def in_turns(sides: Iterable[str], rounds: int, ask: Callable[[str, int], object],
             watch: Watch | None = None) -> Iterator[dict]:
    """Asks every side once in each round, in a new random order.

    Calls ``ask(side, round)``; the first round is 0. Yields the answers of each round by side. With
    ``watch``, a round that other work disturbed is dropped and asked again, until all are quiet or
    TRIES times as many have been measured. Raises InputError if not one was quiet.
    """
    draw, sides = random.Random(0), list(sides)
    number = 0
    for _ in range(rounds * (TRIES if watch else 1)):
        answers = {}
        if watch:
            watch.start_round()
        for side in draw.sample(sides, len(sides)):
            time.sleep(PAUSE)
            with watch.turn(side) if watch else nullcontext():
                answers[side] = ask(side, number)
        if watch and not watch.end_round():
            continue
        yield answers
        number += 1
        if number == rounds:
            return
    if rounds and number == 0:
        raise InputError(f"other programs disturbed all {len(watch.rounds)} rounds: they took up "
                         f"to {max(watch.rounds):.0%} of the processors; end them, or allow more "
                         "with --quiet SHARE")
