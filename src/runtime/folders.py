"""Folders of exported files, which appear whole or not at all."""

from __future__ import annotations

import fcntl
import glob
import json
import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Iterator

from runtime.errors import InputError

RECORD = "export.json"  # says what kind of export a folder is and which files it has


@contextmanager
def exported(path: str | os.PathLike, kind: str) -> Iterator[Path]:
    """A new folder that becomes ``path`` when the block ends without an exception.

    It is filled beside ``path`` under another name and gets a file export.json: the kind
    of export and the names of the files. What was at ``path`` before is replaced if it is an
    empty folder or an export of the same kind with no other files in it. Only a crash just between
    two renamings leaves no folder ``path``; the old one then is ``.NAME.HEX.old``. Raises
    InputError if there is something else, or if the folder cannot be written.
    """
    path = Path(os.path.realpath(path))
    _require_replaceable(path, kind)
    folder = path.with_name(f".{path.name}.{os.urandom(4).hex()}.part")
    handle = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_parts(path)
        folder.mkdir()
        handle = os.open(folder, os.O_RDONLY)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield folder
        files = sorted([*os.listdir(folder), RECORD])
        (folder / RECORD).write_text(
            json.dumps({"format": kind, "files": files}, indent=2) + "\n", "ascii")
        for name in files:
            (folder / name).chmod(folder.stat().st_mode & 0o666)  # safetensors 0.8 gives 0600
            with open(folder / name, "rb") as file:
                os.fsync(file.fileno())
        os.fsync(handle)
        _require_replaceable(path, kind)
        old = folder.with_suffix(".old")
        if path.exists():
            os.rename(path, old)
        os.rename(folder, path)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}; free some space "
                         "or choose another folder") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def _require_replaceable(path: Path, kind: str) -> None:
    """Raises InputError unless ``path`` may be replaced by an export of this kind."""
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise InputError(f"{path}: is no folder; give another one, or remove it")
    names = set(os.listdir(path))
    try:
        record = json.loads((path / RECORD).read_bytes())
        known = set(record["files"]) if record["format"] == kind else set()
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        known = set()
    others = sorted(names - known)
    if others:
        raise InputError(f"{path}: holds {others[0][:100]}, so it is not replaced: only an empty "
                         f"folder is, or an export of the same format to which nothing was added "
                         f"(its {RECORD} lists its files); give another folder, or remove it")


def _clear_parts(path: Path) -> None:
    """Removes the half-written folders that killed processes left beside ``path``."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}.part"):
        with suppress(OSError):
            handle = os.open(part, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(part)
            finally:
                os.close(handle)
