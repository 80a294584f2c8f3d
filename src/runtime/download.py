"""Files from the network: resumed where a transfer broke off, verified, whole or not at all.

A transfer is kept in ``NAME.part`` beside its place until it is complete and its digest is right.
Only Python's own HTTP client is used; it honours ``http_proxy``, ``https_proxy`` and ``no_proxy``.
"""

import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator

from runtime.errors import InputError
from runtime.progress import Progress

ATTEMPTS = 3  # in a row that bring nothing new
PAUSE = 1.0  # seconds before another attempt
TIMEOUT = 30.0  # seconds without a byte
USER_AGENT = {"User-Agent": "jittor-lora-e2e"}
MEGABYTE = 1 << 20


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    return _digest(path, hashlib.sha256())


def git_blob_id(path: Path) -> str:
    """The name git gives to a file's content, as ``git hash-object`` prints it."""
    return _digest(path, hashlib.sha1(b"blob %d\0" % path.stat().st_size))


def _digest(path: Path, digest) -> str:
    with open(path, "rb") as file:
        while chunk := file.read(MEGABYTE):
            digest.update(chunk)
    return digest.hexdigest()


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
    """Brings ``url`` to ``path``, from where an earlier transfer broke off.

    Raises InputError where the server cannot be reached or refuses (naming ``remedy``), where the
    file it sends is not the one expected, and where the place cannot be written.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not (part.exists() and digest(part) == expected):  # complete, but not yet in place
            _transfer(url, part, remedy)
            if digest(part) != expected:
                part.unlink()
                raise InputError(f"{url}: not the published file ({digest.__name__} is not "
                                 f"{expected}), so it was not kept; {remedy}")
        os.replace(part, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}; free some space "
                         "or choose another folder") from None


def _transfer(url: str, part: Path, remedy: str) -> None:
    """Repeats requests until ``part`` is complete or ATTEMPTS of them have brought nothing."""
    failures = 0
    while True:
        have = _size(part)
        try:
            _receive(url, part, have)
            return
        except urllib.error.HTTPError as error:
            if error.code == 416 and have:  # the part is no beginning of this file
                part.unlink()
            elif error.code < 500 and error.code != 429:
                raise InputError(f"{url}: HTTP {error.code} {error.reason}; {remedy}") from None
            reason = f"HTTP {error.code} {error.reason}"
        except _Interrupted as error:
            reason = str(error)
        failures = 0 if _size(part) > have else failures + 1
        if failures == ATTEMPTS:
            raise InputError(f"{url}: {reason}; {remedy}")
        time.sleep(PAUSE)


def _receive(url: str, part: Path, have: int) -> None:
    """One request for what follows the first ``have`` bytes, appended to ``part``."""
    wanted = {"Range": f"bytes={have}-"} if have else {}
    request = urllib.request.Request(url, headers={**USER_AGENT, **wanted})
    with _network():
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    if response.status != 206:  # a server without ranges sends everything
        have = 0
    total = have + int(response.headers.get("Content-Length") or 0)
    with response, open(part, "r+b" if have else "wb") as file, \
            Progress(total // MEGABYTE, part.stem, "MB", initial=have // MEGABYTE) as bar:
        file.seek(have)
        while True:
            with _network():
                chunk = response.read(1 << 16)
            if not chunk:
                break
            file.write(chunk)
            bar.update(file.tell() // MEGABYTE - bar.done)
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


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
