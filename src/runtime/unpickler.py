"""Reads pickles of tensors, NumPy arrays and plain containers, and runs nothing of them.

A pickle can call any function and ask for any amount of memory. Therefore Python's unpickler is
restricted here to the opcodes of plain containers, it finds no function but our stand-ins,
objects are counted while they are read, and sizes are compared with the file's before memory is
allocated. A hostile file takes at most about 8 times its size plus 64 MiB of memory.

What programs store beside the weights (types, shapes, devices, settings) becomes ``UNREAD``.
"""

from __future__ import annotations

import math
import pickle
import struct
from collections import OrderedDict
from typing import IO, Any, Callable

import numpy as np

OBJECT_LIMIT = 1 << 18  # of a pickle; the state of a run that trains all of gpt2.lg has 43 thousand
NAME_LIMIT = 1000  # characters or bytes of a dict's key
DIMENSION_LIMIT = 32  # of an array
# torch's storage classes and the NumPy type of their elements; bfloat16 has none, see to_array
STORAGES = {"FloatStorage": "<f4", "DoubleStorage": "<f8", "HalfStorage": "<f2",
            "BFloat16Storage": "bfloat16", "LongStorage": "<i8", "IntStorage": "<i4",
            "ShortStorage": "<i2", "CharStorage": "i1", "ByteStorage": "u1", "BoolStorage": "?"}
