"""Our reader and writer of PyTorch's files compared with torch.save and torch.load."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import resource
import socket
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict

import numpy as np
import pytest

from runtime import torch_file, unpickler
from runtime.errors import InputError
from runtime.unpickler import UNREAD


class Hostile:
    """Creates a file at ``path`` when Python's pickle module loads it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_of_every_kind(torch_side, tmp_path, zipped):
    path = tmp_path / "odd.pt"
    truth = torch_side("save_odd_tensors", path=str(path), zipped=zipped)
    assert zipfile.is_zipfile(path) == zipped
    loaded = torch_file.load(path)
    assert (loaded["step"], loaded["note"], loaded["fresh"]) == (3, "a text", True)
    assert loaded["list"] == [1, (2.5, None)]
    assert loaded["tensors"].keys() == truth.keys()
    for name, array in loaded["tensors"].items():
        assert array.dtype == truth[name].dtype and array.shape == truth[name].shape, name
        assert np.array_equal(array, truth[name]), name


def test_torch_opens_what_we_save(torch_side, tmp_path):
    generator = np.random.default_rng(0)
    base = generator.normal(size=(4, 6)).astype(np.float32)
    state = {"model_state_dict": {"a": base, "tied": base, "transposed": base.T,
                                  "part": base[1:3, ::2], "scalar": np.float32([7]).reshape(()),
                                  "empty": np.zeros((0, 2), np.float32),
                                  "wide": np.float32([[1.5]]) * np.ones((1, 3), np.float64)},
             "step": 1050, "below 0": -1, "text": "Gr\u00fc\u00dfe", "yes": True, "no": False,
             "nothing": {}}
    path = tmp_path / "ours.pt"
    torch_file.save(path, state)
    truth = torch_side("load", path=str(path))
    assert (truth.pop("step"), truth.pop("below 0"), truth.pop("text")) \
        == (1050, -1, "Gr\u00fc\u00dfe")
    assert truth.pop("yes") and not truth.pop("no")
    assert truth.keys() == {f"model_state_dict/{name}" for name in state["model_state_dict"]}
    ours = torch_file.load(path)
    assert ours["nothing"] == {} and ours["yes"] is True
    for name, array in state["model_state_dict"].items():
        for read in (truth[f"model_state_dict/{name}"], ours["model_state_dict"][name]):
            assert read.dtype == np.float32 and read.shape == array.shape, name
            assert np.array_equal(read, array), name
    with zipfile.ZipFile(path) as archive:  # tied arrays are stored once
        assert sum("data/" in name for name in archive.namelist()) == 6


def test_equal_content_gives_equal_bytes(tmp_path, monkeypatch):
    for folder, now in (("a", 1e9), ("b", 2e9)):
        monkeypatch.setattr("time.time", lambda now=now: now)
        array = np.arange(6, dtype=np.float32).reshape(2, 3)
        torch_file.save(tmp_path / folder / "model.pt", {"x": array, "y": array, "n": 3})
    assert (tmp_path / "a/model.pt").read_bytes() == (tmp_path / "b/model.pt").read_bytes()
    torch_file.save(tmp_path / "b/model.pt", {"x": array + 1, "y": array, "n": 3})
    assert (tmp_path / "a/model.pt").read_bytes() != (tmp_path / "b/model.pt").read_bytes()


def test_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(InputError, match="is a folder"):
        torch_file.save(tmp_path, {"x": np.zeros(1, np.float32)})


