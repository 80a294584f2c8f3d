"""What a script says while it works: log lines, how far long work is, results on stdout."""

from __future__ import annotations

import os
import sys
import time
from contextlib import contextmanager
from typing import IO, Iterable, Iterator, Sized, TypeVar

from tqdm import tqdm

from runtime import processes
from runtime.errors import one_line

Item = TypeVar("Item")


def log(message: str) -> None:
    """Prints one line on stdout, above a progress bar if there is one; only process 0 does.

    Tabs stay; other unprintable characters, see errors.one_line, and those that the encoding of
    stdout lacks become '?'.
    """
    if processes.rank() == 0:
        encoding = sys.stdout.encoding or "utf-8"
        tqdm.write(one_line(message, keep="\t").encode(encoding, "replace").decode(encoding))
        sys.stdout.flush()


class Progress:
    """A tqdm bar on a terminal; elsewhere a log line at most every ``period`` seconds.

    Used as a context manager, or as an iterable through :func:`progress`.
    """

    def __init__(self, total: int, desc: str, unit: str = "it", initial: int = 0,
                 period: float = 30.0):
        self.total, self.desc, self.unit, self.period = total, one_line(desc), unit, period
        self.done, self.note = initial, ""
        self.first: int | None = None
        self.started = self.logged = time.monotonic()
        self.bar = None
        if sys.stderr.isatty() and processes.rank() == 0:
            self.bar = tqdm(total=total, desc=self.desc, unit=unit, initial=initial,
                            dynamic_ncols=True, file=sys.stderr)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Ends the bar; to be called once nothing more is to be counted."""
        if self.bar is not None:
            self.bar.close()

    def update(self, n: int = 1, note: str = "") -> None:
        """Counts ``n`` more units as done; ``note`` (loss, perplexity) is shown beside them."""
        self.done += n
        self.note = note or self.note
        if self.first is None:
            # Jittor compiles during the first unit, which therefore says nothing of the others.
            self.first, self.started = self.done, time.monotonic()
        if self.bar is not None:
            if note:
                self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(n)
            return
        now = time.monotonic()
        if now - self.logged >= self.period:
            self.logged = now
            parts = [f"{self.desc}: {self.done}/{self.total} {self.unit}"]
            if self.done > self.first:
                pace = (now - self.started) / (self.done - self.first)
                parts.append(f"{(self.total - self.done) * pace:.0f} s left")
            log(", ".join([*parts, self.note] if self.note else parts))


def progress(items: Iterable[Item], desc: str, unit: str = "it") -> Iterator[Item]:
    """Yields from ``items`` while showing a :class:`Progress`."""
    items = items if isinstance(items, Sized) else list(items)
    with Progress(len(items), desc, unit) as bar:
        for item in items:
            yield item
            bar.update()


@contextmanager
def results_on_stdout() -> Iterator[IO[bytes]]:
    """Standard output as a file for results alone: what else is printed goes to standard error."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        with open(stdout, "wb", closefd=False) as results:
            yield results
    finally:
        sys.stdout.flush()
        os.dup2(stdout, 1)
        os.close(stdout)
