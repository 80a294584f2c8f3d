"""setup.sh on machines with missing programs, simulated by stubs, and scripts that source it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time

import pytest

# The tools that setup.sh may use; the PATH in a test has only these and stubs.
TOOLS = ("bash", "cat", "cp", "dirname", "env", "id", "mkdir", "mktemp", "rm", "sed", "sha256sum",
         "tail")

# Runs Python, except for pip and venv: these calls are only logged, and venv copies this stub.
PYTHON = """#!/usr/bin/env bash
case "$*" in
    "-m pip install"*) echo "pip $*" >> "$CALLS"; [[ -z "${PIP_FAILS:-}" ]] || exit 1 ;;
    "-m pip"*) ;;
    "-m venv"*)
        echo "venv $0" >> "$CALLS"
        mkdir -p "${!#}/bin"
        rm -f "${!#}/bin/python"
        cp "$0" "${!#}/bin/python" ;;
    -) if [[ -n "${LACKS:-}" ]]; then echo "$LACKS"; else exec "$REAL_PYTHON" -; fi ;;
    *) exec "$REAL_PYTHON" "$@" ;;
esac
"""


class Machine:
    """A copy of setup.sh with a PATH of stubs, from which programs can be removed."""

    def __init__(self, root, folder):
        self.folder, self.bin, self.repository = folder, folder / "bin", folder / "repository"
        self.calls = folder / "calls"
        self.calls.touch()
        self.bin.mkdir()
        self.repository.mkdir()
        shutil.copy(root / "setup.sh", self.repository)
        (self.repository / "requirement.txt").write_text("numpy==1.26.4\n")
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.install("g++", "echo 12")
        self.install("java", "echo 'openjdk version \"17.0.15\" 2025-04-15' >&2")
        self.own_version = "%d.%d" % sys.version_info[:2]
        self.install(f"python{self.own_version}", PYTHON)

    def install(self, name, script):
        file = self.bin / name
        file.write_text(script if script.startswith("#!") else f"#!/usr/bin/env bash\n{script}\n")
        file.chmod(0o755)

    def remove(self, name):
        (self.bin / name).unlink()

    def environment(self, name):
        """Makes an environment with the layout that venv and conda use."""
        folder = self.folder / name
        (folder / "bin").mkdir(parents=True)
        (folder / "bin" / "python").write_text(PYTHON)
        (folder / "bin" / "python").chmod(0o755)
        return folder

    def start(self, **variables):
        return subprocess.run(
            ["bash", "-c", 'set -euo pipefail; source ./setup.sh; command -v python'],
            cwd=self.repository, capture_output=True, text=True, timeout=60,
            env={"PATH": str(self.bin), "HOME": str(self.folder), "CALLS": str(self.calls),
                 "REAL_PYTHON": sys.executable, **{k: str(v) for k, v in variables.items()}})

    def noted(self):
        return [line.split()[0] for line in self.calls.read_text().splitlines()]


@pytest.fixture
def machine(root, tmp_path):
    return Machine(root, tmp_path)


def assert_one_line_error(result, *words):
    assert result.returncode == 1, result.stdout + result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and result.stderr.splitlines()[-1] == errors[0], result.stderr
    for word in words:
        assert word in errors[0]


def test_first_start_makes_an_environment_and_the_second_does_nothing(machine):
    first = machine.start()
    assert first.returncode == 0, first.stderr
    assert first.stdout.strip() == str(machine.repository / ".venv/bin/python")
    assert machine.noted() == ["venv", "pip"]
    assert "-r " + str(machine.repository / "requirement.txt") in machine.calls.read_text()

    began = time.monotonic()
    second = machine.start()
    assert time.monotonic() - began < 2
    assert (second.returncode, second.stdout, second.stderr) == (0, first.stdout, "")
    assert machine.noted() == ["venv", "pip"]


def test_changed_requirements_are_installed(machine):
    machine.start()
    (machine.repository / "requirement.txt").write_text("numpy==1.26.3\n")
    machine.start()
    assert machine.noted() == ["venv", "pip", "pip"]


def test_failing_pip_is_told_and_tried_again(machine):
    assert_one_line_error(machine.start(PIP_FAILS=1), "requirement.txt", "network")
    assert machine.start().returncode == 0
    assert machine.noted() == ["venv", "pip", "pip"]


def test_an_environment_whose_python_is_gone_is_made_anew(machine):
    machine.start()
    python = machine.repository / ".venv/bin/python"
    python.unlink()
    python.symlink_to("/nowhere/python")
    assert machine.start().returncode == 0
    assert machine.noted()[:3] == ["venv", "pip", "venv"]


def test_an_active_environment_is_used(machine):
    venv, conda = machine.environment("active"), machine.environment("conda/envs/mine")
    for variables, expected in [
            ({"VIRTUAL_ENV": venv}, venv),
            ({"CONDA_PREFIX": conda, "CONDA_DEFAULT_ENV": "mine"}, conda),
            ({"VIRTUAL_ENV": venv, "CONDA_PREFIX": conda}, venv)]:
        result = machine.start(**variables)
        assert result.stdout.strip() == str(expected / "bin/python"), result.stderr
    assert machine.noted() == ["pip", "pip"]
    assert not (machine.repository / ".venv").exists()


def test_condas_own_and_vanished_environments_are_not_used(machine):
    base = machine.environment("conda")
    result = machine.start(CONDA_PREFIX=base, CONDA_DEFAULT_ENV="base", VIRTUAL_ENV="/nowhere")
    assert result.stdout.strip() == str(machine.repository / ".venv/bin/python"), result.stderr


def test_a_shim_without_its_python_is_passed_over(machine):
    for version in ("3.11", "3.10", "3.9", "3.12"):
        if version != machine.own_version:
            machine.install(f"python{version}", "echo 'version not switched on' >&2; exit 127")
    result = machine.start()
    assert result.returncode == 0, result.stderr
    assert f"venv {machine.bin}/python{machine.own_version}" in machine.calls.read_text()


def test_what_is_missing_is_named_to_a_user(machine):
    machine.install("id", "echo 1000")
    machine.remove("g++")
    machine.remove("java")
    assert_one_line_error(machine.start(), "apt-get install g++ default-jre-headless")
    machine.remove(f"python{machine.own_version}")
    assert_one_line_error(machine.start(), "python3 python3-dev python3-venv")
    assert machine.noted() == []


@pytest.mark.parametrize("part", ["venv", "dev"])
def test_parts_of_python_that_debian_packs_apart(machine, part):
    machine.install("id", "echo 1000")
    assert_one_line_error(machine.start(LACKS=part), f"python{machine.own_version}-{part}")


def test_root_on_a_machine_without_apt_is_told(machine):
    machine.install("id", "echo 0")
    machine.remove("java")
    assert_one_line_error(machine.start(), "default-jre-headless")


def test_what_is_missing_is_installed_for_root(machine):
    machine.install("id", "echo 0")
    python = f"python{machine.own_version}"
    (machine.bin / python).rename(machine.folder / "python3")
    (machine.bin / "g++").rename(machine.folder / "g++")
    machine.install("apt-get", f"""echo "apt $*" >> "$CALLS"
        [[ $1 == update ]] || cp '{machine.folder}/python3' '{machine.folder}/g++' '{machine.bin}'
    """)
    result = machine.start()
    assert result.returncode == 0, result.stderr
    assert machine.noted() == ["apt", "apt", "venv", "pip"]
    assert ("install -y --no-install-recommends g++ python3 python3-dev python3-venv\n"
            in machine.calls.read_text())


def test_mpi_is_asked_for_by_several_processes_only(machine):
    machine.install("id", "echo 1000")
    assert machine.start(NPROC=1).returncode == 0
    assert_one_line_error(machine.start(NPROC=2), "apt-get install openmpi-bin libopenmpi-dev")
    machine.install("mpirun", "true")
    assert_one_line_error(machine.start(NPROC=2), "openmpi-bin libopenmpi-dev")
    machine.install("mpicc", "true")
    result = machine.start(NPROC=2)
    assert result.returncode == 0 and result.stderr == ""


def test_failing_apt_is_told(machine):
    machine.install("id", "echo 0")
    machine.remove("java")
    machine.install("apt-get", "echo 'E: no space'; exit 100")
    result = machine.start()
    assert "E: no space" in result.stderr
    assert_one_line_error(result, "apt-get could not install default-jre-headless")


def test_untried_versions_get_a_warning_the_first_time(machine):
    machine.install("g++", "echo 99")
    machine.install("java", "echo 'java version \"1.8.0_292\"' >&2")
    result = machine.start()
    assert result.returncode == 0
    assert "warning: g++ 99 is untried" in result.stderr
    assert "warning: Java 1 is untried" in result.stderr
    assert machine.start().stderr == ""


@pytest.mark.parametrize("name", ["requirement.txt", "requirement-test.txt"])
def test_requirements_are_exact(root, name):
    for line in (root / name).read_text().splitlines():
        assert re.match(r"(#|-r requirement\.txt$|[\w.-]+==[\w.]+( ; .+)?$|$)", line), line


def test_create_datasets_names_the_missing_file(root, tmp_path):
    (tmp_path / "train.txt").write_text("name[A]||A.\n")
    result = subprocess.run(["bash", root / "create_datasets.sh"], capture_output=True, text=True,
                            env={**os.environ, "DATA_DIR": str(tmp_path)}, timeout=60)
    assert result.returncode == 1
    assert result.stderr == (f"error: {tmp_path}/test.txt: no such file; "
                             "run: bash data/download_data.sh\n")


def test_create_datasets(root, shared, vocab, tmp_path):
    for name, source in [("train", "train_7570"), ("valid", "valid"), ("test", "test")]:
        shutil.copy(shared / "data/e2e" / f"{source}.txt", tmp_path / f"{name}.txt")
    result = subprocess.run(["bash", root / "create_datasets.sh"], capture_output=True, text=True,
                            env={**os.environ, "DATA_DIR": str(tmp_path),
                                 "VIRTUAL_ENV": sys.prefix}, timeout=300)
    assert result.returncode == 0, result.stderr
    said = [line for line in result.stdout.splitlines() if line.endswith(("...", "!"))]
    assert said == ["creating e2e datasets...", "train...", "test...", "valid...",
                    "script complete!"]
    for name in ("test", "valid"):
        for kind in ("_formatted.jsonl", ".jsonl"):
            expected = (shared / "expected/e2e" / f"{name}{kind}").read_bytes()
            assert (tmp_path / f"{name}{kind}").read_bytes() == expected
    assert len((tmp_path / "train.jsonl").read_text().splitlines()) == 75
