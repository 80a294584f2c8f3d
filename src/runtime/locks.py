"""Locks that keep two runs from writing the same files."""

import fcntl
import os
import socket
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

from runtime.errors import InputError


@contextmanager
def exclusive(path: Path, remedy: str) -> Iterator[None]:
    """Holds the lock file ``path`` during the block; it is free again when the process ends.

    Raises InputError, which names the process that holds it, if there is one, or if the file cannot
    be written. A file system without locks is used without one.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}; choose another "
                         "folder") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(200).strip() or "another process"
            raise InputError(f"{path.parent}: in use by {holder}; {remedy}") from None
        except OSError:
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
