"""What is shown while Jittor compiles: a bar or log lines in place of its own reports."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import compiling, progress
from runtime.errors import InputError

# The format of Jittor's parallel_compiler.cc: a line feed before the first report and at the end.
REPORTS = (b"\nCompiling Operators(1/4) used: 2.01s eta:    6s \r"
           b"Compiling Operators(3/4) used: 2.51s eta: 0.84s \r\n")


def relayed(*chunks: bytes) -> list[bytes]:
    """The lines that relay passes on, if each of its reads returns one of the chunks."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    written = []

    def feed():
        with ours:
            for chunk in chunks:
                ours.sendall(chunk)

    feeder = threading.Thread(target=feed)
    feeder.start()
    with its:
        compiling.relay(its.fileno(), written.append)
    feeder.join()
    return written


def test_reports_are_not_passed_on():
    assert b"".join(relayed(REPORTS)) == b""
    assert b"".join(relayed(b"before\n" + REPORTS + b"after\n")) == b"before\nafter\n"
    assert b"".join(relayed(REPORTS + REPORTS + b"[e] an error\n")) == b"[e] an error\n"


def test_other_lines_pass_unchanged():
    lines = [b"a.cc:3:1: error: Compiling Operators(1/4)\n", b"  indented\n", b"50 %\r",
             b"\xff\0\n", b"Compiling Operators (1/4)\n", b"Compiling\n", b"no line end"]
    assert relayed(b"".join(lines)) == lines
    text = b"\n\na\r\n\nb\n\n"
    assert b"".join(relayed(text)) == b"".join(relayed(*(bytes([c]) for c in text))) == text
    assert relayed() == [b""] and relayed(b"unfinished") == [b"unfinished"]


def test_lines_are_passed_on_as_soon_as_they_end():
    reader, writer = os.pipe()
    seen, passed = [], threading.Event()

    def write(line):
        seen.append(line)
        passed.set()

    relay = threading.Thread(target=compiling.relay, args=(reader, write))
    relay.start()
    os.write(writer, b"one\ntw")
    assert passed.wait(20) and seen == [b"one\n"]
    os.write(writer, b"o")
    os.close(writer)
    relay.join(20)
    assert not relay.is_alive() and seen == [b"one\n", b"two"]
    os.close(reader)


line = st.binary(max_size=12).map(lambda text: text.translate(None, b"\r\n") + b"!").flatmap(
    lambda text: st.sampled_from([text + b"\n", text + b"\r"]))
report = st.tuples(st.integers(0, 99), st.integers(1, 99)).map(
    lambda n: b"Compiling Operators(%d/%d) used: 2.1s eta:  26s \r" % n)


@settings(max_examples=100, deadline=None)
@given(parts=st.lists(st.one_of(line, report, st.just(b"\n")), max_size=8),
       last=st.sampled_from([b"", b"unfinished"]), draw=st.data())
def test_wherever_the_bytes_are_split(parts, last, draw):
    """Reports and the empty lines around them are dropped; everything else is passed on."""
    text = b"".join(parts) + last
    cuts = draw.draw(st.lists(st.integers(1, max(1, len(text) - 1)), unique=True, max_size=9))
    ends = [0, *sorted(cuts), len(text)]
    chunks = [text[a:b] for a, b in zip(ends, ends[1:]) if text[a:b]]
    expected, reporting, before = [], False, b"\n"
    for part in parts:
        empty = part == b"\n" and not before.endswith(b"!\r")
        if part.startswith(b"Compiling"):
            if before == b"\n" and expected[-1:] == [b""]:
                expected.pop()
            reporting = True
        elif empty:
            if not reporting:
                expected.append(b"")  # an empty line
            reporting = False
        else:
            expected.append(part)
        before = part
    expected = [part or b"\n" for part in expected]
    assert b"".join(relayed(*chunks)) == b"".join(expected) + last


def test_every_single_split():
    text = b"a\n" + REPORTS + b"b\n" + REPORTS + b"c"
    for cut in range(1, len(text)):
        assert b"".join(relayed(text[:cut], text[cut:])) == b"a\nb\nc", cut


# Progress

