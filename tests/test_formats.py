"""Output files (links, devices, pipes, permissions, parts of other processes) and messages."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import shutil
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import run_log
from runtime import errors, progress, torch_file
from runtime.errors import InputError
from runtime.formats import replacing, write_jsonl

SRC = Path(run_log.__file__).parent


def write(path, data=b"new"):
    with replacing(path) as file:
        file.write(data)


def assert_refused(path, message):
    with pytest.raises(InputError) as error:
        write(path)
    assert message in str(error.value) and str(error.value).startswith(f"{path}: ")


def reader_of(descriptor):
    """Reads a pipe to its end in a thread; calling the result returns what it read."""
    read = []

    def all_of_it():
        with open(descriptor, "rb") as file:
            read.append(file.read())

    thread = threading.Thread(target=all_of_it, daemon=True)
    thread.start()

    def result():
        thread.join(20)
        return read[0]
    return result


def names_in(folder):
    return {path.name for path in folder.iterdir()}


# Links


def test_links_are_followed(tmp_path):
    for folder in ("data", "links"):
        (tmp_path / folder).mkdir()
    target = tmp_path / "data/out.txt"
    target.write_text("old")
    (tmp_path / "links/first").symlink_to("../data/out.txt")
    (tmp_path / "second").symlink_to("links/first")
    (tmp_path / "folder").symlink_to("data")
    for path in (tmp_path / "second", tmp_path / "folder/out.txt"):
        write(path, str(path).encode())
        assert target.read_text() == str(path)
        with pytest.raises(ZeroDivisionError), replacing(path) as file:
            file.write(b"half")
            # the part is beside the target, which may be on another disk than the link
            assert len(names_in(tmp_path / "data")) == 2
            raise ZeroDivisionError
        assert target.read_text() == str(path)
    assert (tmp_path / "second").is_symlink() and (tmp_path / "links/first").is_symlink()
    assert names_in(tmp_path / "data") == {"out.txt"} and names_in(tmp_path / "links") == {"first"}


def test_the_target_of_a_dangling_link_is_created(tmp_path):
    (tmp_path / "link").symlink_to("later/out.txt")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "later/out.txt").read_bytes() == b"new"


def test_a_loop_of_links_and_a_link_to_a_folder_are_refused(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "c").symlink_to(tmp_path)
    assert_refused(tmp_path / "a", "Too many levels of symbolic links")
    assert_refused(tmp_path / "a/out.txt", "Too many levels of symbolic links")
    assert_refused(tmp_path / "c", "is a folder")
    assert names_in(tmp_path) == {"a", "b", "c"}


# Streams


@pytest.mark.parametrize("minor, message", [(3, None), (7, "No space left")])  # null, full
@pytest.mark.parametrize("how", ["device", "link"])
def test_devices_are_written_through(tmp_path, minor, message, how):
    path = tmp_path / "out"
    if how == "link":
        path.symlink_to({3: "/dev/null", 7: "/dev/full"}[minor])
    else:
        try:
            os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, minor))
            os.close(os.open(path, os.O_WRONLY))
        except PermissionError:
            pytest.skip("devices cannot be made here")
    if message:
        assert_refused(path, message)
    else:
        write(path)
    assert stat.S_ISCHR(path.stat().st_mode) and path.is_symlink() == (how == "link")
    assert names_in(tmp_path) == {"out"}


def test_a_named_pipe(tmp_path):
    """A writer of zip files seeks, which a pipe cannot."""
    state = {"x": np.arange(9, dtype=np.float32), "y": "text"}
    fifo = tmp_path / "out.pt"
    os.mkfifo(fifo)
    result = reader_of(fifo)
    torch_file.save(fifo, state)
    (tmp_path / "folder").mkdir()
    torch_file.save(tmp_path / "folder/out.pt", state)
    assert result() == (tmp_path / "folder/out.pt").read_bytes()
    assert stat.S_ISFIFO(fifo.stat().st_mode) and names_in(tmp_path) == {"out.pt", "folder"}


@pytest.mark.parametrize("folder", ["/dev/fd", "/proc/self/fd"])
def test_an_open_descriptor(folder):
    source, target = os.pipe()
    result = reader_of(source)
    write(f"{folder}/{target}")
    os.write(target, b", later")
    os.close(target)
    assert result() == b"new, later"
    for name in (target, 10**30, "x"):
        assert_refused(f"{folder}/{name}", "cannot be written: No such file")


def test_process_substitution(tmp_path):
    script = ("import sys; from runtime.formats import write_jsonl; "
              "write_jsonl(sys.argv[1], [{'a': 1}])")
    command = ["bash", "-c", '"$0" -c "$1" >(tr a b); wait $!', sys.executable, script]
    said = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(SRC)}, timeout=60,
                          capture_output=True, text=True)
    assert (said.stdout, said.stderr) == ('{"b": 1}\n', "")


@pytest.mark.parametrize("mode", ["wb", "ab"])
def test_standard_output_in_a_file(tmp_path, mode):
    """The shell has opened the file; other output before and after must not be lost."""
    out, link = tmp_path / "out", tmp_path / "link"
    out.write_bytes(b"from before\n")
    link.symlink_to("/proc/self/fd/1")
    script = ("import sys; from runtime import formats, progress; progress.log('first'); "
              "formats.write_jsonl(sys.argv[1], [{'a': 1}]); progress.log('last')")
    with open(out, mode) as file:
        subprocess.run([sys.executable, "-c", script, link], stdout=file, check=True, timeout=60,
                       env={**os.environ, "PYTHONPATH": str(SRC)})
    before = "from before\n" if mode == "ab" else ""
    assert out.read_text() == f'{before}first\n{{"a": 1}}\nlast\n'
    assert names_in(tmp_path) == {"out", "link"}


def test_a_file_that_another_process_has_open_is_appended_to(tmp_path):
    out = tmp_path / "out"
    with open(out, "w") as file:
        process = subprocess.Popen(["sh", "-c", "echo first; read line; echo last"], stdout=file,
                                   stdin=subprocess.PIPE, text=True)
    while out.read_text() != "first\n":
        assert process.poll() is None
    write(f"/proc/{process.pid}/fd/1", b"new\n")
    assert out.read_text() == "first\nnew\n"
    process.communicate("\n", timeout=20)


def test_a_socket_is_refused_and_one_that_is_open_written(tmp_path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "out"))
        assert_refused(tmp_path / "out", "cannot be written: No such device")
    ours, other = socket.socketpair()
    with ours, other:
        write(f"/dev/fd/{ours.fileno()}")
        assert other.recv(9) == b"new"


def test_a_failing_block_writes_nothing_to_a_stream():
    source, target = os.pipe()
    result = reader_of(source)
    with pytest.raises(ZeroDivisionError), replacing(f"/dev/fd/{target}") as file:
        file.write(b"half")
        raise ZeroDivisionError
    os.close(target)
    assert result() == b""


def test_a_reader_that_is_gone():
    """script.run ends such a script as `| head` ends one that prints."""
    source, target = os.pipe()
    os.close(source)
    with pytest.raises(BrokenPipeError):
        write(f"/dev/fd/{target}")
    os.close(target)


# Permissions


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666, 0o755, 0o444])
def test_permissions_are_kept(tmp_path, mode):
    path = tmp_path / "out"
    path.write_text("old")
    path.chmod(mode)
    with replacing(path) as file:
        assert not os.fstat(file.fileno()).st_mode & 0o077 & ~mode  # readable to no other user
        file.write(b"new")
    assert path.read_bytes() == b"new" and stat.S_IMODE(path.stat().st_mode) == mode


def test_a_new_file_has_the_permissions_of_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write(tmp_path / "out")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o640


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_owners_are_kept(tmp_path):
    path = tmp_path / "out"
    path.write_text("old")
    os.chown(path, 4321, 1234)
    write(path)
    assert (path.stat().st_uid, path.stat().st_gid) == (4321, 1234)


def test_owners_that_cannot_be_kept(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EPERM, "not permitted")

    path = tmp_path / "out"
    path.write_text("old")
    monkeypatch.setattr(os, "fchown", refuse)
    write(path)
    assert path.read_bytes() == b"new"


# Parts: half-written files beside their place

WRITER = """
import sys
from runtime.formats import replacing
with replacing(sys.argv[1]) as file:
    file.write(b"half")
    file.flush()
    print("writing", flush=True)
    sys.stdin.readline()
