"""The files that stages pass to each other: strict reading, and writing that completes or fails.

Text files are UTF-8, one record a line; a byte order mark and CRLF line ends are accepted.
``*_formatted.jsonl`` holds ``{"context": str, "completion": str}``, ``*.jsonl`` the same keys with
lists of token ids, a prediction file ``{"id": int, "predict": [int, ...]}``.
"""

from __future__ import annotations

import json
import os
import re
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Iterable, Iterator

from runtime.errors import InputError


def read_lines(path: str | os.PathLike, remedy: str = "check the path") -> list[str]:
    """All lines of a UTF-8 file without their line ends.

    Raises InputError for a file that is missing (naming ``remedy``), unreadable or not UTF-8.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; {remedy}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; {remedy}") from None
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if lines[-1] == b"":  # the line break of the last line, or an empty file
        lines.pop()
    texts = []
    for number, line in enumerate(lines, start=1):
        try:
            texts.append(line.removesuffix(b"\r").decode("utf-8"))
        except UnicodeDecodeError as error:
            raise InputError(f"{path}:{number}: not UTF-8 (byte {error.start + 1} of the line); "
                             f"convert the file, e.g. iconv -f LATIN1 -t UTF-8, or {remedy}"
                             ) from None
    return texts


def read_jsonl(path: str | os.PathLike, keys: dict[str, type],
               remedy: str = "check the path") -> list[dict]:
    """The objects of a JSON-lines file, each with ``keys`` of the given types.

    A key's type is ``str``, ``bool``, ``int`` (>= 0) or ``list`` (of token ids, integers >= 0).
    Raises InputError naming the file, the line and the first thing wrong with it.
    """
    records = []
    for number, line in enumerate(read_lines(path, remedy), start=1):
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise InputError(f"{where}: not a JSON object; every line must be one, with "
                             f"{_names(keys)}; {remedy}")
        for key, kind in keys.items():
            if key not in record:
                raise InputError(f"{where}: no \"{key}\"; every line must have {_names(keys)}; "
                                 f"{remedy}")
            if not _is(record[key], kind):
                raise InputError(f"{where}: \"{key}\" must be {_KINDS[kind]}; {remedy}")
        records.append(record)
    if not records:
        raise InputError(f"{path}: the file is empty; {remedy}")
    return records


_KINDS = {str: "a text (valid Unicode)", bool: "true or false", int: "an integer >= 0",
          list: "a list of token ids (integers >= 0)"}
_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell half a pair, UTF-8 cannot


def _names(keys: Iterable[str]) -> str:
    return " and ".join(f'"{key}"' for key in keys)


def _is(value: object, kind: type) -> bool:
    if kind is str:
        return isinstance(value, str) and not _SURROGATE.search(value)
    if kind is int:
        return type(value) is int and value >= 0
    if kind is list:
        return isinstance(value, list) and all(_is(item, int) for item in value)
    return isinstance(value, kind)


def write_jsonl(path: str | os.PathLike, records: Iterable[dict]) -> None:
    """Writes records as JSON lines in ASCII, as the original does; see :func:`replacing`."""
    with replacing(path) as file:
        file.writelines(f"{json.dumps(record)}\n".encode("ascii") for record in records)


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """A binary file that replaces ``path`` when the block ends without an exception.

    It is written in the same folder under another name, synced and renamed: a crash, a full disk
    or an error in the block leaves the old file as it was. Parts that killed processes left in the
    folder are removed. Raises InputError if ``path`` cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder; name a file")
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_parts(path.parent)
        try:
            with open(beside, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
            _sync_folder(path.parent)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}; free some space "
                         "or choose another folder") from None


def _clear_parts(folder: Path) -> None:
    """Removes the half-written files of processes that no longer exist."""
    for part in folder.glob(".*.part"):
        match = re.fullmatch(r"\..+\.(\d+)\.part", part.name)
        if match and not _alive(int(match[1])):
            part.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's process
        pass
    return True


def _sync_folder(folder: Path) -> None:
    """Writes a folder's names to the disk, so that a power failure cannot undo a renaming."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
