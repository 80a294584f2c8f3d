"""PyTorch's checkpoint files (``.pt``, ``.bin``) without PyTorch: nested dicts of NumPy arrays.

A checkpoint is a pickle of its structure plus the raw bytes of its tensors, either in a zip
archive (PyTorch >= 1.6) or one after the other in a plain file (the legacy format). A pickle can
call any function and ask for any amount of memory. Therefore Python's unpickler is restricted here
to the opcodes of plain containers, it finds no function but our stand-ins for PyTorch's, objects
are counted while they are read, and sizes are compared with the file's before memory is allocated.
A hostile file takes at most about 8 times its size plus 64 MiB of memory.
"""

from __future__ import annotations

import errno
import io
import os
import pickle
import stat
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any, Callable

import numpy as np

from runtime.formats import replacing

STRUCTURE_LIMIT = 4 << 20  # bytes; that of gpt2.lg's published checkpoint takes 90 thousand
OBJECT_LIMIT = 1 << 18  # of a pickle; the state of a run that trains all of gpt2.lg has 43 thousand
DEPTH_LIMIT = 100  # of containers in each other
NAME_LIMIT = 1000  # characters or bytes of a dict's key
DIRECTORY_LIMIT = 1 << 20  # bytes of a zip archive's directory; about 65 a tensor
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
# torch's storage classes and the NumPy type of their elements; bfloat16 has none, see to_array
STORAGES = {"FloatStorage": "<f4", "DoubleStorage": "<f8", "HalfStorage": "<f2",
            "BFloat16Storage": "bfloat16", "LongStorage": "<i8", "IntStorage": "<i4",
            "ShortStorage": "<i2", "CharStorage": "i1", "ByteStorage": "u1", "BoolStorage": "?"}


class TorchFileError(ValueError):
    """The file is damaged, is no PyTorch checkpoint, or holds what we refuse to open."""

    def __init__(self, message: str):  # may quote the file: no line breaks, no control characters
        super().__init__("".join(c if c.isprintable() else "?" for c in message[:300]))


def load(path: str | os.PathLike) -> Any:
    """What ``torch.save`` wrote to ``path``, its tensors as NumPy arrays of their shapes.

    bfloat16 tensors become float32. Raises TorchFileError, and OSError if it cannot be read.
    """
    with open_regular(path) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            is_zip = zipfile.is_zipfile(file)
            file.seek(0)
            value = _load_zip(file, size) if is_zip else _load_legacy(file, size)
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


def _load_zip(file: IO[bytes], size: int) -> object:
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
        return _Unpickler(structure, size, read_storage).load()


def _load_legacy(file: IO[bytes], size: int) -> object:
    def refuse(*_):
        raise TorchFileError("tensor data where none belongs")

    head = io.BytesIO(file.read(STRUCTURE_LIMIT))
    if _Unpickler(head, size, refuse).load() != LEGACY_MAGIC:
        raise TorchFileError("no PyTorch checkpoint")
    for _ in ("protocol version", "sizes of C types, byte order"):
        _Unpickler(head, size, refuse).load()
    storages: dict[str, tuple[str, int, np.ndarray]] = {}

    def allocate(key: str, dtype: str, size: int) -> np.ndarray:  # the bytes follow the structure
        storages[key] = dtype, size, to_array(bytearray(size), dtype)
        return storages[key][-1]

    value = _Unpickler(head, size, allocate).load()
    keys = _Unpickler(head, size, refuse).load()
    file.seek(head.tell())
    for key in keys:
        if not _is_name(key) or key not in storages:
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


# Dotted names that a pickle may ask for, and what they stand for here; storage classes besides.
ORDERED_DICT = "collections.OrderedDict"
REBUILD_TENSOR = "torch._utils._rebuild_tensor_v2"
REBUILD_PARAMETER = "torch._utils._rebuild_parameter"
# The opcodes of plain containers, strings, numbers and the memo. Python's pickle would also set
# attributes, build sets, make instances and look up extensions.
OPCODES = """PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2
    LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES
    BINBYTES8 UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 PUT BINPUT LONG_BINPUT MEMOIZE GET
    BINGET LONG_BINGET EMPTY_DICT EMPTY_LIST EMPTY_TUPLE LIST TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND
    APPENDS GLOBAL STACK_GLOBAL BINPERSID"""


PythonUnpickler: Any = pickle._Unpickler  # type: ignore[attr-defined]  # the one not in C


def _counted(step: Callable[[Any], None]) -> Callable[[Any], None]:
    def counted(unpickler: _Unpickler) -> None:
        unpickler.count(1)
        step(unpickler)
    return counted


