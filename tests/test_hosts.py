"""Runs of two processes on two hosts, which are two sets of namespaces of this machine.

Each host has its own network, joined by a virtual cable, its own name, processes, shared memory,
temporary folder and Jittor cache, and an ssh daemon; the other file systems are shared. They end
with the test, even if it is killed.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import count, islice
from pathlib import Path

import pytest
from conftest import ROOT
from test_processes import FLAGS, rows, write

NAMESPACES = ["--net", "--uts", "--ipc", "--pid", "--mount", "--fork", "--kill-child",
              "--mount-proc"]
SSHD = shutil.which("sshd", path=os.environ["PATH"] + ":/usr/sbin")


def obstacle() -> str:
    """What of the machine is missing for two hosts, or ""."""
    for program, package in (("mpirun", "openmpi-bin"), ("mpicc", "libopenmpi-dev"),
                             ("ip", "iproute2"), ("unshare", "util-linux")):
        if not shutil.which(program):
            return f"no {program}; apt-get install {package}"
    if not SSHD:
        return "no sshd; apt-get install openssh-server"
    if os.getuid() or subprocess.run(["unshare", *NAMESPACES, "true"],
                                     stderr=subprocess.DEVNULL).returncode:
        return "no root that may make namespaces"
    return ""


pytestmark = [pytest.mark.nightly, pytest.mark.skipif(bool(obstacle()), reason=obstacle())]

# What a host does first: $1 its name, $2 its folder, $3 the folder of Jittor's caches, $4 its
# address, $5 sshd. The cable is laid before it reads a line.
BEGIN = """
set -e
hostname "$1"
mount -t tmpfs none /dev/shm
mount -t tmpfs none /run
mkdir /run/sshd "$2/tmp" "$2/upper" "$2/inner"
mount -t overlay -o "lowerdir=$3,upperdir=$2/upper,workdir=$2/inner" none "$3"
mount --bind "$2/../hosts" /etc/hosts
mount --bind "$2/../ssh_config" /etc/ssh/ssh_config
ip link set lo up
echo ready
read -r _
ip address add "$4/24" dev cable
ip link set cable up
exec "$5" -D -e -f "$2/sshd_config"
"""


class Host:
    """A host of the test; its processes end with it."""

    def __init__(self, name: str, address: str, folder: Path, home: str):
        self.name, self.folder = name, folder / name
        self.folder.mkdir()
        (self.folder / "sshd_config").write_text(
            f"HostKey {folder}/key\nAuthorizedKeysFile {folder}/key.pub\nStrictModes no\n"
            f"PermitRootLogin yes\nPidFile none\nSetEnv TMPDIR={self.folder}/tmp "
            f"JITTOR_HOME={home}\n")
        with open(self.folder / "log", "w") as log:
            self.process = subprocess.Popen(
                ["unshare", *NAMESPACES, "bash", "-c", BEGIN, "begin", name, self.folder,
                 Path(home, ".cache/jittor"), address, SSHD],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self.process.stdout.readline() == "ready\n", (self.folder / "log").read_text()
        self.init = Path("/proc", str(self.process.pid), "task", str(self.process.pid),
                         "children").read_text().strip()

    def command(self, *words) -> list[str]:
        """The command that runs ``words`` on the host."""
        return ["nsenter", "-t", self.init, "--net", "--uts", "--ipc", "--pid", "--mount",
                f"--wd={ROOT}", "env", f"TMPDIR={self.folder}/tmp", *map(str, words)]

    def call(self, *words) -> str:
        return subprocess.run(self.command(*words), check=True, capture_output=True,
                              text=True).stdout

    def programs(self) -> list[str]:
        """The command lines of what runs there, but for sshd's own."""
        return [line for line in self.call("ps", "-eo", "args=").splitlines()
                if not re.match("sshd: |ps -eo ", line)]

    def end(self) -> None:
        os.kill(int(self.init), signal.SIGKILL)
        self.process.communicate()


def names() -> list[str]:
    """Two host names for which Jittor's cache, whose path depends on the name, stays the same."""
    def part(name: str) -> str:
        return hashlib.md5((platform.platform() + name).encode()).hexdigest()[:2]

    return list(islice((f"node{n}" for n in count(1) if part(f"node{n}") == part(platform.node())),
                       2))


