"""Locks that keep two processes from writing the same files; the system frees those of the dead."""

import errno
import fcntl
import os
import socket
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Callable, Iterator

from runtime.errors import InputError

REMOVED = {errno.ENOENT, errno.ESTALE}  # ESTALE: by another host, on a network file system


def lock(file: IO, before_waiting: Callable[[], None] = lambda: None) -> bool:
    """Locks an open file against other processes; returns whether its name still refers to it.

    Waits for another process that has the lock, and calls ``before_waiting`` first. The lock ends
    when the file is closed, at the latest with the process. On a file system without locks there
    is no lock. Raises OSError if locking fails.
    """
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            before_waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
    except OSError as error:
        if error.errno not in REMOVED:
            raise
        return False


@contextmanager
def exclusive(path: Path, another: str) -> Iterator[None]:
    """Holds the lock file ``path`` during the block.

    The file stays: a host may see a removed file for about a second on a network file system, and
    lock it while another locks a new one of that name. Raises InputError if another process, of
    this host or another, holds the lock, or if the file cannot be written; ``another`` is the
    remedy, e.g. "another --work_dir".
    """
    def refuse() -> None:
        file.seek(0)
        holder = file.read(200).strip() or "another process"
        raise InputError(f"{path.parent}: in use by {holder}; wait for it, or give {another}")

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = open(path, "a+", encoding="utf-8", errors="replace")
            if lock(file, refuse):
                break
            file.close()  # the user has removed it meanwhile
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    except OSError as error:
        raise InputError(f"{path.parent}: cannot be written: {error.strerror or error}; give "
                         f"{another}") from None
    with file:
        yield
