"""PyTorch's and Jittor's checkpoint files without either: nested dicts of NumPy arrays.

A checkpoint of PyTorch (``.pt``, ``.bin``) is a pickle of its structure plus the raw bytes of its
tensors, either in a zip archive (PyTorch >= 1.6) or one after the other in a plain file (the legacy
format). One of Jittor (``.pkl``) is a pickle of NumPy arrays, and usually a checksum. Nothing in
them is executed, see runtime/unpickler.py.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import stat
import struct
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from runtime.formats import replacing
from runtime.unpickler import BoundedFile, TorchFileError, Unpickler, is_name, to_array

STRUCTURE_LIMIT = 4 << 20  # bytes; that of gpt2.lg's published checkpoint takes 90 thousand
DEPTH_LIMIT = 100  # of containers in each other
DIRECTORY_LIMIT = 1 << 20  # bytes of a zip archive's directory; about 65 a tensor
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
JITTOR_MAGIC = b"HCAJSLHD"  # ends a file of jt.save, after the SHA-1 of its pickle


def load(path: str | os.PathLike) -> Any:
    """What ``torch.save`` or ``jt.save`` wrote to ``path``, its tensors as NumPy arrays.

    bfloat16 tensors become float32. What is no tensor, array, plain container, text or number is
    ``unpickler.UNREAD``. Raises TorchFileError, and OSError if the file cannot be read.
    """
    return _load(path)


def load_structure(path: str | os.PathLike) -> Any:
    """:func:`load` of a zip archive without its tensors, which become UNREAD; None for others.

    It takes milliseconds, however large the tensors are.
    """
    return _load(path, tensors=False)


def _load(path: str | os.PathLike, tensors: bool = True) -> Any:
    with open_regular(path) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            is_zip = zipfile.is_zipfile(file)
            file.seek(0)
            if not is_zip and not tensors:
                return None
            value = _load_zip(file, size, tensors) if is_zip else _load_plain(file, size)
            _check_depth(value)
            return value
        except TorchFileError:
            raise
        except Exception as error:  # what a damaged file raises can be anything
            reason = str(error) or type(error).__name__
            raise TorchFileError(f"damaged, or no PyTorch checkpoint ({reason:.100})") from None


def open_regular(path: str | os.PathLike) -> IO[bytes]:
    """Opens a file for reading in binary; raises OSError, also for what is no regular file."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # to open a FIFO would wait for a writer
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    return open(path, "rb")


def _load_zip(file: IO[bytes], size: int, tensors: bool) -> object:
    end: Any = zipfile._EndRecData(file)  # type: ignore[attr-defined]  # what ZipFile goes by
    if end[zipfile._ECD_SIZE] > DIRECTORY_LIMIT:  # type: ignore[attr-defined]
        raise TorchFileError(f"refused: its directory has more than {DIRECTORY_LIMIT} bytes")
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise TorchFileError("a zip archive, but no PyTorch checkpoint")
        if len(members) != len(archive.infolist()):
            raise TorchFileError("refused: two of its members have one name")
        for name, info in members.items():
            if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
                raise TorchFileError(f"refused: {name} is compressed, as PyTorch never does")
        if sum(info.file_size for info in members.values()) > size:
            raise TorchFileError("refused: its members are larger than the file")

        def read(name: str, limit: int) -> bytes:
            if members[name].file_size > limit:
                raise TorchFileError(f"refused: {name} has {members[name].file_size} bytes, "
                                     f"more than {limit}")
            return archive.read(members[name])

        folder = pickles[0][: -len("data.pkl")]
        if f"{folder}byteorder" in members and read(f"{folder}byteorder", 10) != b"little":
            raise TorchFileError("its numbers are big-endian; save it on a usual machine")

        def read_storage(key: str, dtype: str, size: int) -> np.ndarray:
            info = members.get(f"{folder}data/{key}")
            if info is None:
                raise TorchFileError(f"tensor data {key} is missing")
            if info.file_size != size:
                raise TorchFileError(f"tensor data {key} has {info.file_size} bytes, not {size}")
            return to_array(archive.read(info), dtype)

        structure = io.BytesIO(read(pickles[0], STRUCTURE_LIMIT))
        return Unpickler(structure, size, read_storage if tensors else None).load()


def _refuse(*_):
    raise TorchFileError("tensor data where none belongs")