@pytest.fixture(scope="module")
def hosts(jittor, tmp_path_factory):
    import jittor_utils

    folder = tmp_path_factory.mktemp("hosts")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key"],
                   check=True)
    addresses = dict(zip(names(), ("10.9.8.1", "10.9.8.2")))
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(
        f"{address} {name}\n" for name, address in addresses.items()))
    (folder / "ssh_config").write_text(
        f"IdentityFile {folder}/key\nUserKnownHostsFile /dev/null\nStrictHostKeyChecking no\n"
        "LogLevel ERROR\n")
    (folder / "names").write_text("".join(f"{name} slots=1\n" for name in addresses))
    made = [Host(name, address, folder, jittor_utils.home()) for name, address in addresses.items()]
    subprocess.run(["ip", "link", "add", "cable", "netns", made[0].init, "type", "veth",
                    "peer", "name", "cable", "netns", made[1].init], check=True)
    for host in made:
        host.process.stdin.write("go\n")
        host.process.stdin.flush()
    yield made
    for host in made:
        host.end()


# work.sh's own call of mpirun; $1 is the flags that docs/running.md names. The hosts share cores.
LAUNCH = """
export PATH="$(dirname "$2"):$PATH" NPROC=2 MPI_FLAGS="$1" OMPI_MCA_mpi_yield_when_idle=1
source <(sed -n '/^launch()/,/^}/p' work.sh)
launch "${@:3}"
"""