@pytest.fixture
def clock(monkeypatch):
    """The clock of progress and compiling: a list whose only number is the time."""
    now = [1000.0]
    for module in (progress, compiling):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def reports_of(clock, period: float, times: list[float]) -> None:
    """Relays a report at each of the times, in seconds from the first."""
    began, waits = clock[0], [*times[1:], times[-1]]
    reader, writer = os.pipe()
    text = b"".join(b"Compiling Operators(%d/50) used: 2s eta: 1s \rwait %f\n" % (number + 1, wait)
                    for number, wait in enumerate(waits))
    os.write(writer, text + b"\n")
    os.close(writer)

    def write(text):  # the line between two reports sets the clock
        if text:
            clock[0] = began + float(text.split()[1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiling, "PERIOD", period)
        compiling.relay(reader, write)
    os.close(reader)


def test_log_lines_now_and_then(clock, capsys):
    """Without a terminal; at one second per operator, seconds left = operators left."""
    reports_of(clock, 10.0, [float(second) for second in range(36)])
    assert capsys.readouterr() == ("compiling operators: 11/50 operator, 39 s left\n"
                                   "compiling operators: 21/50 operator, 29 s left\n"
                                   "compiling operators: 31/50 operator, 19 s left\n", "")
    reports_of(clock, 3.0, [0.0, 2.9, 3.0, 5.9, 8.9, 9.0])
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in said] == ["3/50", "5/50"]
    reports_of(clock, 10.0, [0.0, 9.9])
    assert capsys.readouterr() == ("", "")


@contextmanager
def terminal():
    """Makes stderr a terminal; yields a function that returns the output since its last call."""
    master, slave = pty.openpty()
    with open(slave, "w") as screen, pytest.MonkeyPatch.context() as patch:
        def shown() -> str:
            print("all", end="", file=screen, flush=True)
            text = b""
            while not text.endswith(b"all"):
                text += os.read(master, 1 << 16)
            return text[:-len(b"all")].decode()

        patch.setattr(sys, "stderr", screen)
        yield shown
    os.close(master)


def test_a_bar_on_a_terminal(capsys):
    with terminal() as shown:
        assert relayed(b"before\n", REPORTS[:60], REPORTS[60:], b"after\n") == [
            b"before\n", b"after\n", b""]
        text = shown()
    assert "compiling operators" in text and "3/4" in text and "Compiling" not in text
    assert text.endswith("\n")  # the bar has ended; later output starts on a new line
    assert capsys.readouterr().out == ""


def test_jittors_own_files_after_a_while(clock, capsys, monkeypatch):
    """A start that only checks its files prints nothing; a longer one a line per period."""
    monkeypatch.setattr(compiling, "PERIOD", 10.0)
    quick = compiling.CoreProgress("compiling", 143)
    for index in range(143):
        clock[0] += compiling.CoreProgress.DELAY / 150
        quick.update(index)
    assert capsys.readouterr() == ("", "")
    slow = compiling.CoreProgress("compiling", 143)
    for index in range(31):
        clock[0] += 1
        slow.update(index)
    said = capsys.readouterr().out.splitlines()
    assert [re.match(r"compiling Jittor: (\d+)/143 file, (\d+) s left", line).groups()
            for line in said] == [("13", "130"), ("23", "120")]


def test_jittors_own_files_on_a_terminal(clock):
    with terminal() as shown:
        bar = compiling.CoreProgress("compiling", 3)
        clock[0] += compiling.CoreProgress.DELAY
        bar.update(0)
        assert shown() == ""
        clock[0] += 0.1
        bar.update(1)
        bar.update(2)
        text = shown()
    assert "compiling Jittor" in text and "3/3" in text and text.endswith("\n")


def square_or_die(number: int) -> int:
    if number < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.01)
    return number ** 2


@pytest.mark.parametrize("numbers", [[-1], [3, -1, 4], [*range(20), -1, -1, -1]])
def test_a_compiler_process_that_is_killed_ends_the_wait(numbers):
    with compiling.CompilerPool(3) as pool:
        assert sorted(pool.imap_unordered(square_or_die, range(9))) == [n ** 2 for n in range(9)]
        with pytest.raises(InputError, match="was killed.*start again"):
            list(pool.imap_unordered(square_or_die, numbers))


