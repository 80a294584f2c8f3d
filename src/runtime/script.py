"""How a script ends: exit codes, the last line on stderr, and requests to stop."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import time
import traceback
from contextlib import nullcontext, redirect_stderr
from typing import Callable, NoReturn

from runtime import compiling, memory, processes
from runtime.errors import InputError, Interrupted, one_line

OUT_OF_MEMORY = "error: out of memory; take smaller batches or a smaller model"
GRACE = 2.0  # seconds that processes other than 0 wait before they report an error


def run(main: Callable[[], None]) -> None:
    """Runs a script's ``main`` and turns what it raises into one line on stderr and an exit code.

    1: an InputError, or not enough memory; 130: stopped by Ctrl-C; 141: the reader of its output
    is gone, e.g. ``| head``. If one of several processes fails, all of them end.
    """
    _open_standard_streams()
    try:
        # Process 0 reports what all processes would; theirs is kept back.
        with redirect_stderr(io.StringIO()) if processes.rank() else nullcontext():
            main()
            sys.stdout.flush()
    except InputError as error:
        _end(1, f"error: {processes.this_host()}{error}")
    except MemoryError:
        _end(1, OUT_OF_MEMORY)
    except KeyboardInterrupt as interrupt:
        _end(130, str(interrupt) or "interrupted")
    except BrokenPipeError:
        _end(141)
    except OSError as error:  # of standard output, or one that no module has described better
        _end(1, OUT_OF_MEMORY if error.errno == errno.ENOMEM else one_line(
            f"error: {error.filename or 'standard output'}: {error.strerror or error}; check free "
            "space and permissions"))
    except SystemExit:  # --help, or a flag that is wrong in every process
        if processes.rank():
            time.sleep(GRACE)
        raise
    except BaseException as error:
        if memory.ran_out(error):
            _end(1, OUT_OF_MEMORY)
        if not_compiled := compiling.why_failed(error):
            _end(1, not_compiled)
        if processes.world_size() == 1:
            raise
        # At exit, MPI would wait for the other processes, which wait for this one.
        _end(1, traceback.format_exc())


def _open_standard_streams() -> None:
    """Opens /dev/null for what the caller has closed, or the next file would take its place."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
            setattr(sys, name, open(number, mode))


def _end(code: int, message: str = "") -> NoReturn:
    """Ends this process, and with it all processes of the run; prints ``message`` on stderr."""
    processes.first_to_report()
    compiling.unwatch()
    if processes.rank():
        time.sleep(GRACE)  # process 0 reports first
    try:
        sys.stdout.flush()
    except OSError:  # drop what is still buffered, or flushing it at exit would fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if message:
        print(message, file=sys.stderr)
    if processes.world_size() > 1 or compiling.import_failed():
        sys.stderr.flush()
        os._exit(code)  # mpirun then ends the others
    sys.exit(code)


class StopRequest:
    """In its block, Ctrl-C, SIGTERM and SIGHUP ask for a stop instead of ending the process.

    The first of them makes ``requested`` true and calls ``say`` with a message; a second Ctrl-C
    ends the process at once.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self, say: Callable[[str], None]):
        self._say, self.requested = say, False

    def __enter__(self) -> StopRequest:
        # A signal that is ignored, as SIGHUP is under nohup, stays ignored.
        self._before = {number: signal.getsignal(number) for number in self.SIGNALS
                        if signal.getsignal(number) != signal.SIG_IGN}
        for number in self._before:
            signal.signal(number, self._request)
        return self

    def __exit__(self, kind, error, _) -> None:
        self._restore()
        if self.requested and kind is RuntimeError:
            # A terminal sends Ctrl-C also to Jittor's compiler processes, and Jittor then fails.
            raise Interrupted("interrupted while Jittor compiled") from None

    def _request(self, *_) -> None:
        self.requested = True
        self._restore()
        self._say("stopping after this micro-batch; Ctrl-C again stops at once")

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
