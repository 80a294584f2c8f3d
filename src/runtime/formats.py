"""The files that stages pass to each other: strict reading, and writing that completes or fails.

Text files are UTF-8, or UTF-16 or UTF-32 with their mark, one record a line. A line ends at LF,
CRLF or CR and nowhere else: other line and paragraph separators of Unicode are text.
``*_formatted.jsonl`` holds ``{"context": str, "completion": str}``, ``*.jsonl`` the same keys with
lists of token ids, a prediction file ``{"id": int, "predict": [int, ...]}``. Inputs without a
reference may lack "completion".
"""

from __future__ import annotations

import codecs
import fcntl
import json
import os
import re
import shutil
import tempfile
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Collection, Iterable, Iterator

from runtime.errors import InputError
from runtime.locks import lock


def read_lines(path: str | os.PathLike, remedy: str = "check the path",
               cr_in_lines: bool = False) -> list[str]:
    """All lines of a text file without their line ends.

    With ``cr_in_lines``, in a file with LF or CRLF line ends any other CR is part of its line.
    Raises InputError for a file that is missing (naming ``remedy``), unreadable or of another
    encoding.
    """
    text = _read_text(path, remedy)
    if "\r" in text:  # some programs turn CRLF into CR CR LF
        text = re.sub("\r+\n" if cr_in_lines and "\n" in text else "\r+\n|\r", "\n", text)
    lines = text.split("\n")
    if lines[-1] == "":  # the line break of the last line, or an empty file
        lines.pop()
    return lines