def test_core_progress_fits_jittors_calls():
    folder = Path(find_spec("jittor_utils").submodule_search_locations[0])
    source = (folder / "__init__.py").read_text()
    for call in ("n = len(cmds)", "dp = DelayProgress(msg, n)", "dp.update(i)"):
        assert call in source


# With Jittor itself

PROGRAM = """
import os, sys
sys.path.insert(0, sys.argv[1])
from runtime import backend
backend.start("cpu")
import jittor as jt

first, second = (jt.code((2,), "float32", [], cpu_header=f"// {sys.argv[2]} {i}\\n"
                         "#include <iostream>\\n#include <unistd.h>", cpu_src=f'''
    std::cerr << "\\\\nCompiling Operators({i}/2) used: 2.1s eta:  26s \\\\r";
    std::cerr << std::endl << "said by {i}" << std::endl;
    @out(0) = @out(1) = {i};''') for i in (1, 2))
jt.sync_all()
print((first + second).numpy().tolist(), flush=True)
"""


def start(program: str, **options):
    environment = {name: value for name, value in os.environ.items()
                   if name not in ("nvcc_path", "conv_opt", "log_silent", "use_mkl")}
    return subprocess.Popen([sys.executable, "-c", program, ROOT / "src", uuid.uuid4().hex],
                            env=environment, **options)


def children(process: int) -> dict[int, str]:
    """The command lines of a process's children."""
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as stat, open(f"/proc/{name}/cmdline") as command:
                if int(stat.read().rpartition(")")[2].split()[1]) == process:
                    found[int(name)] = command.read().replace("\0", " ")
        except OSError:  # the process has ended
            pass
    return found


