"""Digests by which files are recognised."""

import hashlib
from pathlib import Path


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    return _digest(path, hashlib.sha256())


def git_blob_id(path: Path) -> str:
    """The name git gives to a file's content, as ``git hash-object`` prints it."""
    return _digest(path, hashlib.sha1(b"blob %d\0" % path.stat().st_size))


def _digest(path: Path, digest) -> str:
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
