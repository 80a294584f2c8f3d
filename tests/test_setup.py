"""setup.sh on machines with missing programs, simulated by stubs, and scripts that source it."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import pytest

# The tools that setup.sh may use; the PATH in a test has only these and stubs.
TOOLS = ("bash", "cat", "cp", "dirname", "env", "flock", "id", "mkdir", "mktemp", "rm", "sed",
         "sha256sum", "tail")

# Runs Python, except for pip and venv: these calls are only logged, and venv copies this stub.
PYTHON = """#!/usr/bin/env bash
case "$*" in
    "-m pip install"*)
        echo "pip $*" >> "$CALLS"
        [[ -z "${PIP_WAITS_FOR:-}" ]] || read -r < "$PIP_WAITS_FOR"
        [[ -z "${PIP_DIES:-}" ]] || kill -KILL 0
        [[ -z "${PIP_FAILS:-}" || "$*" != *"$PIP_FAILS"* ]] || exit 1 ;;
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
        file.unlink(missing_ok=True)  # if it is a link to a program of this machine
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

    def popen(self, **variables):
        return subprocess.Popen(
            ["bash", "-c", 'set -euo pipefail; source ./setup.sh; command -v python'],
            cwd=self.repository, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={"PATH": str(self.bin), "HOME": str(self.folder), "CALLS": str(self.calls),
                 "REAL_PYTHON": sys.executable, "SETUP_CUDA": "0",
                 **{k: str(v) for k, v in variables.items()}})

    def start(self, **variables):
        process = self.popen(**variables)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

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
    assert_one_line_error(machine.start(PIP_FAILS="install"), "requirement.txt", "network")
    assert machine.start().returncode == 0
    assert machine.noted() == ["venv", "pip", "pip"]


def python_without_pip(folder):
    """(path of its Python, its site-packages) of a new virtual environment."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    site, = folder.glob("lib/python*/site-packages")
    return folder / "bin/python", site


def install_by_hand(site, name, version="1.0"):
    """Writes a package of three files to ``site`` as pip would; returns its .dist-info."""
    info = site / f"{name}-{version}.dist-info"
    files = {site / name / "__init__.py": "number = 1\n", site / name / "comma, größe": "x\n",
             info / "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
             info / "INSTALLER": "pip\n"}
    rows = []
    for file, text in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        rows.append(f'"{file.relative_to(site)}",sha256=unused,{len(text)}\n')
    rows += [f"{name}/__pycache__/compiled.cpython-311.pyc,,\n", f"{info.name}/RECORD,,\n"]
    (info / "RECORD").write_text("".join(rows), encoding="utf-8")
    return info


def test_packages_that_a_killed_pip_left_incomplete_are_installed_again(machine):
    python, site = python_without_pip(machine.folder / "real")
    old = install_by_hand(site, "from_before")
    os.utime(old, (0, 0))
    (site / "from_before/__init__.py").write_text("changed by the user\n")
    assert machine.start(PIP_DIES=1, REAL_PYTHON=python).returncode == -signal.SIGKILL
    install_by_hand(site, "whole")
    install_by_hand(site, "lacks_a_file")
    (site / "lacks_a_file/comma, größe").unlink()
    install_by_hand(site, "cut_off", "2.0+cpu")
    (site / "cut_off/__init__.py").write_text("num")
    (install_by_hand(site, "unfinished") / "INSTALLER").unlink()
    (install_by_hand(site, "lacks_record") / "RECORD").unlink()
    (install_by_hand(site, "no_record") / "RECORD").write_text("<html>\n")

    second = machine.start(REAL_PYTHON=python)
    assert second.returncode == 0, second.stderr
    for name in ("lacks_a_file", "cut_off", "unfinished", "lacks_record", "no_record"):
        assert name in second.stderr
    # What pip no longer knows it installs, over the files that are there.
    assert {info.name for info in site.glob("*.dist-info")} == {
        "from_before-1.0.dist-info", "whole-1.0.dist-info"}
    assert machine.noted() == ["venv", "pip", "pip"]
    assert machine.start(REAL_PYTHON=python).stderr == ""


def test_nothing_is_repaired_after_a_finished_set_up(machine):
    python, site = python_without_pip(machine.folder / "real")
    machine.start(REAL_PYTHON=python)
    install_by_hand(site, "cut_off")
    (site / "cut_off/__init__.py").write_text("")
    (machine.repository / "requirement.txt").write_text("numpy==1.26.3\n")
    machine.start(REAL_PYTHON=python)
    assert (site / "cut_off-1.0.dist-info").is_dir()
    assert machine.noted() == ["venv", "pip", "pip"]


# In every Python: SIGKILL to the set-up where DIES_AT is in the name of a file that is opened to
# be written, or in a command that is started.
SITECUSTOMIZE = """
import os, signal, sys
def die(event, arguments):
    if (event == "subprocess.Popen" or event == "open" and arguments[2] & os.O_ACCMODE) \\
            and os.environ["DIES_AT"] in str(arguments[:2]):
        os.killpg(0, signal.SIGKILL)