def ended(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.slow
def test_operators_that_were_never_compiled(jittor):
    master, slave = pty.openpty()
    process = start(PROGRAM, stdout=subprocess.PIPE, stderr=slave, text=True)
    os.close(slave)
    shown = b""
    try:
        while chunk := os.read(master, 1 << 16):
            shown += chunk
    except OSError:  # all writers, also the relay, have closed the terminal
        pass
    os.close(master)
    said, _ = process.communicate()
    assert process.returncode == 0, shown.decode()
    assert said.splitlines()[-1] == "[3.0, 3.0]"
    shown = shown.decode()
    assert "Compiling Operators" not in shown
    assert "compiling operators" in shown and "1/2" in shown and "2/2" in shown
    assert shown.index("said by 1") < shown.index("said by 2")


WAITING = PROGRAM + """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
print("waiting", flush=True)
time.sleep(100)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_relay_is_left_behind(jittor, number):
    """Ctrl-C does not reach the relay, but the relay must end soon after the main process."""
    process = start(WAITING, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                    start_new_session=True)
    for line in process.stdout:
        if line == "waiting\n":
            break
    relay, = (child for child, command in children(process.pid).items()
              if "compiling.py" in command)
    os.killpg(process.pid, number)
    try:
        _, said = process.communicate(timeout=20)  # returns when all processes have closed stderr
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == -number
    assert "said by 2" in said and "Compiling Operators" not in said
    if number == signal.SIGINT:
        assert said.rstrip().endswith("KeyboardInterrupt")
    deadline = time.monotonic() + 20
    while not ended(relay) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert ended(relay)
    assert (compiling.CRASH in said) == (number == signal.SIGKILL)


CRASHING = PROGRAM + """
jt.code((1,), "int32", [], cpu_header=f"// {sys.argv[2]}\\n#include <cstring>",
        cpu_src="memset((void*)1, 0, 1000000); @out(0) = 1;").sync()
"""


@pytest.mark.slow
def test_a_segmentation_fault_ends_the_process_with_a_line(jittor):
    """Jittor's own handler can hang, with the lock that all its processes wait for."""
    process = start(CRASHING, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    _, said = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGSEGV
    assert said.endswith(f"said by 2\nerror: process 0 of 1 {compiling.CRASH}\n")


BROKEN = """
import sys
sys.path.insert(0, sys.argv[1])
from runtime import backend, script

def main():
    backend.start("cpu")
    import jittor as jt
    results = [jt.code((1,), "int32", [], cpu_src=f"no_such_name{i}();")
               for i in range(int(sys.argv[2]))]
    jt.sync(results)

script.run(main)
"""


@pytest.mark.parametrize("operators", [1, 3])
def test_an_operator_that_is_not_compiled(jittor, operators):
    process = subprocess.run([sys.executable, "-c", BROKEN, ROOT / "src", str(operators)],
                             capture_output=True, text=True)
    *said, last = process.stderr.splitlines()
    assert process.returncode == 1
    assert any("no_such_name" in line for line in said)
    assert "RuntimeError" not in process.stderr  # that of Jittor; its helper has a traceback, too
    assert re.fullmatch(r"error: Jittor cannot compile an operator, .*g\+\+ works .* room.*", last)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["import", "operators"])
def test_who_waits_for_another_process_says_so(jittor, kind):
    import jittor_utils

    process, said = None, ""
    with open(jittor_utils.lock.lock_path, "r+") as lock:
        (fcntl.flock if kind == "import" else fcntl.lockf)(lock, fcntl.LOCK_EX)
        process = start(PROGRAM, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        while compiling.WAITING not in said:
            line = process.stdout.readline()
            assert line, said
            said += line
        assert process.poll() is None
    rest, _ = process.communicate(timeout=100)
    assert process.returncode == 0 and rest.endswith("[3.0, 3.0]\n")
    assert said.count(compiling.WAITING) == 1 and compiling.WAITING not in rest


def test_unfinished_outputs_are_compiled_again(tmp_path):
    for name, output, key in (("done.so", 5, 6), ("at_once.o", 6, 6), ("killed.so", 7, 6)):
        for suffix, when in (("", output), (".key", key)):
            path = tmp_path / "obj_files" / f"{name}{suffix}"
            path.parent.mkdir(exist_ok=True)
            path.touch()
            os.utime(path, (when, when))
    (tmp_path / "alone.key").touch()
    compiling.discard_unfinished(tmp_path)
    assert sorted(path.stem for path in tmp_path.rglob("*.key")) == ["alone", "at_once.o",
                                                                          "done.so"]


def test_an_output_that_another_process_replaces_meanwhile(tmp_path, monkeypatch):
    """A process that compiles operators does so while another one starts."""
    output, key = tmp_path / "op.so", tmp_path / "op.so.key"
    output.touch()
    key.touch()

    def stat(path, original=Path.stat, **options):
        status = original(path, **options)
        if path.suffix in (".so", ".key"):  # as another process does before its linker writes
            output.unlink(missing_ok=True)
            key.unlink(missing_ok=True)
        return status

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", stat)
        compiling.discard_unfinished(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("after", [1, 10, 30])
def test_ctrl_c_while_jittor_compiles_itself(jittor, tmp_path, after):
    """On a new cache; a terminal sends the signal to all processes of the group."""
    process = subprocess.Popen(
        [sys.executable, "-c", "import signal, sys; sys.path.insert(0, sys.argv[1])\n"
         "from runtime import backend, script\n"
         "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
         "script.run(lambda: backend.start('cpu'))", ROOT / "src"],
        env={**os.environ, "JITTOR_HOME": str(tmp_path), "HOME": str(tmp_path)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    time.sleep(after)
    os.killpg(process.pid, signal.SIGINT)
    try:
        _, said = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130, said
    assert said == "interrupted\n"


def test_no_product_is_tuned(jittor):
    """Jittor's tuner of products is not safe with several compiler threads, see ops/matmul.py."""
    import ops

    x, w = (jittor.array(np.ones((3, 3), np.float32)) for _ in range(2))
    y = ops.matmul(ops.plain_linear(x, w), w, transpose_b=True) + ops.linear(x, w)
    jittor.sync([y, *jittor.grad(y.sum(), [x, w])])
    loaded = {line.split()[-1] for line in open("/proc/self/maps") if "/jit/" in line}
    sources = [Path(name).with_suffix(".cc").read_text() for name in loaded if ".so" in name]
    assert sources and not any("relay_groups" in source for source in sources)