# The numbers of NumPy's arrays, as its pickles call them
ARRAY_TYPES = set("f2 f4 f8 i1 i2 i4 i8 u1 u2 u4 u8 b1".split())
# What may stand beside the weights; none of it is needed.
UNREAD_NAMES = {f"torch.{name}" for name in """Size device float16 float32 float64 bfloat16 uint8
    int8 int16 int32 int64 bool complex64 complex128 half float double long int short
    torch_version.TorchVersion""".split()} | {
    *(f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")),
    *(f"numpy.{name}" for name in """float16 float32 float64 int8 int16 int32 int64 uint8 uint16
      uint32 uint64 bool_""".split()),
    *(f"{module}.{name}" for module in ("builtins", "__builtin__")
      for name in """set frozenset slice range complex bytearray object dict list tuple str int
      float bool""".split()),
    *(f"pathlib.{kind}{name}" for kind in ("", "Pure") for name in (
        "Path", "PosixPath", "WindowsPath")),
    *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
    "argparse.Namespace", "types.SimpleNamespace", "copyreg._reconstructor",
    "copy_reg._reconstructor"}
# The opcodes of plain containers, strings, numbers and the memo. Python's pickle would also set
# attributes, build sets, make instances and look up extensions.
OPCODES = """PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2
    LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES
    BINBYTES8 UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 PUT BINPUT LONG_BINPUT MEMOIZE GET
    BINGET LONG_BINGET EMPTY_DICT EMPTY_LIST EMPTY_TUPLE LIST TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND
    APPENDS GLOBAL STACK_GLOBAL BINPERSID"""


class TorchFileError(ValueError):
    """The file is damaged, is no PyTorch checkpoint, or holds what we refuse to open."""

    def __init__(self, message: str):  # may quote the file: no line breaks, no control characters
        super().__init__("".join(c if c.isprintable() else "?" for c in message[:300]))


class Unread:
    """Stands for a class or function that is not called, and for what it would give."""

    __slots__ = ()

    def __call__(self, *_) -> Unread:
        return self


UNREAD = Unread()


class BoundedFile:
    """The next ``size`` bytes of a file; reading more raises TorchFileError before it is tried."""

    def __init__(self, file: IO[bytes], size: int):
        self.file, self.left = file, size

    def read(self, size: int) -> bytes:
        if size > self.left:
            raise TorchFileError("damaged: it ends too early")
        return self._counted(self.file.read(size))

    def readline(self) -> bytes:
        return self._counted(self.file.readline(self.left))

    def _counted(self, data: bytes) -> bytes:
        self.left -= len(data)
        return data


PythonUnpickler: Any = pickle._Unpickler  # type: ignore[attr-defined]  # the one not in C


def _counted(step: Callable[[Any], None]) -> Callable[[Any], None]:
    def counted(unpickler: Unpickler) -> None:
        unpickler.count(1)
        step(unpickler)
    return counted


class Unpickler(PythonUnpickler):
    """Reads pickles of tensors, NumPy arrays and plain containers.

    ``read_storage(key, dtype, size)`` gives the numbers in the ``size`` bytes of a storage; if it
    is None, tensors are UNREAD. An opcode counts as an object, and so does each item that a call
    copies. All storages together are no larger than the file of ``file_size`` bytes. All tensors
    and arrays together, as float32 or what is larger, take 4 times as much at most, however often
    they show the same bytes.
    """

    dispatch = {code: PythonUnpickler.dispatch[code]
                for code in (getattr(pickle, name)[0] for name in OPCODES.split())}

    def __init__(self, file: IO[bytes] | BoundedFile, file_size: int,
                 read_storage: Callable[[str, str, int], np.ndarray] | None):
        super().__init__(file)
        self.read_storage = read_storage
        self.storages: dict[str, tuple[str, np.ndarray]] = {}
        self.object_room = OBJECT_LIMIT
        self.storage_room, self.tensor_room = file_size, 4 * file_size + (1 << 20)
        self.text_room = file_size
        # Dotted names that a pickle may ask for, and what they stand for here
        self.known = {
            "collections.OrderedDict": self._ordered_dict,
            "collections.defaultdict": lambda *_: {},
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_parameter": _parameter,
            "jittor.jittor_core.Var": _parameter,
            "numpy.ndarray": UNREAD, "numpy.dtype": _ArrayType,
            "_codecs.encode": self._encode, "__builtin__.bytes": lambda: b"",
            **{f"torch.{name}": dtype for name, dtype in STORAGES.items()},
            **{f"numpy.{core}.multiarray._reconstruct": self._new_array
               for core in ("core", "_core")},
            **{f"numpy.{core}.numeric._frombuffer": self._array for core in ("core", "_core")},
            **dict.fromkeys(UNREAD_NAMES, UNREAD)}

    def load(self) -> Any:
        try:
            return super().load()
        finally:
            # `known` refers to methods of this object, and so the object to itself: without this,
            # all arrays would stay in memory until Python's collector runs.
            self.__dict__.clear()

    def count(self, objects: int) -> None:
        """Raises TorchFileError when these are more than the pickle may have."""
        self.object_room -= objects
        if self.object_room < 0:
            raise TorchFileError(f"refused: its structure has more than {OBJECT_LIMIT} objects")

    def find_class(self, module: object, name: object) -> object:
        """What the pickle calls ``module.name``; for a storage class, the type of its numbers."""
        try:
            return self.known[f"{module}.{name}"]
        except KeyError:
            raise TorchFileError(f"refused: it asks for {module}.{name}, which is no tensor and no "
                                 "plain container") from None

    # torch's tensors

    def persistent_load(self, pid: object) -> np.ndarray | None:
        """The numbers of the storage that ``pid`` describes, all of them in one dimension."""
        if self.read_storage is None:
            return None
        if not isinstance(pid, tuple) or len(pid) < 5:
            raise TorchFileError("malformed tensor data")
        kind, dtype, key, _location, count = pid[:5]
        if not type(kind) is type(dtype) is str or kind != "storage" \
                or dtype not in STORAGES.values() or not _is_size(count) or not is_name(key):
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

    def _tensor(self, storage, offset, shape, stride, *_) -> np.ndarray | Unread:
        if self.read_storage is None:
            return UNREAD
        return self._admitted(_rebuild_tensor(storage, offset, shape, stride))

    def _admitted(self, array: np.ndarray) -> np.ndarray:
        self.tensor_room -= array.size * max(4, array.itemsize)
        if self.tensor_room < 0:
            raise TorchFileError("refused: its tensors are much larger than the file")
        return array

    # NumPy's arrays, which are views of the bytes in the pickle

    def _new_array(self, *_) -> _NewArray:
        return _NewArray(len(self.memo))

    def _array(self, data, dtype, shape, order) -> np.ndarray | Unread:
        if not isinstance(dtype, _ArrayType) or not isinstance(shape, tuple) \
                or len(shape) > DIMENSION_LIMIT or not all(map(_is_size, shape)):
            raise TorchFileError("a malformed array")
        if dtype.name not in ARRAY_TYPES:  # texts or objects
            return UNREAD
        kind = np.dtype(dtype.order + dtype.name)
        if not isinstance(data, bytes) or len(data) != math.prod(shape) * kind.itemsize:
            raise TorchFileError("an array of another size than its data")
        return self._admitted(np.frombuffer(data, kind).reshape(shape, order=order))

    def _encode(self, text: object, encoding: object) -> bytes:
        """Bytes in pickles for Python 2, which has none, are a call of codecs.encode."""
        if not isinstance(text, str) or encoding != "latin1":
            raise TorchFileError("refused: an encoding other than that of bytes")
        self.text_room -= len(text)
        if self.text_room < 0:
            raise TorchFileError("refused: its bytes are larger than the file")
        return text.encode("latin1")

    # containers

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

    # calls

    def load_reduce(self) -> None:
        if not isinstance(self.stack[-1], tuple):
            raise TorchFileError("refused: a call without arguments")
        self.count(len(self.stack[-1]))
        super().load_reduce()
    dispatch[pickle.REDUCE[0]] = load_reduce

    def load_newobj(self) -> None:
        self.stack.pop()
        if self.stack[-1] is not UNREAD:
            raise TorchFileError("refused: an object of a class")
    dispatch[pickle.NEWOBJ[0]] = load_newobj

    def load_build(self) -> None:
        """Sets the content of an array, or drops attributes, as of a state dict's _metadata."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, _NewArray):
            _, shape, dtype, fortran, data = state
            self.stack[-1] = self._array(data, dtype, shape, "F" if fortran else "C")
            if self.memo.get(target.key) is target:
                self.memo[target.key] = self.stack[-1]
        elif isinstance(target, _ArrayType):
            target.order = ">" if state[1] == ">" else "<"
        elif not isinstance(target, (OrderedDict, Unread)):
            raise TorchFileError("refused: it changes what is no plain container")
    dispatch[pickle.BUILD[0]] = load_build

    def load_bytearray8(self) -> None:
        size, = struct.unpack("<Q", self.read(8))
        self.append(self.read(size))
    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8

    dispatch = {code: _counted(step) for code, step in dispatch.items()}


class _NewArray:
    """An array whose content follows; ``key`` is where the pickle puts it in its memo."""

    def __init__(self, key: int):
        self.key = key


class _ArrayType:
    """The type of an array's numbers: its name and, set later, its byte order."""

    def __init__(self, name: object, *_):
        self.name, self.order = name if isinstance(name, str) else "", "<"


def _parameter(tensor: object, *_) -> np.ndarray | Unread:
    if not isinstance(tensor, (np.ndarray, Unread)):
        raise TorchFileError("malformed parameter")
    return tensor


def _fill(target: object, items: list) -> dict:
    """Puts keys and values, alternating in ``items``, into a dict."""
    keys, values = items[::2], items[1::2]
    if not isinstance(target, dict) or len(keys) != len(values) or not all(map(is_name, keys)):
        raise TorchFileError("damaged: a dict with keys that are no plain names")
    target.update(zip(keys, values))
    return target


def is_name(key: object) -> bool:
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
