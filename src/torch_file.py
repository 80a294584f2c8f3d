"""PyTorch's checkpoint files (``.pt``, ``.bin``) without PyTorch: nested dicts of NumPy arrays.

A checkpoint is a pickle of its structure plus the raw bytes of its tensors, either in a zip
archive (PyTorch >= 1.6) or one after the other in a plain file (the legacy format). The pickle
is read by an unpickler that knows tensors and plain containers only: any other global it names
is refused, so that a file runs no code.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import IO

import numpy as np

from formats import replacing

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
# torch's storage classes and the NumPy type of their elements; bfloat16 has none, see to_array
STORAGES = {"FloatStorage": "<f4", "DoubleStorage": "<f8", "HalfStorage": "<f2",
            "BFloat16Storage": "bfloat16", "LongStorage": "<i8", "IntStorage": "<i4",
            "ShortStorage": "<i2", "CharStorage": "i1", "ByteStorage": "u1", "BoolStorage": "?"}


class TorchFileError(ValueError):
    """The file is damaged, is no PyTorch checkpoint, or holds what we refuse to open."""


def load(path: str | os.PathLike) -> object:
    """What ``torch.save`` wrote to ``path``, its tensors as NumPy arrays of their shapes.

    bfloat16 tensors become float32. Raises TorchFileError, and OSError if it cannot be read.
    """
    with open(path, "rb") as file:
        try:
            if zipfile.is_zipfile(file):
                return _load_zip(file)
            file.seek(0)
            return _load_legacy(file)
        except TorchFileError:
            raise
        except Exception as error:  # a damaged pickle fails in any way it likes
            raise TorchFileError(f"damaged, or no PyTorch checkpoint ({error})") from None


def _load_zip(file: IO[bytes]) -> object:
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        pickles = [name for name in names if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise TorchFileError("a zip archive, but no PyTorch checkpoint")
        folder = pickles[0][: -len("data.pkl")]
        if f"{folder}byteorder" in names and archive.read(f"{folder}byteorder") != b"little":
            raise TorchFileError("its numbers are big-endian; save it on a usual machine")

        def read_storage(key: str, size: int) -> bytes:
            info = archive.getinfo(f"{folder}data/{key}")
            if info.file_size != size:
                raise TorchFileError(f"tensor data {key} has {info.file_size} bytes, not {size}")
            return archive.read(info)

        return _Unpickler(io.BytesIO(archive.read(pickles[0])), read_storage).load()


def _load_legacy(file: IO[bytes]) -> object:
    def refuse(*_):
        raise TorchFileError("tensor data where none belongs")

    if _Unpickler(file, refuse).load() != LEGACY_MAGIC:
        raise TorchFileError("no PyTorch checkpoint")
    _Unpickler(file, refuse).load()  # protocol version
    _Unpickler(file, refuse).load()  # sizes of C types, byte order
    # The structure comes before the bytes: reading it twice, first to learn which storages there
    # are, is simpler than filling tensors in afterwards.
    begin, sizes = file.tell(), {}

    def note_size(key: str, size: int) -> bytes:
        sizes[key] = size
        return bytes(size)

    _Unpickler(file, note_size).load()
    data = {}
    for key in _Unpickler(file, refuse).load():
        count, = struct.unpack("<q", file.read(8))
        if count < 0 or key not in sizes:
            raise TorchFileError(f"unknown tensor data {key}")
        data[key] = file.read(sizes[key])
        if len(data[key]) != sizes[key]:
            raise TorchFileError("the file ends too early")
    file.seek(begin)
    return _Unpickler(file, lambda key, size: data[key]).load()


class _Storage:
    """Names a storage class of torch while unpickling."""

    def __init__(self, name: str):
        self.dtype = STORAGES[name]
        self.itemsize = 2 if self.dtype == "bfloat16" else np.dtype(self.dtype).itemsize


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes], read_storage):
        super().__init__(file, encoding="utf-8")
        self.read_storage, self.storages = read_storage, {}

    def find_class(self, module: str, name: str):
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in STORAGES:
            return _Storage(name)
        if module == "torch._utils":
            known = {"_rebuild_tensor_v2": _rebuild_tensor,
                     "_rebuild_parameter": _rebuild_parameter}
            if name in known:
                return known[name]
        raise TorchFileError(f"refused: it asks for {module}.{name}, which is no tensor and no "
                             "plain container")

    def persistent_load(self, pid: tuple):
        kind, storage, key, _location, count = pid[:5]
        if kind != "storage" or not isinstance(storage, _Storage) or type(count) is not int:
            raise TorchFileError("malformed tensor data")
        key = str(key)
        if key not in self.storages:
            self.storages[key] = to_array(self.read_storage(key, count * storage.itemsize),
                                           storage.dtype)
        return self.storages[key]


def to_array(data: bytes, dtype: str) -> np.ndarray:
    """The numbers in ``data``, of one of the types in STORAGES; bfloat16 becomes float32."""
    if dtype == "bfloat16":  # the upper half of a float32
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(data, dtype)


def _rebuild_tensor(storage: np.ndarray, offset: int, shape: tuple, stride: tuple,
                    *_) -> np.ndarray:
    if len(shape) != len(stride) or min((offset, *shape, *stride)) < 0:
        raise TorchFileError("a tensor of impossible shape")
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride))
    if 0 not in shape and last >= storage.size:
        raise TorchFileError("a tensor larger than its data")
    return np.lib.stride_tricks.as_strided(
        storage[offset:], shape, [step * storage.itemsize for step in stride], writeable=False)


def _rebuild_parameter(tensor: np.ndarray, *_) -> np.ndarray:
    return tensor


def save(path: str | os.PathLike, state: dict) -> None:
    """Writes nested dicts of float32 arrays, strings and integers in PyTorch's zip format.

    Equal bytes for equal content; an array that occurs under two names is stored once.
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
            write(f"data/{key}", array.astype("<f4", copy=False).tobytes())
        write("version", b"3\n")


def _pickled(value: object, arrays: dict) -> bytes:
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