"""
CLEANER = "import sys; from runtime.formats import write_jsonl; write_jsonl(sys.argv[1], [])"
NAMESPACE = ["unshare", "--map-root-user", "--pid", "--fork", "--kill-child"]


def start(script, path, prefix=()):
    return subprocess.Popen([*prefix, sys.executable, "-c", script, path], text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            env={**os.environ, "PYTHONPATH": str(SRC)})


@pytest.fixture(params=["same namespace", "other namespace"])
def prefix(request):
    """What starts a process that sees the other processes, or that does not."""
    if request.param == "same namespace":
        return []
    if not shutil.which("unshare") or subprocess.run([*NAMESPACE, "true"],
                                                     capture_output=True).returncode:
        pytest.skip("no namespaces of process ids here")
    return NAMESPACE


def test_a_part_in_use_stays_and_one_of_a_killed_process_goes(tmp_path, prefix):
    writers = [start(WRITER, tmp_path / f"{name}.txt") for name in ("end", "kill")]
    for writer in writers:
        assert writer.stdout.readline() == "writing\n"
    before = names_in(tmp_path)
    assert len(before) == 2
    assert start(CLEANER, tmp_path / "other.txt", prefix).wait(60) == 0
    assert names_in(tmp_path) == {*before, "other.txt"}
    writers[1].kill()
    writers[1].wait()
    assert start(CLEANER, tmp_path / "other.txt", prefix).wait(60) == 0
    assert len(names_in(tmp_path)) == 2
    writers[0].communicate("\n", timeout=60)
    assert writers[0].returncode == 0
    assert names_in(tmp_path) == {"other.txt", "end.txt"}
    assert (tmp_path / "end.txt").read_bytes() == b"half"


def test_which_names_are_parts(tmp_path):
    """Also those of earlier versions, which had the number of the process in the name."""
    gone = {".out.txt.0123abcd.part", ".a\nb.89abcdef.part", f".model.9.pt.{os.getpid()}.part"}
    stay = {".mine.part", ".mine.0123.abcd.part", "out.txt.part", ".out.txt.0123ABCD.part"}
    for name in gone | stay:
        (tmp_path / name).write_text("half")
    os.mkfifo(tmp_path / ".pipe.0123abcd.part")
    with replacing(tmp_path / "out.txt"):
        name, = names_in(tmp_path) - gone - stay - {".pipe.0123abcd.part"}
        assert names_in(tmp_path) == {*stay, ".pipe.0123abcd.part", name}
        assert name.startswith(".out.txt.") and name.endswith(".part")
        write_jsonl(tmp_path / "other.txt", [])
        assert name in names_in(tmp_path)
    assert names_in(tmp_path) == {*stay, ".pipe.0123abcd.part", "out.txt", "other.txt"}


def test_a_part_removed_before_it_is_locked(tmp_path, monkeypatch):
    """Another process may find the part between its creation and its locking."""
    calls, flock = [], fcntl.flock

    def after_another(file, how):
        if not calls:
            next(tmp_path.glob(".out.txt.*.part")).unlink()
        calls.append(how)
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", after_another)
    write(tmp_path / "out.txt")
    assert len(calls) == 2
    assert names_in(tmp_path) == {"out.txt"} and (tmp_path / "out.txt").read_bytes() == b"new"


def test_a_part_is_locked_until_it_is_renamed(tmp_path, monkeypatch):
    replace = os.replace

    def after_cleaning(source, target):
        assert start(CLEANER, tmp_path / "other.txt").wait(60) == 0
        replace(source, target)

    monkeypatch.setattr(os, "replace", after_cleaning)
    write(tmp_path / "out.txt")
    assert names_in(tmp_path) == {"out.txt", "other.txt"}


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks(tmp_path, monkeypatch, code):
    """Nothing says there which parts are in use, so they stay."""
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    (tmp_path / ".out.txt.0123abcd.part").write_text("half")
    monkeypatch.setattr(fcntl, "flock", refuse)
    write(tmp_path / "out.txt")
    assert names_in(tmp_path) == {"out.txt", ".out.txt.0123abcd.part"}


# Records of a run


@pytest.mark.parametrize("name", run_log.FILES)
def test_records_of_a_run_that_are_no_files(tmp_path, name):
    os.mkfifo(tmp_path / "pipe")
    for target in ("/dev/null", "pipe", "/proc/self/fd/1"):
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).symlink_to(target)
        with pytest.raises(InputError, match=f"{name}: not a regular file.*--work_dir"):
            run_log.RunLog(tmp_path, print)


def test_records_of_a_run_that_are_links(tmp_path):
    (tmp_path / "train.log").symlink_to("elsewhere")
    log = run_log.RunLog(tmp_path, lambda _: None)
    log.line("text")
    assert log.sync()[0] == 5
    log.close()
    assert (tmp_path / "elsewhere").read_text() == "text\n"


# Messages

HOSTILE = "a\x1b[2J\x9b\x00\r\nb\x85\u2028\u202e\ud800\t\x7fc"


def test_an_error_is_one_printable_line():
    assert str(InputError(HOSTILE)) == "a?[2J????b??????c"
    assert str(InputError("data.txt:3: Zo\u00eb \u4e2d\u6587 \U0001f600")) \
        == "data.txt:3: Zo\u00eb \u4e2d\u6587 \U0001f600"


def test_a_long_error_keeps_both_ends():
    assert str(InputError("x" * errors.LONGEST)) == "x" * errors.LONGEST
    message = str(InputError("file.txt:1: " + "x" * 10**6 + "; remove the line"))
    assert len(message) <= errors.LONGEST
    assert message.startswith("file.txt:1: xx") and message.endswith("xx; remove the line")
    kept = message.count("x") - "file.txt:1: ".count("x")
    assert f"x [{10**6 - kept} characters left out] x" in message


def test_an_error_of_a_hostile_file_name(tmp_path):
    name = os.fsdecode(b"no\x1b[2J\n\xff.txt")
    said = subprocess.run([sys.executable, "-m", "format_converting_e2e", tmp_path / name, "out"],
                          capture_output=True, cwd=SRC, timeout=60)
    assert said.returncode == 1
    assert b"no?[2J??.txt: no such file" in said.stderr and said.stderr.count(b"\n") == 1
    assert said.stderr.rstrip(b"\n").decode("ascii").isprintable()


def test_log_lines_are_printable(capsys):
    progress.log(HOSTILE)
    progress.log("a\tb")
    assert capsys.readouterr().out == "a?[2J????b????\t?c\na\tb\n"


def test_log_lines_that_the_terminal_cannot_show(monkeypatch):
    said = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(said, "latin-1"))
    progress.log("Zo\u00eb \u4e2d")
    assert said.getvalue() == "Zo\u00eb ?\n".encode("latin-1")


def test_names_of_bars_are_printable(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress.Progress(3, HOSTILE) as bar:
        bar.update(3)
    said = sys.stderr.getvalue()
    assert "a?[2J????b??????c: " in said and "\x1b[2J" not in said and "\u2028" not in said