def _load_plain(file: IO[bytes], size: int) -> object:
    first = Unpickler(BoundedFile(file, size), size, _refuse).load()
    if isinstance(first, int) and first == LEGACY_MAGIC:
        return _load_legacy(file, size)
    if not isinstance(first, dict):
        raise TorchFileError("no PyTorch checkpoint")
    end = file.tell()
    digest, magic = file.read(20), file.read(len(JITTOR_MAGIC) + 1)
    if digest or magic:
        file.seek(0)
        if magic != JITTOR_MAGIC or digest != _sha1(file, end):
            raise TorchFileError("damaged: it does not end with the checksum of its content")
    return first


def _sha1(file: IO[bytes], size: int) -> bytes:
    digest = hashlib.sha1()
    for start in range(0, size, 1 << 20):
        digest.update(file.read(min(1 << 20, size - start)))
    return digest.digest()


def _load_legacy(file: IO[bytes], size: int) -> object:
    """``file`` is behind its first pickle, LEGACY_MAGIC."""
    start = file.tell()
    head = io.BytesIO(file.read(STRUCTURE_LIMIT))
    for _ in ("protocol version", "sizes of C types, byte order"):
        Unpickler(head, size, _refuse).load()
    storages: dict[str, tuple[str, int, np.ndarray]] = {}

    def allocate(key: str, dtype: str, size: int) -> np.ndarray:  # the bytes follow the structure
        storages[key] = dtype, size, to_array(bytearray(size), dtype)
        return storages[key][-1]

    value = Unpickler(head, size, allocate).load()
    keys = Unpickler(head, size, _refuse).load()
    file.seek(start + head.tell())
    for key in keys:
        if not is_name(key) or key not in storages:
            raise TorchFileError("unknown tensor data")
        dtype, size, array = storages.pop(key)
        count, = struct.unpack("<q", file.read(8))
        data = file.read(size)
        if count != array.size or len(data) != size:
            raise TorchFileError(f"tensor data {key} has another size, or the file ends too early")
        array[:] = to_array(data, dtype)
    if storages:
        raise TorchFileError("tensor data is missing")
    return value


def _check_depth(value: object) -> None:
    level: list = [[value]]
    seen: set[int] = set()
    for _ in range(DEPTH_LIMIT + 1):
        items = (item for container in level for item in
                 (container.values() if isinstance(container, dict) else container))
        inner = {id(item): item for item in items
                 if isinstance(item, (dict, list, tuple)) and id(item) not in seen}
        if not inner:
            return
        seen.update(inner)
        level = list(inner.values())
    raise TorchFileError(f"refused: more than {DEPTH_LIMIT} containers in each other")


def save(path: str | os.PathLike, state: dict) -> None:
    """Writes nested dicts of float32 arrays, strings and integers in PyTorch's zip format.

    An array may also be an object with shape and size of which NumPy makes one; it does so when it
    writes it. Equal bytes for equal content; an array under two names is stored once.
    ``torch.load(path, weights_only=True)`` opens it. Raises InputError if it cannot be written.
    """
    arrays: dict[int, tuple[int, np.ndarray]] = {}  # id -> (key, array)
    structure = b"\x80\x02" + _pickled(state, arrays) + b"."
    folder = Path(path).stem
    with replacing(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        def write(name: str, data: bytes) -> None:  # ZipInfo's default date keeps bytes equal
            archive.writestr(zipfile.ZipInfo(f"{folder}/{name}"), data)

        write("data.pkl", structure)
        write("byteorder", b"little")
        for key, array in arrays.values():
            write(f"data/{key}", np.asarray(array, "<f4").tobytes())
        write("version", b"3\n")


def _pickled(value: Any, arrays: dict) -> bytes:
    """Protocol-2 opcodes for ``value``; Python's pickler cannot name classes of an absent torch."""
    if isinstance(value, dict):
        items = b"".join(_pickled(k, arrays) + _pickled(v, arrays) for k, v in value.items())
        return b"}(" + items + b"u"
    if isinstance(value, str):
        text = value.encode("utf-8")
        return b"X" + struct.pack("<I", len(text)) + text
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, tuple):
        return b"(" + b"".join(_pickled(item, arrays) for item in value) + b"t"
    key, _ = arrays.setdefault(id(value), (len(arrays), value))
    strides = tuple(step // 4 for step in np.empty(value.shape, "<f4").strides)
    storage = (b"(" + _pickled("storage", arrays) + b"ctorch\nFloatStorage\n"
               + _pickled(str(key), arrays) + _pickled("cpu", arrays)
               + _pickled(value.size, arrays) + b"tQ")
    rest = b"".join(_pickled(item, arrays) for item in (0, value.shape, strides, False))
    hooks = b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + hooks + b"tR"