def hostile_zip(payload: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("model/data.pkl", payload)
        archive.writestr("model/version", "3\n")
    return file.getvalue()


def hostile_legacy(payload: bytes) -> bytes:
    return b"".join(pickle.dumps(part, 2) for part in (
        torch_file.LEGACY_MAGIC, 1001, {"little_endian": True})) + payload


@pytest.mark.parametrize("wrap", [hostile_zip, hostile_legacy, bytes])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_file_runs_no_code(tmp_path, wrap, protocol):
    trap, path = tmp_path / "trapped", tmp_path / "hostile.pt"
    payload = pickle.dumps({"weights": [Hostile(trap)]}, protocol)
    path.write_bytes(wrap(payload))
    with pytest.raises(torch_file.TorchFileError, match=r"refused: it asks for posix\.system"):
        torch_file.load(path)
    assert not trap.exists()
    pickle.loads(payload)  # Python's pickle module does run the code
    assert trap.exists()


@pytest.mark.parametrize("name", ["builtins.eval", "torch.load", "torch._utils._rebuild_tensor",
                                  "numpy.core.multiarray.fromfile", "collections.Counter",
                                  "torch.FloatStorage.__class__"])
def test_other_globals_are_refused_too(tmp_path, name):
    module, _, attribute = name.rpartition(".")
    if name.startswith("torch.FloatStorage"):
        module, attribute = "torch", "FloatStorage.__class__"  # protocol 4 allows dotted names
    path = tmp_path / "file.pt"
    text = b"".join(b"\x8c" + bytes([len(s)]) + s.encode() for s in (module, attribute))
    path.write_bytes(hostile_zip(b"\x80\x04" + text + b"\x93."))
    with pytest.raises(torch_file.TorchFileError, match=f"refused: it asks for {name}"):
        torch_file.load(path)


def test_ordered_dict_is_a_plain_container(tmp_path):
    path = tmp_path / "file.pt"
    path.write_bytes(hostile_zip(pickle.dumps(OrderedDict(a=1), 2)))
    assert torch_file.load(path) == {"a": 1}


ARRAYS = {"matrix": np.arange(6, dtype=np.float32).reshape(2, 3), "double": np.arange(3) / 7,
          "half": np.float16([1.5]), "big-endian": np.arange(3, dtype=">f4"),
          "column-major": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
          "integers": np.array([-2**40, 7]), "mask": np.array([True, False]),
          "scalar": np.array(7, np.float32), "empty": np.zeros((0, 3)), "bytes": np.uint8([200])}


@pytest.mark.parametrize("protocol", range(6))
def test_pickled_arrays(tmp_path, protocol):
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps(
        {**ARRAYS, "again": ARRAYS["matrix"], "list": [ARRAYS["matrix"]],
         "texts": np.array(["x"]), "number": np.float64(3)}, protocol))
    read = torch_file.load(path)
    for name, array in ARRAYS.items():
        assert read[name].shape == array.shape and read[name].dtype == array.dtype, name
        assert np.array_equal(read[name], array), name
    assert read["again"] is read["matrix"] is read["list"][0]
    assert read["texts"] is read["number"] is UNREAD


def test_files_of_jittor(jittor, tmp_path):
    path = tmp_path / "model.pkl"
    weights = {"transformer.wte.weight": jittor.randn(3, 4), "n": jittor.array([1, 2])}
    jittor.save({"model_state_dict": weights, "losses": [1.0, 2.0], "step": 7}, str(path))
    read = torch_file.load(path)
    assert (read["losses"], read["step"]) == ([1.0, 2.0], 7)
    for name, var in weights.items():
        assert np.array_equal(read["model_state_dict"][name], var.numpy()), name
    jittor.nn.Linear(2, 3).save(str(path))
    assert {name: a.shape for name, a in torch_file.load(path).items()} == {
        "weight": (3, 2), "bias": (3,)}
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:-28] + whole[-27:], whole + b"x", whole[:-28] + b"x",
                    whole.replace(b"weight", b"Weight")):
        refused(tmp_path, damaged, "does not end with the checksum")
    path.write_bytes(whole[:-28])  # pickle.dump writes no checksum
    assert torch_file.load(path).keys() == {"weight", "bias"}


@pytest.mark.parametrize("zipped", [True, False])
def test_what_stands_beside_the_weights(torch_side, tmp_path, zipped):
    path = tmp_path / "run.pt"
    names = torch_side("save_run", path=str(path), zipped=zipped)["names"]
    read = torch_file.load(path)
    assert read["state_dict"]["weight"].tolist() == [1, 2]
    assert read["optimizer"]["state"][0]["exp_avg"].tolist() == [0, 0]
    assert read["losses"] == [0.5] * 1000
    assert all(read[name] is UNREAD for name in names) and len(names) == 9


