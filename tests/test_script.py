"""How scripts end: exit codes, messages and signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from runtime.errors import Interrupted
from runtime.script import StopRequest

IMPORTS = "from runtime import script\nfrom runtime.errors import InputError, Interrupted\n"


def script(root, body, **options):
    """Runs ``body`` as a script's main; returns the finished process."""
    lines = "".join(f"    {line}\n" for line in body)
    code = f"{IMPORTS}def main():\n{lines}script.run(main)"
    return subprocess.run([sys.executable, "-c", code], capture_output="stdout" not in options,
                          text=True, env={**os.environ, "PYTHONPATH": str(root / "src")}, **options)


@pytest.mark.parametrize("body, code, said", [
    (["raise InputError('a.txt:3: bad; mend it')"], 1, "error: a.txt:3: bad; mend it\n"),
    (["raise MemoryError"], 1, "error: out of memory; take smaller batches or a smaller model\n"),
    (["raise KeyboardInterrupt"], 130, "interrupted\n"),
    (["raise Interrupted('stopped')"], 130, "stopped\n"),
    (["raise BrokenPipeError"], 141, ""),
    (["open('/none/such')"], 1, "error: /none/such: No such file or directory; check free space "
                                "and permissions\n"),
    (["print('well')"], 0, ""),
])
def test_how_a_script_ends(root, body, code, said):
    done = script(root, body)
    assert (done.returncode, done.stderr) == (code, said)


def test_standard_output_on_a_full_disk(root):
    with open("/dev/full", "w") as full:
        done = script(root, ["print('x' * 100)"], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr == ("error: standard output: No space left on device; check free space "
                           "and permissions\n")


def test_what_is_nobodys_mistake_keeps_its_traceback(root):
    done = script(root, ["raise ZeroDivisionError"])
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_stop_request():
    said, before = [], [signal.getsignal(n) for n in StopRequest.SIGNALS]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopRequest(said.append) as stop:
        signal.raise_signal(signal.SIGHUP)  # ignored, as under nohup
        assert not stop.requested and not said
        signal.raise_signal(signal.SIGINT)
        assert stop.requested and len(said) == 1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with pytest.raises(Interrupted):  # as if Ctrl-C had killed Jittor's compiler processes
        with StopRequest(said.append):
            signal.raise_signal(signal.SIGINT)
            raise RuntimeError
    with pytest.raises(RuntimeError):
        with StopRequest(said.append):
            raise RuntimeError
    for number, handler in zip(StopRequest.SIGNALS, before):
        signal.signal(number, handler)


def test_closed_standard_streams(tmp_path):
    """The next file that is opened must not take the number of a closed stream."""
    code = IMPORTS + ("def main():\n"
                      "    file = open(sys.argv[1], 'wb')\n"
                      "    assert file.fileno() > 2\n"
                      "    print('out'); print('err', file=sys.stderr); sys.stdin.read()\n"
                      "    file.write(b'whole')\n"
                      "script.run(main)\n")
    for closed in ("<&-", ">&-", "2>&-", "<&- >&- 2>&-"):
        done = subprocess.run(["sh", "-c", f'"$0" -c "$1" "$2" {closed} < /dev/null'
                               if "<" not in closed else f'"$0" -c "$1" "$2" {closed}',
                               sys.executable, "import sys\n" + code, tmp_path / "file"],
                              env={**os.environ, "PYTHONPATH": str(ROOT / "src")})
        assert done.returncode == 0
        assert (tmp_path / "file").read_bytes() == b"whole"
