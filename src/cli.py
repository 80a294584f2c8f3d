"""What every script shares: errors a user can act on, and progress a user can read."""

from __future__ import annotations

import argparse
import io
import math
import os
import signal
import sys
import time
import traceback
from contextlib import nullcontext, redirect_stderr
from typing import Callable, Iterable, Iterator

from tqdm import tqdm

import processes

GRACE = 2.0  # seconds until another process than 0 says what is wrong


class InputError(Exception):
    """A mistake in what the user gave us.

    The message is one line that names the file, the line number where there is one, and the
    remedy, e.g. ``data/e2e/train.txt:17: no '||' between ...; write 'meaning||text'``.
    """


class Interrupted(Exception):
    """The user stopped a script, which has left things in order; the message says how to go on."""


def run(main: Callable[[], None]) -> None:
    """Runs a script's ``main``; what it raises ends it with one line on stderr.

    Exit code 1: an InputError, or no memory; 130: stopped by Ctrl-C; 141: whoever read its output
    has gone, e.g. ``| head``. Of several processes one that fails ends all.
    """
    try:
        # The others say what process 0 says, and what only they have to say comes at the end.
        with redirect_stderr(io.StringIO()) if processes.rank() else nullcontext():
            main()
            sys.stdout.flush()
    except InputError as error:
        _end(1, f"error: {error}")
    except MemoryError:
        _end(1, "error: out of memory; take smaller batches or a smaller model")
    except Interrupted as interrupted:
        _end(130, str(interrupted))
    except KeyboardInterrupt:
        _end(130, "interrupted")
    except BrokenPipeError:
        _end(141)
    except OSError as error:  # of standard output, or what no module has put into better words
        _end(1, f"error: {error.filename or 'standard output'}: {error.strerror or error}; check "
                "free space and permissions")
    except SystemExit:  # --help, or a flag that is wrong in every process
        if processes.rank():
            time.sleep(GRACE)
        raise
    except BaseException:
        if processes.world_size() == 1:
            raise
        # Python would wait for the other processes at its end, and they for this one.
        _end(1, traceback.format_exc())


def _end(code: int, message: str = "") -> None:
    """Ends the process, with ``message`` on stderr, and with it all of its run."""
    if processes.rank():
        time.sleep(GRACE)  # it is process 0 that says what all would say
    try:
        sys.stdout.flush()
    except OSError:  # what it still holds goes nowhere, and must not fail again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if message:
        print(message, file=sys.stderr)
    if processes.world_size() > 1:
        sys.stderr.flush()
        os._exit(code)  # at once, whereupon mpirun ends the others
    sys.exit(code)


class StopRequest:
    """While it is entered, Ctrl-C, SIGTERM and SIGHUP ask for a stop instead of ending the process.

    ``requested`` becomes true at the first of them; a second Ctrl-C ends the process at once.
    ``say`` hears of the first.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self, say: Callable[[str], None]):
        self._say, self.requested = say, False

    def __enter__(self) -> "StopRequest":
        # One that is ignored, as SIGHUP under nohup, stays so.
        self._before = {number: signal.getsignal(number) for number in self.SIGNALS
                        if signal.getsignal(number) != signal.SIG_IGN}
        for number in self._before:
            signal.signal(number, self._request)
        return self

    def __exit__(self, kind, error, _) -> None:
        self._restore()
        if self.requested and kind is RuntimeError:
            # A terminal sends Ctrl-C to Jittor's compilers, too, and it fails without them.
            raise Interrupted("interrupted while Jittor compiled") from None

    def _request(self, *_) -> None:
        self.requested = True
        self._restore()
        self._say("stopping after this micro-batch; Ctrl-C again stops at once")

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def log(message: str) -> None:
    """Prints one line, above a running progress bar if there is one; only process 0 does."""
    if processes.rank() == 0:
        tqdm.write(message)
        sys.stdout.flush()


def at_least(least: float, kind: type = int) -> Callable[[str], float]:
    """An argparse type: a number of ``kind`` that is not below ``least``."""

    def parse(text: str):
        value = kind(text)
        if not value >= least:
            raise argparse.ArgumentTypeError(f"{text} is below {least}")
        if value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not finite")
        return value

    parse.__name__ = kind.__name__  # argparse names it in "invalid int value: ..."
    return parse


def between(least: float, most: float) -> Callable[[str], float]:
    """An argparse type: a number from ``least`` to ``most``."""

    def parse(text: str) -> float:
        value = float(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not in [{least}, {most}]")
        return value

    parse.__name__ = "float"
    return parse


def seed(text: str) -> int:
    """An argparse type: a seed that every generator takes."""
    value = int(text)
    if not 0 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 2**31)")
    return value


def share(text: str) -> float:
    """An argparse type: a number in [0, 1)."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return value


class Progress:
    """A tqdm bar on a terminal; elsewhere a log line at most every ``period`` seconds.

    Used as a context manager, or as an iterable through :func:`progress`.
    """

    def __init__(self, total: int, desc: str, unit: str = "it", initial: int = 0,
                 period: float = 30.0):
        self.total, self.desc, self.unit, self.period = total, desc, unit, period
        self.done, self.first, self.note = initial, None, ""
        self.started = self.spoken = time.monotonic()
        self.bar = None
        if sys.stderr.isatty() and processes.rank() == 0:
            self.bar = tqdm(total=total, desc=desc, unit=unit, initial=initial,
                            dynamic_ncols=True, file=sys.stderr)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, n: int = 1, note: str = "") -> None:
        """Counts ``n`` more units done; ``note`` is shown behind the bar (loss, ppl ...)."""
        self.done += n
        self.note = note or self.note
        if self.first is None:  # Jittor compiles while the first unit runs: no measure of the rest
            self.first, self.started = self.done, time.monotonic()
        if self.bar is not None:
            if note:
                self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(n)
            return
        now = time.monotonic()
        if now - self.spoken >= self.period:
            self.spoken = now
            parts = [f"{self.desc}: {self.done}/{self.total} {self.unit}"]
            if self.done > self.first:
                pace = (now - self.started) / (self.done - self.first)
                parts.append(f"{(self.total - self.done) * pace:.0f} s left")
            log(", ".join([*parts, self.note] if self.note else parts))


def progress(items: Iterable, desc: str, total: int | None = None, unit: str = "it") -> Iterator:
    """Yields from ``items`` while showing a :class:`Progress`."""
    if total is None:
        items = list(items)
        total = len(items)
    with Progress(total, desc, unit) as bar:
        for item in items:
            yield item
            bar.update()