if os.environ.get("DIES_AT"):
    sys.addaudithook(die)
"""


class RealMachine(Machine):
    """A machine whose Python, venv and pip are real; pip finds the wheels of ``wheel`` only."""

    def __init__(self, root, folder):
        super().__init__(root, folder)
        base = os.path.join(sys.base_prefix, "bin", f"python{self.own_version}")
        self.install(f"python{self.own_version}",
                     f'case "$*" in -) ;; *) exec "{base}" "$@" ;; esac')  # it lacks no part
        (folder / "hooks").mkdir()
        (folder / "hooks/sitecustomize.py").write_text(SITECUSTOMIZE)
        self.required = self.repository / "requirement.txt"
        self.required.write_text("")

    def wheel(self, name):
        """Makes a wheel with a header outside site-packages, as oneDNN's, and requires it."""
        info = f"{name}-1.0.dist-info"
        files = {f"{name}/__init__.py": "number = 1\n", f"{name}/last.py": "number = 2\n",
                 f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
                 f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
                 f"{name}-1.0.data/data/include/{name}.hpp": "// header\n"}
        rows = [f"{file},,{len(text)}\n" for file, text in files.items()]
        with zipfile.ZipFile(self.folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
            for file, text in {**files, f"{info}/RECORD": "".join(rows)}.items():
                archive.writestr(file, text)
        self.required.write_text(f"{self.required.read_text()}{name}==1.0\n")

    def is_whole(self, environment, name):
        site, = environment.glob("lib/python*/site-packages")
        return (site / name / "last.py").read_text() == "number = 2\n" \
            and (environment / f"include/{name}.hpp").read_text() == "// header\n" \
            and (site / f"{name}-1.0.dist-info/INSTALLER").is_file()

    def popen(self, **variables):
        return super().popen(PYTHONPATH=self.folder / "hooks", PIP_NO_INDEX=1,
                             PIP_FIND_LINKS=self.folder, **variables)


@pytest.fixture
def real_machine(root, tmp_path):
    if not all(importlib.util.find_spec(name) for name in ("venv", "ensurepip")):
        pytest.skip("this Python makes no environments with pip")
    return RealMachine(root, tmp_path)


@pytest.mark.slow
def test_a_set_up_killed_at_any_moment_is_completed_by_the_next(real_machine):
    """Killed before pip is there, before the environment is complete, and in each part of pip."""
    environment = real_machine.repository / ".venv"
    real_machine.wheel("first")
    for moment in ("ensurepip", "activate.csh", "first/__init__.py"):
        assert real_machine.start(DIES_AT=moment).returncode == -signal.SIGKILL, moment
    done = real_machine.start()
    assert done.returncode == 0, done.stderr
    assert real_machine.is_whole(environment, "first")
    assert (environment / "bin/activate.csh").is_file()
    for number, moment in enumerate(("last.py", "METADATA", "RECORD", ".hpp", "INSTALLER")):
        name = f"package_{number}"
        real_machine.wheel(name)
        killed = real_machine.start(DIES_AT=f"{name}.hpp" if moment == ".hpp" else moment)
        assert killed.returncode == -signal.SIGKILL, moment
        done = real_machine.start()
        assert done.returncode == 0, done.stderr
        assert real_machine.is_whole(environment, name), moment
    assert real_machine.start().stderr == ""


@pytest.mark.slow
def test_a_pip_whose_installation_was_killed_is_replaced(real_machine):
    """In an environment of the user without pip, as uv makes them."""
    environment = real_machine.folder / "mine"
    import ensurepip

    _, site = python_without_pip(environment)
    real_machine.wheel("first")
    killed = real_machine.start(DIES_AT=f"pip-{ensurepip.version()}.dist-info/INSTALLER",
                                VIRTUAL_ENV=environment, SETUP_ENV="active")
    assert killed.returncode == -signal.SIGKILL
    done = real_machine.start(VIRTUAL_ENV=environment, SETUP_ENV="active")
    assert done.returncode == 0, done.stderr
    assert real_machine.is_whole(environment, "first")
    info, = site.glob("pip-*.dist-info")
    assert (info / "INSTALLER").is_file()


def test_a_second_set_up_waits_for_the_first(machine):
    gate = machine.folder / "gate"
    os.mkfifo(gate)
    first = machine.popen(PIP_WAITS_FOR=gate)
    while machine.noted() != ["venv", "pip"]:
        assert first.poll() is None, first.stderr.read()
        time.sleep(0.05)
    second = machine.popen(PIP_WAITS_FOR=gate)
    try:
        assert f"waiting for process {first.pid} on " in second.stderr.readline()
        gate.write_text("go on\n")
        assert [process.wait(timeout=60) for process in (first, second)] == [0, 0]
    finally:
        for process in (first, second):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert machine.noted() == ["venv", "pip"]


def test_an_active_environment_that_does_not_run_is_left_alone(machine):
    mine = machine.environment("mine")
    (mine / "bin/python").write_text("#!/usr/bin/env bash\nexit 1\n")
    (mine / "work.txt").touch()
    assert_one_line_error(machine.start(VIRTUAL_ENV=mine), f"{mine}/bin/python", "deactivate")
    assert (mine / "work.txt").exists() and machine.noted() == []


def test_an_environment_whose_python_is_gone_is_made_anew(machine):
    machine.start()
    python = machine.repository / ".venv/bin/python"
    python.unlink()
    python.symlink_to("/nowhere/python")
    assert machine.start().returncode == 0
    assert machine.noted()[:3] == ["venv", "pip", "venv"]


def active_environments(machine):
    """(variables, folder of the environment that they make active), for venv, conda and both."""
    venv, conda = machine.environment("active"), machine.environment("conda/envs/mine")
    return [({"VIRTUAL_ENV": venv}, venv),
            ({"CONDA_PREFIX": conda, "CONDA_DEFAULT_ENV": "mine"}, conda),
            ({"VIRTUAL_ENV": venv, "CONDA_PREFIX": conda}, venv)]


def contents(folder):
    return sorted(str(path) for path in folder.rglob("*"))


MARKED = """numpy==1.26.4
none==1 ; python_version < "3.9"
none==1 ; sys_platform == "win32" and platform_machine == "x86_64"
"""


def test_an_active_environment_with_all_packages_is_used_as_it_is(machine):
    (machine.repository / "requirement.txt").write_text(MARKED)
    for variables, expected in active_environments(machine):
        before = contents(expected)
        result = machine.start(**variables)
        assert result.stdout.strip() == str(expected / "bin/python"), result.stderr
        assert (result.returncode, result.stderr) == (0, "")
        assert contents(expected) == before
    assert machine.noted() == []
    assert not (machine.repository / ".venv").exists()


@pytest.mark.parametrize("line, extra", [
    ("numpy==1.26.3", ""), ("no-such-package==1.0", ""), ('none==1 ; python_version >= "3.9"', ""),
    ("numpy==1.26.4", "none==2.0")])
def test_an_active_environment_that_lacks_a_package_is_left_alone(machine, line, extra):
    (machine.repository / "requirement.txt").write_text(f"{line}\n")
    (machine.repository / "extra.txt").write_text(f"-r requirement.txt\n{extra}\n")
    for variables, active in active_environments(machine):
        before = contents(active)
        result = machine.start(**variables, **{"setup_extra": "extra.txt"} if extra else {})
        assert result.stdout.strip() == str(machine.repository / ".venv/bin/python")
        said, = [text for text in result.stderr.splitlines() if "SETUP_ENV=active" in text]
        assert (extra or line).split(" ")[0] in said and str(active) in said
        assert contents(active) == before


def test_the_environment_that_setup_env_names(machine):
    (machine.repository / "requirement.txt").write_text("numpy==1.26.3\n")
    for variables, active in active_environments(machine):
        result = machine.start(SETUP_ENV="active", **variables)
        assert result.stdout.strip() == str(active / "bin/python"), result.stderr
    assert machine.noted() == ["pip", "pip"]
    (machine.repository / "requirement.txt").write_text("numpy==1.26.4\n")
    result = machine.start(SETUP_ENV="own", VIRTUAL_ENV=machine.folder / "active")
    assert result.stdout.strip() == str(machine.repository / ".venv/bin/python"), result.stderr
    assert_one_line_error(machine.start(SETUP_ENV="active"), "no environment is active")
    result = machine.start(SETUP_ENV="mine")
    assert result.returncode == 2
    assert result.stderr == "error: SETUP_ENV=mine: must be auto, active or own\n"


def test_pytorch_for_the_cpu_is_installed_first(machine):
    """PyPI's has the same version and brings CUDA."""
    (machine.repository / "extra.txt").write_text(
        "-r requirement.txt\ntorch==1.9 ; python_version >= \"3.9\"\nother==1.0\n")
    result = machine.start(setup_extra="extra.txt", TORCH_INDEX="mirror")
    assert result.returncode == 0, result.stderr
    base, torch, rest = machine.calls.read_text().splitlines()[1:]
    assert "--no-deps" in torch and "--index-url mirror" in torch
    assert base.endswith("/requirement.txt") and rest.endswith("/extra.txt")

    (machine.repository / "extra.txt").write_text("-r requirement.txt\ntorch==1.8\n")
    result = machine.start(setup_extra="extra.txt", TORCH_INDEX="mirror", PIP_FAILS="mirror")
    assert result.returncode == 0
    assert "warning: no PyTorch for the CPU from mirror; set TORCH_INDEX" in result.stderr
    assert machine.noted() == ["venv"] + ["pip"] * 5


@pytest.fixture
def gpu(machine, root, driver):
    """The variables of a machine with a GPU whose CUDA toolkits, if any, cannot be used."""
    (machine.repository / "requirement-cuda.txt").write_text("cuda==13.0\n")
    (machine.repository / "src").symlink_to(root / "src")
    machine.install("g++-8", '[[ "$*" == -dump* ]] && echo 12')  # no nvcc can use it
    return {"SETUP_CUDA": "auto", "LD_LIBRARY_PATH": driver, "STAND_IN_DRIVER": "13000 89",
            "cc_path": machine.bin / "g++-8"}


def test_cuda_is_installed_where_a_gpu_needs_it(machine, gpu):
    for variables in ({"SETUP_CUDA": 0}, {"DEVICE": "cpu"}, {"LD_LIBRARY_PATH": ""},
                      {"STAND_IN_DRIVER": "12080 89"}, {"STAND_IN_DRIVER": "13000 70"}):
        result = machine.start(**{**gpu, **variables})
        assert result.returncode == 0 and "CUDA 13" not in result.stderr, result.stderr
    assert machine.noted() == ["venv", "pip"]
    result = machine.start(**gpu)
    assert result.returncode == 0, result.stderr
    said, = [line for line in result.stderr.splitlines() if "SETUP_CUDA=0" in line]
    assert said.startswith("setup: a GPU, but ")
    assert machine.calls.read_text().endswith("-r %s/requirement-cuda.txt\n" % machine.repository)
    assert machine.noted() == ["venv", "pip", "pip"]
    # From now on it belongs to the environment, and is completed where pip was killed.
    assert machine.start(**{**gpu, "LD_LIBRARY_PATH": ""}).stderr == ""
    (machine.repository / ".venv/.begun-requirement-cuda.txt").touch()
    assert machine.start(**{**gpu, "LD_LIBRARY_PATH": ""}).returncode == 0
    assert machine.noted() == ["venv", "pip", "pip", "pip"]


def test_cuda_is_installed_where_setup_cuda_asks_for_it(machine, gpu):
    active = {"VIRTUAL_ENV": machine.environment("active")}
    assert machine.start(**active, SETUP_CUDA="0").stdout.endswith("active/bin/python\n")
    result = machine.start(**active, **gpu)
    assert result.stdout.endswith("active/bin/python\n") and "SETUP_CUDA=1" in result.stderr
    assert machine.noted() == []  # an environment that is used as it is gets nothing
    for _ in range(2):
        result = machine.start(**active, SETUP_CUDA="1")
        assert result.stdout.endswith(".venv/bin/python\n") and "cuda==13.0" in result.stderr
        assert machine.noted() == ["venv", "pip", "pip"]
    result = machine.start(SETUP_CUDA="yes")
    assert (result.returncode, result.stderr) == (
        2, "error: SETUP_CUDA=yes: must be auto, 1 or 0\n")


def test_condas_own_and_vanished_environments_are_not_used(machine):
    base = machine.environment("conda")
    result = machine.start(CONDA_PREFIX=base, CONDA_DEFAULT_ENV="base", VIRTUAL_ENV="/nowhere")
    assert result.stdout.strip() == str(machine.repository / ".venv/bin/python"), result.stderr


def test_a_shim_without_its_python_is_passed_over(machine):
    for version in ("3.11", "3.10", "3.9", "3.12", "3.13"):
        if version != machine.own_version:
            machine.install(f"python{version}", "echo 'version not switched on' >&2; exit 127")
    result = machine.start()
    assert result.returncode == 0, result.stderr
    assert f"venv {machine.bin}/python{machine.own_version}" in machine.calls.read_text()


def test_python_3_13_is_the_last_choice_and_takes_long(machine):
    """NumPy 1 has to be compiled for it."""
    if machine.own_version == "3.13":
        pytest.skip("this Python is 3.13")
    machine.install("python3", PYTHON.replace(
        "*) exec", '"-c import sys"*) echo 3.13 ;;\n*) exec'))
    result = machine.start()
    assert f"venv {machine.bin}/python{machine.own_version}" in machine.calls.read_text()
    assert "(about a minute)" in result.stderr and "warning" not in result.stderr
    machine.remove(f"python{machine.own_version}")
    shutil.rmtree(machine.repository / ".venv")
    result = machine.start()
    assert f"venv {machine.bin}/python3\n" in machine.calls.read_text()
    assert "(many minutes: NumPy 1 is compiled" in result.stderr


def test_the_compiler_of_cc_path_is_looked_for(machine):
    machine.remove("g++")
    machine.install("g++-99", "echo 99.1.0")
    machine.install("id", "echo 1000")
    assert_one_line_error(machine.start(cc_path="g++-98"), "apt-get install g++-98)")
    result = machine.start(cc_path="g++-99")
    assert result.returncode == 0
    assert "warning: g++ 99.1.0 is untried" in result.stderr


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


def test_a_killed_apt_is_continued(machine):
    """Its programs may be there before all that they need is."""
    machine.install("id", "echo 0")
    (machine.bin / "g++").rename(machine.folder / "g++")
    machine.install("dpkg", 'echo "dpkg $*" >> "$CALLS"')
    machine.install("apt-get", f"""echo "apt $*" >> "$CALLS"
        [[ $1 == update ]] || cp '{machine.folder}/g++' '{machine.bin}'
        [[ $1 == update || -z "${{APT_DIES:-}}" ]] || kill -KILL 0
    """)
    assert machine.start(APT_DIES=1).returncode == -signal.SIGKILL
    machine.calls.write_text("")
    assert machine.start().returncode == 0
    assert machine.noted() == ["dpkg", "apt", "apt", "venv", "pip"]
    assert "install -y --no-install-recommends g++\n" in machine.calls.read_text()
    assert machine.start().stderr == ""


def test_mpi_is_asked_for_by_several_processes_only(machine):
    machine.install("id", "echo 1000")
    assert machine.start(NPROC=1).returncode == 0
    assert_one_line_error(machine.start(NPROC=2), "apt-get install openmpi-bin libopenmpi-dev")
    machine.install("mpirun", "true")
    assert_one_line_error(machine.start(NPROC=2), "openmpi-bin libopenmpi-dev")
    machine.install("mpicc", "true")
    for number in (2, "abc", "-1", "0", "x[$(touch ran)]"):  # work.sh checks it
        result = machine.start(NPROC=number)
        assert result.returncode == 0 and result.stderr == ""
    assert not (machine.repository / "ran").exists()


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


@pytest.mark.parametrize("name", ["requirement.txt", "requirement-test.txt",
                                  "requirement-cuda.txt"])
def test_requirements_are_exact(root, name):
    for line in (root / name).read_text().splitlines():
        assert re.match(r"(#|-r requirement\.txt$|[\w.-]+==[\w.]+( ; .+)?$|$)", line), line


def test_create_datasets_names_the_missing_file(root, tmp_path):
    (tmp_path / "train.txt").write_text("name[A]||A.\n")
    result = subprocess.run(["bash", root / "create_datasets.sh"], capture_output=True, text=True,
                            env={**os.environ, "DATA_DIR": str(tmp_path)}, timeout=60)
    assert result.returncode == 1
    assert result.stderr == (f"error: {tmp_path}/test.txt: no such file; "
                             "run: bash data/download_data.sh e2e\n")


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


SCRIPTS = ("work.sh", "create_datasets.sh", "run_tests.sh", "align/run.sh", "bench/run.sh",
           "download_pretrained_checkpoints.sh", "data/download_data.sh")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_shown_without_a_set_up(root, tmp_path, script):
    """From a copy of the script alone, on a machine with sed alone, in any place."""
    copy = tmp_path / "folder/script.sh"
    copy.parent.mkdir()
    shutil.copy(root / script, copy)
    for flags in (["--help"], ["-h"], ["train", "--help"]):
        if script == "work.sh" and len(flags) > 1:
            continue
        result = subprocess.run([shutil.which("bash"), copy, *flags], capture_output=True,
                                text=True, timeout=20,
                                env={"PATH": os.path.dirname(shutil.which("sed"))})
        assert (result.returncode, result.stderr) == (0, "")
        assert f"bash {script}" in result.stdout
    for file in {"align/run.sh": ["align/run.py"], "bench/run.sh": (root / "bench").glob(
            "bench_*.py")}.get(script, ()):
        flags = re.findall(r'add_argument\("(--\w+)"', (root / file).read_text())
        assert flags and [flag for flag in flags if f"{flag} " not in result.stdout.replace(
            ",", " ").replace("\n", " ")] == []