def read_json(path: str | os.PathLike, remedy: str = "check the path") -> object:
    """The value in a JSON file; raises InputError as `read_lines` does, and where it is no JSON."""
    try:
        return json.loads(_read_text(path, remedy))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: no JSON ({error.msg}, at character {error.colno} "
                         f"of the line); correct it, or {remedy}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; deep nesting
        raise InputError(f"{path}: no JSON that can be read ({error}); {remedy}") from None


def _read_text(path: str | os.PathLike, remedy: str) -> str:
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; {remedy}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; {remedy}") from None
    return _decoded(data, path, remedy)


_MARKS = ((codecs.BOM_UTF32_LE, "UTF-32-LE"), (codecs.BOM_UTF32_BE, "UTF-32-BE"),
          (codecs.BOM_UTF16_LE, "UTF-16-LE"), (codecs.BOM_UTF16_BE, "UTF-16-BE"))
# Names that Python and iconv know; the first of those that fit equally well is taken.
_ENCODINGS = ("GB18030", "BIG5", "CP1252", "EUC-JP", "EUC-KR", "CP932", "CP1251", "KOI8-R",
              "CP1250", "CP1253", "CP1254", "CP1255", "CP1256")


def _decoded(data: bytes, path: str | os.PathLike, remedy: str) -> str:
    # UTF-32-LE's mark begins with UTF-16-LE's. Two bytes and no text are rather a damaged file.
    mark, encoding = next((pair for pair in _MARKS if data.startswith(pair[0]) and len(data) > 2),
                          (codecs.BOM_UTF8, "UTF-8"))
    data = data.removeprefix(mark)
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        before = re.split("\r*\n|\r", data[:error.start].decode(encoding))
        where = f"{path}:{len(before)}: not {encoding}"
        if encoding != "UTF-8":
            raise InputError(f"{where}, though the file has its mark; repair the file, or {remedy}"
                             ) from None
        start = error.start - len(before[-1].encode())
        raise InputError(f"{where} (byte {error.start - start + 1} of the line); convert the "
                         f"file, e.g. iconv -f {_likely_encoding(data[start:])} -t UTF-8, or "
                         f"{remedy}") from None


def _likely_encoding(data: bytes) -> str:
    """The name of the encoding, not UTF-8, that ``data`` is most likely in."""
    from charset_normalizer import from_bytes  # here: it is slow to load, and rarely needed
    sample = b"\n".join(data.split(b"\n", 200)[:200])  # whole lines: no character is cut
    names = {codecs.lookup(name).name.replace("-", "_"): name for name in _ENCODINGS}
    found = [(match.chaos > 0.1, -match.coherence, _ENCODINGS.index(names[codec]))
             for match in from_bytes(sample, cp_isolation=list(names), threshold=0.5)
             for codec in match.could_be_from_charset if codec in names]
    return _ENCODINGS[min(found)[2]] if found else "ENCODING"


def read_jsonl(path: str | os.PathLike, keys: dict[str, type], remedy: str = "check the path",
               optional: Collection[str] = ()) -> list[dict]:
    """The objects of a JSON-lines file, each with ``keys`` of the given types.

    A key's type is ``str``, ``bool``, ``int`` (>= 0) or ``list`` (of token ids, integers >= 0).
    Those of the keys that are ``optional`` may be absent.
    Raises InputError naming the file, the line and the first thing wrong with it.
    """
    records = []
    required = [key for key in keys if key not in optional]
    for number, line in enumerate(read_lines(path, remedy), start=1):
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise InputError(f"{where}: not a JSON object; every line must be one, with "
                             f"{_names(required)}; {remedy}")
        for key, kind in keys.items():
            if key not in record and key in required:
                raise InputError(f"{where}: no \"{key}\"; every line must have "
                                 f"{_names(required)}; {remedy}")
            if key in record and not _is(record[key], kind):
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


def is_text(value: object) -> bool:
    """Whether a value of a JSON file is a text that UTF-8 can hold."""
    return isinstance(value, str) and not _SURROGATE.search(value)


def _is(value: object, kind: type) -> bool:
    if kind is str:
        return is_text(value)
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
    """A binary file that becomes ``path`` when the block ends without an exception.

    Links are followed. A regular file is written in its folder under another name, synced and
    renamed: a crash, a full disk or an error in the block leaves the old file as it was. The new
    file has the permissions of the old one. A stream (see :func:`is_stream`) gets everything at
    the end of the block. Parts that killed processes left in the folder are removed. Raises
    InputError if ``path`` cannot be written, and BrokenPipeError if the reader of a pipe is gone.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise InputError(f"{path}: is a folder; name a file")
        place = _follow(path)
        with _written_through(place) if is_stream(place) else _beside(place) as file:
            yield file
    except BrokenPipeError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}; free some space "
                         "or choose another folder") from None


def _follow(path: Path) -> Path:
    """Where the links of ``path`` lead, also if nothing is there; OSError for a loop of links.

    What processes have open (/dev/stdout, /dev/fd/63) has a link in /proc that is not followed:
    its file would be replaced under its name, but not for the process that has it open.
    """
    with suppress(FileNotFoundError):
        path.stat()  # raises the OSError
    while True:
        path = Path(os.path.realpath(path.parent), path.name)
        if path.is_relative_to("/proc") or not path.is_symlink():
            return path
        path = path.parent / os.readlink(path)


def is_stream(path: Path) -> bool:
    """Whether ``path`` is a device, a pipe, a socket or in /proc, and so cannot be replaced."""
    try:
        place = _follow(path)
        return place.is_relative_to("/proc") or place.exists() and not (
            place.is_file() or place.is_dir())
    except OSError:  # opening it will say why
        return False


@contextmanager
def _written_through(path: Path) -> Iterator[IO[bytes]]:
    """A temporary file, copied to a stream when the block ends: a zip file's writer must seek."""
    if path.parent == Path(os.path.realpath("/proc/self/fd")) and path.is_symlink():
        stream = os.dup(int(path.name))  # shares its position, so that no other output is lost
    else:
        stream = os.open(path, os.O_WRONLY | os.O_APPEND * path.is_file())
    with open(stream, "wb") as target, tempfile.TemporaryFile() as file:
        yield file
        file.seek(0)
        shutil.copyfileobj(file, target)


@contextmanager
def _beside(path: Path) -> Iterator[IO[bytes]]:
    """A new file that is renamed to ``path`` when the block ends without an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear_parts(path.parent)
    old = path.stat() if path.exists() else None
    file = _new_part(path, 0o600 if old else 0o666)  # not readable to more users than before
    try:
        with file:
            yield file
            file.flush()
            if old:
                _keep_access(file.fileno(), old)
            os.fsync(file.fileno())
            os.replace(file.name, path)  # before the lock ends, see _clear_parts
        _sync_folder(path.parent)
    finally:
        Path(file.name).unlink(missing_ok=True)


def _keep_access(file: int, old: os.stat_result) -> None:
    """Gives an open file the permission bits, owner and group of ``old``, as far as allowed."""
    with suppress(OSError):
        os.fchmod(file, old.st_mode & 0o777)
    for owner, group in ((-1, old.st_gid), (old.st_uid, -1)):
        with suppress(OSError):
            os.fchown(file, owner, group)


def _new_part(path: Path, mode: int) -> IO[bytes]:
    """A new file ``.NAME.HEX.part`` beside ``path``, locked as long as it is open."""
    while True:
        file = open(path.with_name(f".{path.name}.{os.urandom(4).hex()}.part"), "xb",
                    opener=partial(os.open, mode=mode))
        if lock(file):
            return file
        file.close()  # it was removed before it was locked


def _clear_parts(folder: Path) -> None:
    """Removes half-written files that no process has locked, on this machine or another."""
    for part in folder.glob(".*.part"):
        if re.fullmatch(r"(?s)\..+\.([0-9a-f]{8}|\d+)\.part", part.name):
            # Opened for writing, as NFS demands for an exclusive lock. Locks may be unsupported.
            with suppress(OSError), open(part, "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                part.unlink()


def _sync_folder(folder: Path) -> None:
    """Writes a folder's names to the disk, so that a power failure cannot undo a renaming."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