def test_the_structure_alone(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    torch_file.save(path, {"model_state_dict": {"x": np.zeros(9, np.float32)}, "about": "a text"})
    monkeypatch.setattr(torch_file, "to_array", None)  # no tensor is read
    assert torch_file.load_structure(path) == {"model_state_dict": {"x": UNREAD},
                                               "about": "a text"}
    path.write_bytes(pickle.dumps({"about": "a text"}))
    assert torch_file.load_structure(path) is None


def tensor_pickle(count=4, offset=0, shape=(2, 2), stride=(2, 1)) -> bytes:
    """The pickle of a state dict with one tensor, of storage "0"."""
    numbers = (b"".join(pickle.dumps(x, 2)[2:-1] for x in (offset, shape, stride)))
    storage = (b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0" b"0X\x03\0\0\0cpu"
               + pickle.dumps(count, 2)[2:-1] + b"tQ")
    return (b"\x80\x02}X\x01\0\0\0xctorch._utils\n_rebuild_tensor_v2\n(" + storage + numbers
            + b"\x89ccollections\nOrderedDict\n)RtRs.")


@pytest.mark.parametrize("change, message", [
    ({"shape": (3, 2)}, "larger than its data"),
    ({"offset": 1}, "larger than its data"),
    ({"stride": (3, 1)}, "larger than its data"),
    ({"offset": -1}, "impossible shape"),
    ({"stride": (-2, 1)}, "impossible shape"),
    ({"shape": (2, 2, 1)}, "impossible shape"),
    ({"count": 5}, "16 bytes, not 20"),
])
def test_a_tensor_stays_within_its_data(tmp_path, change, message):
    path = tmp_path / "file.pt"

    def write(**fields):
        path.write_bytes(hostile_zip(tensor_pickle(**fields)))
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("model/data/0", np.arange(4, dtype="<f4").tobytes())

    write()
    assert torch_file.load(path)["x"].tolist() == [[0, 1], [2, 3]]
    write(**change)
    with pytest.raises(torch_file.TorchFileError, match=message):
        torch_file.load(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_files_are_refused(torch_side, tmp_path, zipped):
    """A truncated file is refused; a file with changed bytes loads or is refused, at any place."""
    path = tmp_path / "file.pt"
    torch_side("save", {"weight": np.arange(12, dtype=np.float32).reshape(3, 4)}, path=str(path),
               zipped=zipped, wrapped=True)
    whole, generator = path.read_bytes(), random.Random(0)
    for end in [0, 1, 10, *(len(whole) * i // 20 for i in range(1, 20)), len(whole) - 1]:
        path.write_bytes(whole[:end])
        with pytest.raises(torch_file.TorchFileError):
            torch_file.load(path)
    refused = 0
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(generator.randint(1, 4)):
            damaged[generator.randrange(len(whole))] = generator.randrange(256)
        path.write_bytes(damaged)
        try:
            torch_file.load(path)
        except torch_file.TorchFileError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 20


def refused(tmp_path, content: bytes, match: str | None = None) -> str:
    """Asserts that the loader refuses a file of this content; returns its message."""
    path = tmp_path / "refused.pt"
    path.write_bytes(content)
    with pytest.raises(torch_file.TorchFileError, match=match) as error:
        torch_file.load(path)
    assert str(error.value).isprintable() and len(str(error.value)) <= 300
    return str(error.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_cut_at_every_kilobyte(torch_side, tmp_path, zipped):
    path = tmp_path / "file.pt"
    arrays = {f"layer.{i}": np.full((16, 40), i, np.float32) for i in range(30)}
    torch_side("save", arrays, path=str(path), zipped=zipped)
    whole = path.read_bytes()
    assert len(whole) > 70_000
    for end in range(0, len(whole), 1024):
        refused(tmp_path, whole[:end])
    assert torch_file.load(path).keys() == arrays.keys()


def tuples(depth: int) -> bytes:
    """A pickle of ``depth`` nested tuples."""
    return b"\x80\x02)" + b"\x85" * depth + b"."


def doubled(depth: int, end: bytes) -> bytes:
    """``depth`` nested pairs of one object twice: a small pickle with 2 ** depth items to visit."""
    return b"\x80\x02)" + b"q\x00h\x00\x86" * depth + end + b"."


def array_pickle(shape=b"K\x03\x85", dtype=b"f4", data=bytes(12), order=b"<") -> bytes:
    """The pickle of a dict with one NumPy array."""
    kind = (b"cnumpy\ndtype\n(X" + struct.pack("<I", len(dtype)) + dtype + b"\x89\x88tR(K\x03U\x01"
            + order + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb")
    return (b"\x80\x04}U\x01xcnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\0\x85"
            b"C\x01btR(K\x01" + shape + kind + b"\x89B" + struct.pack("<I", len(data)) + data
            + b"tbs.")


ORDERED_DICT = b"ccollections\nOrderedDict\n"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
HOSTILE = {
    "memo of 100 GB": b"\x80\x02]r\xff\xff\xff\xff\x93.",
    "text memo": b"]p99999999999999999\n\x93.",
    "integer of 2 GB": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "negative length": b"\x80\x02\x8b\xff\xff\xff\xff.",
    "string of 10**18 bytes": b"\x80\x04\x8d" + struct.pack("<Q", 10**18) + b".",
    "bytes of 10**18 bytes": b"\x80\x04\x8e" + struct.pack("<Q", 10**18) + b".",
    "frame of 10**18 bytes": b"\x80\x04\x95" + struct.pack("<Q", 10**18) + b"\x93.",
    "long decimal": b"L" + b"9" * 100_000 + b"L\n.",
    "deep tuples": tuples(200_000),
    "deep lists": b"\x80\x02" + b"](" * 10_000 + b"e" * 10_000 + b".",
    "hash of deep tuples": b"\x80\x02}" + tuples(200_000)[2:-1] + b"Ns.",
    "hash of doubled pairs": b"\x80\x02}" + doubled(60, b"Ns")[2:],
    "hash in OrderedDict": b"\x80\x02" + ORDERED_DICT + b"](" + doubled(60, b"N\x86")[2:-1]
                           + b"e\x85R.",
    "set": b"\x80\x04\x8f(K\x01\x90.",
    "attribute of our function": b"\x80\x02" + REBUILD + b"}X\x01\0\0\0xK\x01sb.",
    "state of a tensor": b"\x80\x02" + tensor_pickle()[3:-2] + b"(K\x01tb.",
    "call of a result": b"\x80\x02" + ORDERED_DICT + b")R)R.",
    "call of a string": b"\x80\x02X\x01\0\0\0x)R.",
    "call of a storage": b"\x80\x02ctorch\nFloatStorage\n(K\x05tR.",
    "wrong arguments": b"\x80\x02" + REBUILD + b"(K\x01K\x02K\x03K\x04tR.",
    "too few arguments": b"\x80\x02" + REBUILD + b")R.",
    "no tuple of arguments": b"\x80\x02" + ORDERED_DICT + b"]R.",
    "object of a class": b"\x80\x02" + ORDERED_DICT + b")\x81.",
    "instance": b"(icollections\nOrderedDict\n.",
    "old object": b"(" + ORDERED_DICT + b"o.",
    "extension": b"\x80\x02\x82\x01.",
    "name that is a list": b"\x80\x04]]\x93.",
    "name of 1 MB": b"c" + b"x" * 1_000_000 + b"\nsystem\n.",
    "name with control characters": b"\x80\x04\x8c\x05os\n\x1b[\x8c\x01x\x93.",
    "empty stack": b"\x80\x020000.",
    "no stop": b"\x80\x02]",
    "unknown opcode": b"\x80\x02\xff.",
    "tensor of wrong kinds": tensor_pickle(shape=(2, "2")),
    "persistent id that is a number": b"\x80\x02K\x01Q.",
    "negative storage": tensor_pickle(count=-4),
    "storage of 10**15 bytes": tensor_pickle(count=10**15 // 4),
    "tensors without end": b"\x80\x02](" + tensor_pickle(
        shape=(10**9, 10**9), stride=(0, 0))[tensor_pickle().index(b"ctorch._u"):-2] + b"e.",
    "array larger than its data": array_pickle(shape=b"K\x04\x85"),
    "array of negative size": array_pickle(shape=b"J\xff\xff\xff\xff\x85"),
    "array of 100 dimensions": array_pickle(shape=b"(" + b"K\x01" * 100 + b"t", data=bytes(4)),
    "array of 10**18 numbers": array_pickle(shape=b"K\0\x8a\x08" + struct.pack("<q", 10**18)
                                            + b"\x86", data=b"")[:-1],
    "byte order that is a container": array_pickle(shape=b"N"),
    "attribute of an array's type": b"\x80\x02cnumpy\ndtype\nU\x02f4\x85R}U\x01xK\x01sb.",
    "content of a tensor": array_pickle().replace(b"cnumpy.core.multiarray\n_reconstruct\n",
                                                  ORDERED_DICT),
    "bytes of any size": b"\x80\x02c__builtin__\nbytes\nJ\0\0\0\x7f\x85R.",
    "encoding of any name": b"\x80\x02c_codecs\nencode\nU\x01xU\x03hex\x86R.",
    "array of bytes of 10**18": b"\x80\x05\x96" + struct.pack("<Q", 10**18) + b".",
    "structure of 5 MB": b"\x80\x02](" + b"}" * 5_000_000 + b"e.",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("wrap", [hostile_zip, hostile_legacy])
def test_hostile_pickles(tmp_path, name, wrap):
    content = wrap(HOSTILE[name])
    if wrap is hostile_zip:
        path = tmp_path / "refused.pt"
        path.write_bytes(content)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("model/data/0", bytes(16))
        content = path.read_bytes()
    refused(tmp_path, content)
    assert not vars(unpickler._rebuild_tensor)


def test_hostile_files_need_little_memory(tmp_path):
    """Loads all hostile files in a process that is limited to 1 GB of memory."""
    for number, content in enumerate(HOSTILE.values()):
        for wrap in (hostile_zip, hostile_legacy):
            (tmp_path / f"{wrap.__name__}{number}.pt").write_bytes(wrap(content))
    code = ("import sys\nfrom runtime import torch_file\n"
            "for path in sys.argv[1:]:\n"
            "    try: torch_file.load(path)\n"
            "    except torch_file.TorchFileError as error:\n"
            "        assert 'memory' not in str(error).lower(), (path, error)\n"
            "    else: sys.exit(path)\n")
    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))

    done = subprocess.run([sys.executable, "-c", code, *sorted(tmp_path.iterdir())],
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path),
                               "OPENBLAS_NUM_THREADS": "1"},
                          preexec_fn=limit, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Loads each file in a process of its own, within 1 GB more memory and 20 s of CPU time.
MEASURE = """
import json, os, resource, sys, time
from runtime.errors import InputError
{imports}

def memory(kind):  # bytes
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(kind)) * 1024

for path in sys.argv[1:]:
    if os.fork() == 0:
        resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + (1 << 30),) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
        before, said = memory("VmHWM"), None
        try:
            load(path)
        except (OSError, ValueError, InputError) as error:
            said = str(error)
        print(json.dumps([path, memory("VmHWM") - before, time.process_time(), said]), flush=True)
        os._exit(0)
    os.wait()
"""


def cheap(folder, files: dict[str, bytes],
          imports: str = "from runtime.torch_file import load") -> dict[str, str | None]:
    """Asserts that loading each file takes at most 8 times its size and 64 MiB of memory, and 5 s
    a megabyte; returns the messages, None for a file that is not refused."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE.format(imports=imports), *(folder / name for name in files)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    measured = {os.path.basename(path): rest for path, *rest in (
        json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))}
    assert not files.keys() - measured.keys()  # those that were killed
    for name, (memory, seconds, _) in measured.items():
        size = len(files[name])
        assert memory <= 8 * size + (64 << 20), (name, size, memory)
        assert seconds <= 5 * max(1, size / 1e6), (name, size, seconds)
    return {name: said for name, (_, _, said) in measured.items()}


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def tensor(kind: str, count: int, shape: tuple, stride: tuple) -> bytes:
    """The opcodes of a tensor of storage "0", which has ``count`` numbers of a class of torch."""
    sizes = b"".join(b"(" + b"".join(map(number, size)) + b"t" for size in (shape, stride))
    return (REBUILD + b"((" + text("storage") + b"ctorch\n" + kind.encode() + b"\n" + text("0")
            + text("cpu") + number(count) + b"tQ" + b"K\0" + sizes + b"tR")


def stored(payload: bytes, data: bytes = b"") -> bytes:
    """A checkpoint with ``data`` as storage "0"."""
    file = io.BytesIO(hostile_zip(payload))
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("model/data/0", data)
    return file.getvalue()


def named(tensors: dict[str, bytes]) -> bytes:
    return b"\x80\x02}(" + b"".join(text(name) + t for name, t in tensors.items()) + b"u."


def directory(members: int, name: int = 8, extra: bytes = b"") -> bytes:
    """A zip archive whose directory alone has so many members."""
    whole = hostile_zip(b"\x80\x02}.")
    start, end = whole.index(b"PK\x01\x02"), whole.index(b"PK\x05\x06")
    head = bytearray(whole[start:start + 46])
    struct.pack_into("<IIHHH", head, 20, 0, 0, name, len(extra), 0)
    entries = whole[start:end] + b"".join(
        bytes(head) + b"%0*d" % (name, i) + extra for i in range(members))
    tail = bytearray(whole[end:])
    count = min(members + 2, 0xffff)
    struct.pack_into("<HHII", tail, 8, count, count, len(entries), start)
    return whole[:start] + entries + tail


def listed(*parts: bytes) -> bytes:
    return b"\x80\x04" + parts[0] + b"0](" + b"".join(parts[1:]) + b"e."


MEGABYTE = 1 << 20
PAIRS = b"](" + b"".join(number(i) + b"N\x86" for i in range(300, 5000)) + b"e\x85q\x01"
LONG = b"\x8b" + struct.pack("<i", 400_000) + b"\x7f" * 400_000 + b"q\x01"
NO_NUMBERS = tensor("FloatStorage", 0, (0,), (1,))
HALVES = named({"a": tensor("BFloat16Storage", 4 * MEGABYTE, (4 * MEGABYTE,), (1,))})
MULTIPLYING = {
    "OrderedDict of one list": stored(listed(
        PAIRS + b"0" + ORDERED_DICT + b"q\x02", b"h\x02h\x01R" * 6000)),
    "one tuple of arguments": stored(listed(
        REBUILD + b"q\x020" + NO_NUMBERS[len(REBUILD):-2] + b"N" * 200_000 + b"tq\x01",
        b"h\x02h\x01R" * 100_000)),
    "tensors without numbers": stored(listed(
        REBUILD + b"q\x020" + NO_NUMBERS[len(REBUILD):-1] + b"q\x01",
        b"h\x02h\x01R" * 80_000)),
    "empty dicts": stored(listed(b"N", b"}" * MEGABYTE)),
    "dicts of one item": stored(listed(b"N", b"}K\x01Ns" * (MEGABYTE // 5))),
    "OrderedDicts": stored(listed(ORDERED_DICT + b"q\x01", b"h\x01)R" * (MEGABYTE // 4))),
    "memo": stored(listed(b"N", b"]\x94" * (MEGABYTE // 2))),
    "marks": hostile_zip(b"\x80\x02" + b"(" * MEGABYTE + b"t" * MEGABYTE + b"."),
    "integers of one hash": hostile_zip(b"\x80\x02}(" + b"".join(
        number(i * (2**61 - 1)) + b"N" for i in range(70_000)) + b"u."),
    "floats of one hash": hostile_zip(b"\x80\x02}(" + b"".join(
        b"G" + struct.pack(">d", 2.0**(i % 17 * 61) * (i // 17 + 1)) + b"N"
        for i in range(90_000)) + b"u."),
    "small integers of one slot": hostile_zip(b"\x80\x02}(" + b"".join(
        number(i << 16) + b"N" for i in range(32_000)) + b"u."),
    "equal long names": stored(listed(
        text("x" * 1_900_000) + b"q\x01" + text("x" * 1_900_000) + b"q\x02",
        b"}h\x01Ns" + b"h\x02Ns" * 85_000)),
    "products of long integers": stored(listed(
        LONG, REBUILD + b"(" + NO_NUMBERS[len(REBUILD) + 1:].partition(b"Q")[0] + b"QK\0("
        + b"h\x01" * 2000 + b"t(" + b"h\x01" * 2000 + b"ttR")),
    "decimal digits": hostile_zip(b"(" + (b"L" + b"9" * 4000 + b"L\n") * 260 + b"l."),
    "text with one wide character": hostile_zip(
        b"\x80\x02" + text("x" * 4_000_000 + "\U0001f600") + b"."),
    "wide lists of lists": hostile_zip(b"\x80\x02]q\x01" + (
        b"](" + b"h\x01" * 5000 + b"eq\x01") * 99 + b"."),
    "legacy keys": hostile_legacy(
        b"\x80\x02}." + listed(b"N", doubled(60, b"")[2:-1]) + bytes(100)),
    "legacy structures": b"".join([
        pickle.dumps(torch_file.LEGACY_MAGIC, 2), *[listed(b"N", b"}" * 260_000)] * 4]),
    "bytes encoded again and again": hostile_zip(listed(
        b"c_codecs\nencode\nq\x020(" + text("\xff" * 500_000) + b"U\x06latin1tq\x01",
        b"h\x02h\x01R" * 80_000)),
    "one array's bytes again and again": array_pickle(
        shape=number(MEGABYTE) + b"\x85", dtype=b"u1", data=bytes(MEGABYTE))[:-2] + b"q\x050"
        + b"0" + listed(b"N", b"h\x05" * 200_000)[2:],
    "bytes as an array": array_pickle(shape=number(MEGABYTE) + b"\x85", dtype=b"u1",
                                      data=bytes(MEGABYTE)),
    "plain text with one wide character": b"\x80\x02}" + text("a") + text(
        "x" * 4_000_000 + "\U0001f600") + b"s.",
    "bfloat16": stored(HALVES, bytes(8 * MEGABYTE)),
    "legacy bfloat16": hostile_legacy(HALVES + pickle.dumps(["0"], 2)
                                      + struct.pack("<q", 4 * MEGABYTE) + bytes(8 * MEGABYTE)),
    "short names of members": directory(20_000, name=5),
    "extra fields of members": directory(15, extra=b"\x99\x99\0\0" * 16_000),
    "members": directory(300_000),
}


@pytest.mark.slow
def test_no_file_multiplies_memory_or_time(tmp_path):
    said = cheap(tmp_path, MULTIPLYING)
    for name in ("OrderedDict of one list", "one tuple of arguments", "empty dicts", "memo"):
        assert said[name] == "refused: its structure has more than 262144 objects", name
    for name in ("integers of one hash", "floats of one hash", "equal long names"):
        assert said[name] == "damaged: a dict with keys that are no plain names", name
    assert said["members"] == "refused: its directory has more than 1048576 bytes"
    assert said["bfloat16"] is said["legacy bfloat16"] is None


def test_tensors_that_become_larger_as_float32(tmp_path):
    """Other types become float32 when weights are read: a byte of the file then takes four."""
    n, path = 3 << 20, tmp_path / "file.pt"
    whole = tensor("HalfStorage", n, (n // 2, 2), (2, 1))  # tied: two names, one storage
    path.write_bytes(stored(named({"wte": whole, "head": whole}), bytes(2 * n)))
    assert {name: array.shape for name, array in torch_file.load(path).items()} == {
        "wte": (n // 2, 2), "head": (n // 2, 2)}
    for kind in ("ByteStorage", "BoolStorage"):  # a mask
        path.write_bytes(stored(named({"mask": tensor(kind, n, (n,), (1,))}), bytes(n)))
        assert torch_file.load(path)["mask"].nbytes == n
    repeated = tensor("ByteStorage", n, (2 * n,), (0,))
    views = {f"view {i}": tensor("ByteStorage", n, (n,), (1,)) for i in range(2)}
    for tensors in ({"a": repeated}, views):
        refused(tmp_path, stored(named(tensors), bytes(n)),
                "refused: its tensors are much larger than the file")


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    keep = os.open(tmp_path / "fifo", os.O_RDWR)  # without a writer, open would wait for ever
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for path in (tmp_path / "fifo", tmp_path / "socket", tmp_path, "/dev/zero", "/dev/null"):
            with pytest.raises(OSError, match="not a regular file"):
                torch_file.load(path)
    os.close(keep)
    torch_file.save(tmp_path / "file.pt", {"n": 1})
    (tmp_path / "link.pt").symlink_to("file.pt")
    assert torch_file.load(tmp_path / "link.pt") == {"n": 1}


def test_legacy_data_of_another_size(tmp_path):
    structure = b"\x80\x02" + tensor("FloatStorage", 4, (4,), (1,)) + b"."
    path = tmp_path / "file.pt"
    for count, data, message in ((4, 16, None), (3, 16, "another size"), (4, 12, "too early"),
                                 (4, 4, "too early")):
        content = hostile_legacy(structure + pickle.dumps(["0"], 2) + struct.pack("<q", count)
                                 + np.arange(4, dtype="<f4").tobytes()[:data])
        if message:
            refused(tmp_path, content, message)
        else:
            path.write_bytes(content)
            assert torch_file.load(path).tolist() == [0, 1, 2, 3]
    refused(tmp_path, hostile_legacy(structure + pickle.dumps([], 2)), "tensor data is missing")


def test_zip_bombs(tmp_path):
    def bomb(compression=zipfile.ZIP_STORED, claim=None, twice=False):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", compression) as archive:
            archive.writestr("m/data.pkl", tensor_pickle(count=1 << 20, shape=(1 << 20,),
                                                         stride=(1,)))
            archive.writestr("m/data/0", bytes(4 << 20))
            if claim:
                info = archive.getinfo("m/data/0")
                info.file_size = info.compress_size = claim
            if twice:
                archive.filelist.append(archive.getinfo("m/data/0"))
        return file.getvalue()

    refused(tmp_path, bomb(zipfile.ZIP_DEFLATED), "refused: m/data.pkl is compressed")
    refused(tmp_path, bomb(claim=1 << 40), "refused: its members are larger than the file")
    refused(tmp_path, bomb(twice=True), "refused: two of its members have one name")
    path = tmp_path / "honest.pt"
    path.write_bytes(bomb())
    assert torch_file.load(path)["x"].shape == (1 << 20,)


def test_many_views_of_the_same_bytes(tmp_path):
    """The file is small, but copies of all its tensors would need 40 GB."""
    one = tensor_pickle(count=1 << 20, shape=(1 << 20,), stride=(1,))
    tensor = one[one.index(b"ctorch._u"):-2]
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("m/data.pkl", b"\x80\x02](" + tensor * 10_000 + b"e.")
        archive.writestr("m/data/0", bytes(4 << 20))
    refused(tmp_path, file.getvalue(), "refused: its tensors are much larger than the file")


@pytest.mark.parametrize("content", [b"", b"text\n", b"\x89PNG\r\n\x1a\n", b"PK\x03\x04", b"\x80"])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "file.pt"
    path.write_bytes(content)
    with pytest.raises(torch_file.TorchFileError):
        torch_file.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "<w/>")
    with pytest.raises(torch_file.TorchFileError, match="no PyTorch checkpoint"):
        torch_file.load(path)


def test_big_endian_files_are_refused(tmp_path):
    path = tmp_path / "file.pt"
    torch_file.save(path, {"n": 1})
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    parts["file/byteorder"] = b"big"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    with pytest.raises(torch_file.TorchFileError, match="big-endian"):
        torch_file.load(path)
