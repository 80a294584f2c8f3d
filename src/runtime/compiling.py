"""Shows how far Jittor's compiling is: a bar on a terminal, elsewhere a log line now and then.

Jittor compiles itself from Python; :class:`CoreProgress` replaces its own display of that. It
compiles operators in C++ while it holds Python's global lock, so no thread of ours could show
anything meanwhile, and reports on stderr: ``Compiling Operators(3/40) used: 2.1s eta: 26s``.
:func:`watch` therefore sends what C++ writes to stderr through a second process, which runs this
file as a script: it shows these reports as progress and passes on everything else. It also prints
a line if this process waits for another one that compiles, and if this process crashes.
"""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import multiprocessing.pool
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # src/, for `runtime`

from runtime import processes
from runtime.errors import InputError
from runtime.progress import Progress, log

REPORT = re.compile(rb"Compiling Operators\((\d+)/(\d+)\)")
PERIOD = 10.0  # seconds between two log lines
END = b"\0the process ends\n"  # the last line of a process that does not crash
CRASH = "was killed or crashed; if its memory ran out, take smaller batches or a smaller model"
WAITING = "waiting for another process that compiles for the same cache ..."

# While stderr is watched: descriptors of the real one and of the pipe to the relay; the relay.
_watched: tuple[int, int, subprocess.Popen] | None = None


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


class CompilerPool(multiprocessing.pool.Pool):
    """Jittor's compiler processes. Python's pool waits for ever for one that was killed."""

    def imap_unordered(self, func: Callable, iterable: Iterable,  # type: ignore[override]
                       chunksize: int = 1) -> Iterator[Any]:
        """As Python's; raises InputError within a second after a process has ended."""
        processes_at_first = [process.pid for process in self._pool]  # type: ignore[attr-defined]
        results = super().imap_unordered(func, iterable, chunksize)
        while True:
            try:
                yield results.next(timeout=1)
            except StopIteration:
                return
            except multiprocessing.TimeoutError:
                alive = [process.pid for process in self._pool  # type: ignore[attr-defined]
                         if process.exitcode is None]
                if alive != processes_at_first:
                    raise InputError("a process that compiles Jittor was killed, perhaps because "
                                     "the memory ran out; start again") from None


def take_over() -> None:
    """Replaces Jittor's display of progress, its compiler processes, its handler of SIGCHLD."""
    import jittor_utils

    import_scope = jittor_utils.import_scope

    @contextmanager
    def loading(flags: int) -> Iterator[None]:
        with import_scope(flags):
            yield
        # A library of Jittor's has a handler that ends this process if a signal kills a child. To
        # block the signal here would not do: any thread may get it, and NumPy has some.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    jittor_utils.import_scope = loading
    jittor_utils.DelayProgress = CoreProgress
    jittor_utils.Pool = CompilerPool
    jittor_utils.pool_initializer = partial(_begin_compiler, os.getpid(),
                                            jittor_utils.pool_initializer)


def _begin_compiler(parent: int, initializer: Callable[[], None]) -> None:
    # A terminal sends Ctrl-C to these processes, too: one that ends with the lock of their queue
    # makes the end of the pool wait for ever. They end with the main process, whose lock they hold.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it ended before
        os._exit(1)
    with suppress(Exception):  # Python would start another process in its place, without end
        initializer()


def import_failed() -> bool:
    """Whether Jittor's import ended in the middle: what it runs at exit can then wait for ever."""
    return "jittor_utils" in sys.modules and "jittor" not in sys.modules


def why_failed(error: BaseException) -> str:
    """The last line of a script in which Jittor could not compile an operator, else "".

    What the compiler says is on stderr then.
    """
    if not re.search("Run cmd failed|during compilation", str(error)):
        return ""
    import jittor_utils

    return ("error: Jittor cannot compile an operator, see the lines above; check that "
            f"{jittor_utils.cc_path} works and that memory, {tempfile.gettempdir()} and "
            f"{jittor_utils.cache_path} have room")


def end_pool() -> None:
    """Ends Jittor's compiler processes, which otherwise stay until the main process ends."""
    import jittor_utils

    if jittor_utils.pool_size:
        atexit.unregister(jittor_utils.pool_cleanup)
        jittor_utils.pool_cleanup()
        jittor_utils.pool_size = 0


def discard_unfinished(cache: Path) -> None:
    """Makes Jittor compile again what a process that was killed meanwhile left half written.

    Jittor writes OUTPUT.key after OUTPUT, and trusts OUTPUT if the key is right. But a key can be
    of an earlier OUTPUT.
    """
    for key in cache.rglob("*.key"):
        with suppress(FileNotFoundError):  # a process that compiles replaces its output meanwhile
            if key.with_suffix("").stat().st_mtime_ns > key.stat().st_mtime_ns:
                key.unlink()


def watch() -> None:
    """From now on, what C++ writes to stderr in this process goes through :func:`relay`."""
    global _watched
    reader, writer = os.pipe()
    stderr = os.dup(2)
    # In a session of its own, so that Ctrl-C does not end it before this process.
    _watched = stderr, writer, subprocess.Popen([sys.executable, __file__], stdin=reader,
                                                start_new_session=True)
    if sys.stderr is sys.__stderr__:  # Python keeps the real one
        sys.stderr = open(stderr, "w", buffering=1, errors="backslashreplace", closefd=False)
    os.dup2(writer, 2)
    os.close(reader)
    atexit.register(unwatch)


def unwatch() -> None:
    """Ends :func:`watch`, if it was called, when all is passed on.

    A process that ends without it has crashed.
    """
    global _watched
    if _watched is not None:
        stderr, writer, process = _watched
        with suppress(BrokenPipeError):  # the relay could not be started
            os.write(writer, END)
        os.close(writer)
        os.dup2(stderr, 2)
        with suppress(subprocess.TimeoutExpired):  # another process can have the pipe, too
            process.wait(timeout=1)
        _watched = None


def relay(source: int, write: Callable[[bytes], object],
          idle: Callable[[], object] = lambda: None) -> bool:
    """Passes on what can be read from ``source`` until all its writers have closed it.

    Jittor's reports are shown as progress instead, and the empty lines that it writes before the
    first and after the last of them are dropped. Returns whether END was there; it is dropped, too.
    Calls ``idle`` every two seconds in which nothing can be read.
    """
    ended = False
    bar, before, kept, rest = None, b"\n", b"", b""  # kept: empty lines, the last may be Jittor's
    while chunk := _read(source, idle):
        *lines, rest = re.split(rb"(?<=[\r\n])", rest + chunk)
        for line in lines:
            if line.endswith(END):
                ended, line = True, line[:-len(END)]
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
    return ended


def _read(source: int, idle: Callable[[], object]) -> bytes:
    while not select.select([source], [], [], 2)[0]:
        idle()
    return os.read(source, 1 << 16)


class WaitingReport:
    """Called now and then, prints a line when a process waits for a file lock at two calls."""

    def __init__(self, process: int):
        self._blocked, self._times = f"-> \\w+ +ADVISORY +WRITE +{process} ", 0

    def __call__(self) -> None:
        waits = re.search(self._blocked, Path("/proc/locks").read_text())
        self._times = self._times + 1 if waits else 0
        if self._times == 2:
            log(WAITING)


if __name__ == "__main__":
    ended = relay(0, lambda line: os.write(2, line), WaitingReport(os.getppid()))
    # With several hosts mpirun names the process that failed first. It kills the others.
    if not ended and not processes.several_hosts() and processes.first_to_report():
        print(f"error: process {processes.rank()} of {processes.world_size()} {CRASH}",
              file=sys.stderr)
