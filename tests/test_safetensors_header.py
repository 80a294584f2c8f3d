"""The check of safetensors' offsets, on files that the library writes and on forged ones."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.numpy

import safetensors_header
from torch_file import TorchFileError


def forged(tmp_path, header, size=32, length=None):
    path = tmp_path / "m.safetensors"
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text
                     + bytes(size))
    return path


def entry(begin, end, shape=(4,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_files_of_the_library_pass(tmp_path):
    path = tmp_path / "m.safetensors"
    arrays = {"a": np.zeros((2, 3), np.float32), "b": np.zeros(5, np.float16),
              "empty": np.zeros((0, 4), np.float32), "scalar": np.float64([1]).reshape(()),
              "flags": np.zeros(3, bool), "long": np.zeros((2, 2), np.int64)}
    safetensors.numpy.save_file(arrays, path, metadata={"format": "pt"})
    safetensors_header.check(path)
    safetensors.numpy.save_file({}, path)
    safetensors_header.check(path)


def test_forged_file_that_is_right_passes(tmp_path):
    safetensors_header.check(forged(tmp_path, {"b": entry(16, 32), "a": entry(0, 16)}))


@pytest.mark.parametrize("header, message", [
    ({"a": entry(0, 16), "b": entry(8, 24), "c": entry(24, 32, (2,))}, "b begins at byte 8"),
    ({"a": entry(0, 16), "b": entry(0, 16), "c": entry(16, 32)}, "overlap"),
    ({"a": entry(0, 32, (8,)), "b": entry(4, 12, (2,))}, "overlap"),
    ({"a": entry(0, 16), "b": entry(20, 32, (3,))}, "a gap"),
    ({"a": entry(0, 16)}, "have 16 bytes, the file 32"),
    ({"a": entry(0, 16), "b": entry(16, 48, (8,))}, "have 48 bytes, the file 32"),
    ({"a": entry(0, 16), "b": entry(16, 32, (5,))}, "its shape 20"),
    ({"a": entry(0, 32, (1 << 62, 1 << 62))}, "its shape"),
    ({"a": entry(-16, 16)}, "no valid"),
    ({"a": entry(0, 2 ** 64)}, "no valid"),
    ({"a": entry(16, 0)}, "begins at byte 16"),
    ({"a": entry(0, 32, [2] * 100_000)}, "no valid"),
    ({"a": entry(0, 32, (-8,))}, "no valid"),
    ({"a": entry(0, 32, (8.0,))}, "no valid"),
    ({"a": {"dtype": "F32", "shape": 8, "data_offsets": 5}}, "no valid"),
    ({"a": {"dtype": ["F32"], "shape": [8], "data_offsets": [0, 32]}}, "no valid"),
    ({"a": None}, "no valid"),
    ({"a": entry(0, 32, (8,), "F12")}, "type F12"),
    ([1], "no table"),
    (b"{", "no safetensors file"),
    (b'{"a": 1, "a": 2}', "twice"),
    (b"\xff" * 10, "no safetensors file"),
    (b"[" * 100_000, "no safetensors file"),
])
def test_forged_files_are_refused(tmp_path, header, message):
    with pytest.raises(TorchFileError, match=message) as error:
        safetensors_header.check(forged(tmp_path, header))
    assert str(error.value).isprintable()


@pytest.mark.parametrize("length", [0, 3, 10_000, 2 ** 63, 2 ** 64 - 1])
def test_wrong_header_lengths(tmp_path, length):
    with pytest.raises(TorchFileError):
        safetensors_header.check(forged(tmp_path, {"a": entry(0, 32, (8,))}, length=length))


def test_header_of_five_megabytes(tmp_path):
    with pytest.raises(TorchFileError, match="refused: its header has"):
        safetensors_header.check(forged(tmp_path, b" " * (5 << 20)))


def test_cut_at_every_hundred_bytes(tmp_path):
    path = tmp_path / "m.safetensors"
    safetensors.numpy.save_file({f"t{i}": np.zeros((4, 4), np.float32) for i in range(20)}, path)
    whole = path.read_bytes()
    for end in range(0, len(whole), 100):
        path.write_bytes(whole[:end])
        with pytest.raises(TorchFileError):
            safetensors_header.check(path)
