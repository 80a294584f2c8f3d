"""Locks that keep two runs from writing the same files."""

import fcntl
import os
import socket
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Iterator

from runtime.errors import InputError


@contextmanager
def exclusive(path: Path, another: str) -> Iterator[None]:
    """Holds the lock file ``path`` during the block and removes it at the end.

    If the process is killed, the file stays, but the lock is free. Raises InputError if another
    process holds it, or if the file cannot be written; ``another`` is the remedy, e.g. "another
    --work_dir". A file system without locks is used without one.
    """
    file = _locked(path, another)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        file.close()


def _locked(path: Path, another: str) -> IO[str]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = open(path, "a+", encoding="utf-8", errors="replace")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read(200).strip() or "another process"
                raise InputError(f"{path.parent}: in use by {holder}; wait for it, or give "
                                 f"{another}") from None
            except OSError:
                return file
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
            file.close()  # its last holder has removed it meanwhile
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        return file
    except OSError as error:
        raise InputError(f"{path.parent}: cannot be written: {error.strerror or error}; give "
                         f"{another}") from None
