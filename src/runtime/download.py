"""Files from the network: resumed where a transfer broke off, verified, whole or not at all.

A transfer is kept in ``NAME.part`` beside its place until it is complete and its digest is right.
The process that transfers it has the part locked, and others wait. Only Python's own HTTP
client is used; it honours ``http_proxy``, ``https_proxy`` and ``no_proxy``.
"""

import http.client
import os
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Callable, Iterator

from runtime.errors import InputError
from runtime.locks import lock
from runtime.progress import Progress, log

ATTEMPTS = 3  # in a row that bring nothing new
PAUSE = 1.0  # seconds before another attempt
TIMEOUT = 30.0  # seconds without a byte
USER_AGENT = {"User-Agent": "jittor-lora-e2e"}
MEGABYTE = 1 << 20


def is_there(path: Path, digest: Callable[[Path], str], expected: str) -> bool:
    """Whether ``path`` already is the file expected.

    Raises InputError where another file has its name: that may be the user's own, and is kept.
    """
    if not path.exists():
        return False
    if digest(path) != expected:
        raise InputError(f"{path}: not the published file ({digest.__name__} is not {expected}); "
                         "move it away to have that one instead")
    return True


def fetch(url: str, path: Path, digest: Callable[[Path], str], expected: str,
          remedy: str = "run this again to resume") -> None:
    """Brings ``url`` to ``path`` unless it is there, from where an earlier transfer broke off.

    If another process is transferring it, waits for that one. Raises InputError where the server
    cannot be reached or refuses (naming ``remedy``), where the file it sends is not the one
    expected, where another file has its name, and where the place cannot be written.
    """
    place = Path(os.path.realpath(path))  # a link stays, and its target is written
    part = place.with_name(f"{place.name}.part")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        while not is_there(path, digest, expected):
            with open(part, "ab") as file:
                if not lock(file, lambda: log(f"{path}: another process fetches it; waiting")):
                    continue
                file.seek(0, os.SEEK_END)  # the process before may have added to it
                try:
                    if not path.exists():  # else another process was done before the lock
                        _complete(url, file, part, digest, expected, remedy)
                        os.replace(part, place)
                        return
                finally:
                    if not file.tell():
                        part.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}; free some space "
                         "or choose another folder") from None


def _complete(url: str, file: IO[bytes], part: Path, digest: Callable[[Path], str], expected: str,
              remedy: str) -> None:
    """Transfers what ``file``, which appends to ``part``, lacks; empties it if it is wrong."""
    if digest(part) == expected:  # complete, but not yet in place
        return
    _transfer(url, file, remedy)
    if digest(part) != expected:
        _empty(file)
        raise InputError(f"{url}: not the published file ({digest.__name__} is not {expected}), "
                         f"so it was not kept; {remedy}")


def _transfer(url: str, file: IO[bytes], remedy: str) -> None:
    """Repeats requests until ``file`` is complete or ATTEMPTS of them have brought nothing."""
    failures = 0
    while True:
        have = file.tell()
        try:
            _receive(url, file)
            return
        except urllib.error.HTTPError as error:
            if error.code == 416 and have:  # the part is no beginning of this file
                _empty(file)
            elif error.code < 500 and error.code != 429:
                raise InputError(f"{url}: HTTP {error.code} {error.reason}; {remedy}") from None
            reason = f"HTTP {error.code} {error.reason}"
        except _Interrupted as error:
            reason = str(error)
        failures = 0 if file.tell() > have else failures + 1
        if failures == ATTEMPTS:
            raise InputError(f"{url}: {reason}; {remedy}")
        time.sleep(PAUSE)


def _receive(url: str, file: IO[bytes]) -> None:
    """One request for what follows the bytes that ``file`` has, appended to it."""
    have = file.tell()
    wanted = {"Range": f"bytes={have}-"} if have else {}
    request = urllib.request.Request(url, headers={**USER_AGENT, **wanted})
    with _network():
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    if response.status != 206:  # a server without ranges sends everything
        _empty(file)
        have = 0
    total = have + int(response.headers.get("Content-Length") or 0)
    name = Path(file.name).stem  # without .part
    with response, Progress(total // MEGABYTE, name, "MB", initial=have // MEGABYTE) as bar:
        while True:
            with _network():
                chunk = response.read(1 << 16)
            if not chunk:
                break
            file.write(chunk)
            bar.update(file.tell() // MEGABYTE - bar.done)
        file.flush()  # for the digest
        if file.tell() < total:
            raise _Interrupted(f"broke off at byte {file.tell()} of {total}")


class _Interrupted(Exception):
    """The connection failed; another attempt may do better."""


@contextmanager
def _network() -> Iterator[None]:
    """Tells failures of the connection from those of the disk, which are OSErrors, too."""
    try:
        yield
    except urllib.error.HTTPError:
        raise
    except (OSError, http.client.HTTPException) as error:
        raise _Interrupted(str(getattr(error, "reason", error)) or type(error).__name__) from None


def _empty(file: IO[bytes]) -> None:
    file.truncate(0)
    file.seek(0)