def start(host: Host | None, folder: Path, *flags) -> subprocess.Popen:
    """Starts two processes of a script as work.sh does, on the two hosts or on this machine."""
    mpi_flags = f"--hostfile {folder}/names -x PATH" if host else "--quiet"
    words = ["bash", "-euc", LAUNCH, "work.sh", mpi_flags, sys.executable, *map(str, flags)]
    return subprocess.Popen(host.command(*words) if host else words, cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def finish(process: subprocess.Popen, seconds: float = 400) -> tuple[int, str, str]:
    """Waits for the process; returns its exit code, stdout and stderr."""
    try:
        said = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # mpirun, too
    return process.returncode, *said


def flags_of_training(folder: Path, work_dir: str, *more):
    return ["src/gpt2_ft.py", "--train_data", folder / "train.jsonl", "--valid_data",
            folder / "valid.jsonl", *FLAGS, "--train_batch_size", 2, "--valid_batch_size", 2,
            "--max_epoch", 20, "--work_dir", folder / work_dir, *more]


def flags_of_search(folder: Path, name: str):
    return ["src/gpt2_beam.py", "--data", folder / "valid.jsonl", "--seq_len", 12, "--eval_len",
            4, "--model_card", "gpt2.nano", "--init_checkpoint", folder / "one/model.80.pt",
            "--lora_dim", 2, "--lora_alpha", 8, "--beam", 3, "--batch_size", 2, "--work_dir",
            folder, "--output_file", name, "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(hosts):
    """The folder of the data, with the work dir "one" of two processes on one host."""
    folder = hosts[0].folder.parent
    write(folder / "train.jsonl", 16)
    write(folder / "valid.jsonl", 8)
    assert finish(start(None, folder, *flags_of_training(folder, "one")))[::2] == (0, "")
    return folder


def assert_same_results(folder: Path, work_dir: str) -> None:
    """Asserts that the files of the work dir are those of "one", but for times."""
    ours, theirs = folder / work_dir, folder / "one"
    assert rows(ours) == rows(theirs)
    assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}
    for path in ours.glob("model.*.pt"):
        assert path.read_bytes() == (theirs / path.name).read_bytes()


def assert_nothing_runs(hosts) -> None:
    deadline = time.monotonic() + 60
    while any(host.programs() for host in hosts) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert [host.programs() for host in hosts] == [[], []]


def errors_of_ours(errors: str) -> list[str]:
    """The lines that are not mpirun's."""
    return [line for line in errors.splitlines() if "error: " in line]


def test_two_hosts_are_one(hosts, folder):
    code, said, errors = finish(start(hosts[0], folder, *flags_of_training(folder, "two")))
    assert (code, errors) == (0, ""), said
    assert_same_results(folder, "two")
    for host, name in ((None, "one.jsonl"), (hosts[0], "two.jsonl")):
        code, said, errors = finish(start(host, folder, *flags_of_search(folder, name)))
        assert (code, errors) == (0, ""), said
    assert (folder / "two.jsonl").read_bytes() == (folder / "one.jsonl").read_bytes()
    assert_nothing_runs(hosts)


def test_a_cable_that_is_cut_ends_the_run(hosts, folder):
    """Within a minute and with a line; the run can be resumed, and has the same results."""
    process = start(hosts[0], folder, *flags_of_training(folder, "cut"))
    for line in process.stdout:
        if re.match(r"\| epoch +\d+ step +20 ", line):
            break
    hosts[1].call("ip", "link", "set", "cable", "down")
    code, _, errors = finish(process, 60)
    assert code != 0 and "lost communication" in errors and hosts[1].name in errors
    assert not errors_of_ours(errors) and list((folder / "cut").glob("resume.*.pt"))
    assert_nothing_runs(hosts)
    hosts[1].call("ip", "link", "set", "cable", "up")
    # The system asks for a lost neighbour's address again only after a while.
    hosts[0].call("ssh", "-o", "ConnectionAttempts=60", hosts[1].name, "true")
    code, said, errors = finish(start(hosts[0], folder,
                                      *flags_of_training(folder, "cut", "--resume")))
    assert (code, errors) == (0, "") and "resuming after step" in said
    assert_same_results(folder, "cut")


def test_a_host_without_the_data(hosts, folder):
    """The line names the host, and no other line blames the memory."""
    (folder / "there").mkdir()
    (folder / "there/train.jsonl").write_bytes((folder / "train.jsonl").read_bytes())
    hosts[1].call("mount", "-t", "tmpfs", "none", folder / "there")
    flags = flags_of_training(folder, "none", "--train_data", folder / "there/train.jsonl")
    code, _, errors = finish(start(hosts[0], folder, *flags), 100)
    assert code == 1
    line, = errors_of_ours(errors)
    assert line.startswith(f"error: {hosts[1].name}: {folder}/there/train.jsonl: no such file; ")
    assert not (folder / "none").exists()
    assert_nothing_runs(hosts)


def test_a_host_with_other_data(hosts, folder):
    write(folder / "other.jsonl", 12)
    hosts[1].call("mount", "--bind", folder / "other.jsonl", folder / "train.jsonl")
    code, _, errors = finish(start(hosts[0], folder, *flags_of_training(folder, "none")), 100)
    hosts[1].call("umount", folder / "train.jsonl")
    assert code == 1
    assert errors_of_ours(errors)[0] == (
        f"error: {hosts[0].name}: --train_data: process 1 has another value or file than process "
        "0; start all with the same flags and files")
    assert not (folder / "none").exists()
    assert_nothing_runs(hosts)


def test_a_host_without_the_repository(hosts, folder):
    hosts[1].call("mount", "-t", "tmpfs", "none", ROOT / "src")
    code, _, errors = finish(start(hosts[0], folder, *flags_of_training(folder, "none")), 100)
    hosts[1].call("umount", ROOT / "src")
    assert code == 2 and f"can't open file '{ROOT}/src/gpt2_ft.py'" in errors
    assert not errors_of_ours(errors)
    assert_nothing_runs(hosts)


def test_a_process_that_is_killed_on_the_second_host(hosts, folder):
    process = start(hosts[0], folder, *flags_of_training(folder, "killed"))
    for line in process.stdout:
        if line.startswith("| epoch"):
            break
    hosts[1].call("pkill", "-KILL", "-f", "^python.*gpt2_ft.py")
    code, _, errors = finish(process, 60)
    assert code != 0 and not errors_of_ours(errors)
    assert re.search(f"process rank 1 with PID \\d+ on node {hosts[1].name} exited on signal 9",
                     errors)
    assert_nothing_runs(hosts)
