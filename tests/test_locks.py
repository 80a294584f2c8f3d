"""Locks between processes."""

import errno
import os
import subprocess
import sys
from unittest.mock import Mock

import pytest
from conftest import ROOT

from runtime.errors import InputError
from runtime.locks import exclusive, lock

HOLDER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from runtime.locks import exclusive
with exclusive(Path(sys.argv[2]), "another"):
    print("holds", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Starts a process that holds the lock until its stdin is closed."""
    def start():
        process = subprocess.Popen([sys.executable, "-c", HOLDER, ROOT / "src", tmp_path / "lock"],
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "holds\n"
        return process
    return start


@pytest.mark.parametrize("end", ["ends", "killed"])
def test_free_when_the_process_ends(holder, tmp_path, end):
    process = holder()
    with pytest.raises(InputError) as error:
        with exclusive(tmp_path / "lock", "another --work_dir"):
            pass
    assert str(error.value).startswith(f"{tmp_path}: in use by process {process.pid} on ")
    assert str(error.value).endswith("; wait for it, or give another --work_dir")
    with exclusive(tmp_path / "other", "another"):
        pass
    if end == "killed":
        process.kill()
    process.communicate()
    with exclusive(tmp_path / "lock", "another"):
        assert (tmp_path / "lock").exists()
    assert (tmp_path / "lock").exists()  # see exclusive


def test_a_name_of_a_file_that_another_host_has_removed(tmp_path, monkeypatch):
    with open(tmp_path / "lock", "w") as file:
        assert lock(file)
        with monkeypatch.context() as patch:
            patch.setattr(os, "stat", Mock(side_effect=OSError(errno.ESTALE, "Stale file handle")))
            assert not lock(file)


def test_a_lock_file_that_its_holder_has_removed(holder, tmp_path, monkeypatch):
    """The file may be removed after it was opened here: two processes would hold one lock."""
    import fcntl

    calls = []

    def flock(file, how, original=fcntl.flock):
        if not calls:
            os.unlink(tmp_path / "lock")
        calls.append(how)
        original(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with exclusive(tmp_path / "lock", "another"):
        assert len(calls) == 2
        monkeypatch.undo()
        with pytest.raises(InputError, match=f"in use by process {os.getpid()} on"):
            with exclusive(tmp_path / "lock", "another"):
                pass


def test_an_error_in_the_block_is_its_own(tmp_path):
    with pytest.raises(OSError, match="mine"):
        with exclusive(tmp_path / "lock", "another"):
            raise OSError("mine")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written: .*; give another"):
        with exclusive(tmp_path / "file" / "lock", "another"):
            pass