class _Unpickler(PythonUnpickler):
    """Reads pickles of tensors and plain containers.

    ``read_storage(key, dtype, size)`` gives the numbers in the ``size`` bytes of a storage. An
    opcode counts as an object, and so does each item that a call copies. All storages together are
    no larger than the file of ``file_size`` bytes. All tensors together, as float32 or what is
    larger, take 4 times as much at most, however often they show the same bytes.
    """

    dispatch = {code: PythonUnpickler.dispatch[code]
                for code in (getattr(pickle, name)[0] for name in OPCODES.split())}

    def __init__(self, file: io.BytesIO, file_size: int,
                 read_storage: Callable[[str, str, int], np.ndarray]):
        super().__init__(file)
        self.read_storage = read_storage
        self.storages: dict[str, tuple[str, np.ndarray]] = {}
        self.object_room = OBJECT_LIMIT
        self.storage_room, self.tensor_room = file_size, 4 * file_size + (1 << 20)

    def count(self, objects: int) -> None:
        """Raises TorchFileError when these are more than the pickle may have."""
        self.object_room -= objects
        if self.object_room < 0:
            raise TorchFileError(f"refused: its structure has more than {OBJECT_LIMIT} objects")

    def find_class(self, module: object, name: object) -> object:
        """What the pickle calls ``module.name``; for a storage class, the type of its numbers."""
        known = {ORDERED_DICT: self._ordered_dict, REBUILD_TENSOR: self._tensor,
                 REBUILD_PARAMETER: _parameter}
        if module == "torch" and name in STORAGES:
            return STORAGES[str(name)]
        if f"{module}.{name}" not in known:
            raise TorchFileError(f"refused: it asks for {module}.{name}, which is no tensor and no "
                                 "plain container")
        return known[f"{module}.{name}"]

    def persistent_load(self, pid: object) -> np.ndarray:
        """The numbers of the storage that ``pid`` describes, all of them in one dimension."""
        if not isinstance(pid, tuple) or len(pid) < 5:
            raise TorchFileError("malformed tensor data")
        kind, dtype, key, _location, count = pid[:5]
        if not type(kind) is type(dtype) is str or kind != "storage" \
                or dtype not in STORAGES.values() or not _is_size(count) or not _is_name(key):
            raise TorchFileError("malformed tensor data")
        key = str(key)
        if key not in self.storages:
            size = count * (2 if dtype == "bfloat16" else np.dtype(dtype).itemsize)
            self.storage_room -= size
            if self.storage_room < 0:
                raise TorchFileError(f"tensor data {key} has {size} bytes, too many for the file")
            self.storages[key] = dtype, self.read_storage(key, dtype, size)
        known_dtype, array = self.storages[key]
        if known_dtype != dtype or array.size != count:
            raise TorchFileError(f"tensor data {key} is of two kinds")
        return array

    def _tensor(self, storage, offset, shape, stride, *_) -> np.ndarray:
        tensor = _rebuild_tensor(storage, offset, shape, stride)
        self.tensor_room -= tensor.size * max(4, tensor.itemsize)
        if self.tensor_room < 0:
            raise TorchFileError("refused: its tensors are much larger than the file")
        return tensor

    def _ordered_dict(self, pairs: list | tuple = ()) -> dict:
        self.count(2 * len(pairs))
        return _fill(OrderedDict(), [part for key, value in pairs for part in (key, value)])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        _fill(self.stack[-1], items)
    dispatch[pickle.SETITEMS[0]] = load_setitems

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _fill(self.stack[-1], [key, value])
    dispatch[pickle.SETITEM[0]] = load_setitem

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append(_fill({}, items))
    dispatch[pickle.DICT[0]] = load_dict

    def load_reduce(self) -> None:
        if not isinstance(self.stack[-1], tuple):
            raise TorchFileError("refused: a call without arguments")
        self.count(len(self.stack[-1]))
        super().load_reduce()
    dispatch[pickle.REDUCE[0]] = load_reduce

    def load_build(self) -> None:  # attributes of a dict, such as a state dict's _metadata
        self.stack.pop()
        if not isinstance(self.stack[-1], OrderedDict):
            raise TorchFileError("refused: it changes what is no plain container")
    dispatch[pickle.BUILD[0]] = load_build

    dispatch = {code: _counted(step) for code, step in dispatch.items()}


def _parameter(tensor: object, *_) -> np.ndarray:
    if not isinstance(tensor, np.ndarray):
        raise TorchFileError("malformed parameter")
    return tensor


def _fill(target: object, items: list) -> dict:
    """Puts keys and values, alternating in ``items``, into a dict."""
    keys, values = items[::2], items[1::2]
    if not isinstance(target, dict) or len(keys) != len(values) or not all(map(_is_name, keys)):
        raise TorchFileError("damaged: a dict with keys that are no plain names")
    target.update(zip(keys, values))
    return target


def _is_name(key: object) -> bool:
    """Whether a key is quick to hash and to compare, and hostile ones cannot share one hash.

    Tuples can nest without end, and floats and large integers of equal hash are known.
    """
    return isinstance(key, (str, bytes)) and len(key) <= NAME_LIMIT \
        or isinstance(key, int) and abs(key) < 2**31


def _is_size(number: object) -> bool:
    return type(number) is int and 0 <= number < 2**63


def to_array(data: bytes | bytearray, dtype: str) -> np.ndarray:
    """The numbers in ``data``, of one of the types in STORAGES; bfloat16 becomes float32."""
    if dtype == "bfloat16":  # the upper half of a float32
        return np.left_shift(np.frombuffer(data, "<u2"), 16, dtype="<u4").view("<f4")
    return np.frombuffer(data, dtype)


def _rebuild_tensor(storage, offset, shape, stride) -> np.ndarray:
    if not isinstance(storage, np.ndarray) or not isinstance(shape, tuple) \
            or not isinstance(stride, tuple):
        raise TorchFileError("malformed tensor")
    if len(shape) != len(stride) or not all(map(_is_size, (offset, *shape, *stride))):
        raise TorchFileError("a tensor of impossible shape")
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride))
    if 0 not in shape and last >= storage.size:
        raise TorchFileError("a tensor larger than its data")
    return np.lib.stride_tricks.as_strided(
        storage[offset:], shape, [step * storage.itemsize for step in stride], writeable=False)


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
