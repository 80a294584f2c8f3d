"""Shows how far Jittor's compiling is: a bar on a terminal, elsewhere a log line now and then.

Jittor compiles itself from Python; :class:`CoreProgress` replaces its own display of that. It
compiles operators in C++ while it holds Python's global lock, so no thread of ours could show
anything meanwhile, and reports on stderr: ``Compiling Operators(3/40) used: 2.1s eta: 26s``.
:func:`watch` therefore sends what C++ writes to stderr through a second process, which runs this
file as a script: it shows these reports as progress and passes on everything else.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # src/, for `runtime`

from runtime.progress import Progress

REPORT = re.compile(rb"Compiling Operators\((\d+)/(\d+)\)")
PERIOD = 10.0  # seconds between two log lines


class CoreProgress:
    """Has the interface of jittor_utils.DelayProgress, which Jittor updates for each file.

    At most starts Jittor only checks that its files are compiled: nothing is shown within DELAY.
    """

    DELAY = 2.0  # seconds

    def __init__(self, _message: str, total: int):
        self.total, self.started = total, time.monotonic()
        self.bar: Progress | None = None

    def update(self, index: int) -> None:
        """File ``index`` of ``total`` is compiled, counted from 0."""
        if self.bar is None and time.monotonic() - self.started > self.DELAY:
            self.bar = Progress(self.total, "compiling Jittor", "file", index, PERIOD)
        if self.bar is not None:
            self.bar.update()
            if index == self.total - 1:
                self.bar.close()


def watch() -> None:
    """From now on, what C++ writes to stderr in this process goes through :func:`relay`."""
    reader, writer = os.pipe()
    # In a session of its own, so that Ctrl-C does not end it before this process.
    subprocess.Popen([sys.executable, __file__], stdin=reader, start_new_session=True)
    if sys.stderr is sys.__stderr__:  # Python keeps the real one
        sys.stderr = open(os.dup(2), "w", buffering=1, errors="backslashreplace")
    os.dup2(writer, 2)
    os.close(reader)
    os.close(writer)


def relay(source: int, write: Callable[[bytes], object]) -> None:
    """Passes on what can be read from ``source`` until all its writers have closed it.

    Jittor's reports are shown as progress instead, and the empty lines that it writes before the
    first and after the last of them are dropped.
    """
    bar, before, kept, rest = None, b"\n", b"", b""  # kept: empty lines, the last may be Jittor's
    while chunk := os.read(source, 1 << 16):
        *lines, rest = re.split(rb"(?<=[\r\n])", rest + chunk)
        for line in lines:
            report = REPORT.match(line)
            if report:
                kept = kept[:-1] if before == b"\n" else kept
                done, total = map(int, report.groups())
                bar = bar or Progress(total, "compiling operators", "operator", period=PERIOD)
                bar.update(done - bar.done)
            elif line == b"\n" and (before.endswith(b"\n") or REPORT.match(before)):
                if bar is None:
                    kept += line
                else:
                    bar.close()
                    bar = None
            else:
                write(kept + line)
                kept = b""
            before = line
    write(kept + rest)


if __name__ == "__main__":
    relay(0, lambda line: os.write(2, line))
