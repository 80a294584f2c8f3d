"""Odd surroundings: paths that Jittor's commands cannot contain, HOME, caches of environments."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runtime import backend
from runtime.errors import InputError

# Starts the backend, but Jittor's import only shows what Jittor would find.
START = """
import os, sys
sys.path.insert(0, sys.argv[1])
from types import SimpleNamespace
from runtime import backend, compiling, script
def show(cuda):
    import jittor_utils
    global home
    home = os.environ["HOME"]
    return SimpleNamespace(flags=flags)
flags = SimpleNamespace()
backend._import_jittor, compiling.watch = show, lambda: None
def main():
    backend.start("cpu")
    import jittor_utils
    for value in (home, os.environ.get("HOME"), jittor_utils.home(), jittor_utils.cache_path,
                  sys.executable, flags.python_path):
        print(value)
script.run(main)
"""


def start(root, python=sys.executable, cwd=None, without=(), **variables):
    """What START prints after the line on the device, or the process if it failed."""
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    for name in {"cache_name", "use_mkl", "cc_path", *without} - set(variables):
        environment.pop(name, None)
    process = subprocess.run([python, "-c", START, root / "src"], capture_output=True, text=True,
                             env=environment, cwd=cwd, timeout=60)
    if process.returncode:
        return process
    return process.stdout.splitlines()[-6:]


@pytest.fixture
def links(monkeypatch, tmp_path):
    """The place of links of :func:`backend.plain`."""
    (tmp_path / "links").mkdir()
    monkeypatch.setattr(backend, "LINKS", (str(tmp_path / "links"),))
    return tmp_path / "links"


def test_a_plain_path_stays(links):
    for path in ("/home/u/lora-1.0_x+y/.venv", "/opt/g++/a@b=c%d~", "", "relative"):
        assert backend.plain(path) == path
    assert not list(links.iterdir())


@pytest.mark.parametrize("name", [
    "My Projects", "我的 项目", "我的项目", "it's", 'say "hi"', "a;b", "(1)", "R&D", "$HOME", "a,b",
    "a:b", "line\nbreak", "tab\tbed", "a*b", "back\\slash", "é", "`x`", "#1", "end "])
def test_other_paths_get_a_link(links, tmp_path, name, capsys):
    folder = tmp_path / name / "inner"
    folder.mkdir(parents=True)
    (folder / "file.txt").write_text("text")
    found = backend.plain(str(folder / "file.txt"))
    assert re.fullmatch(r"[\w/.-]+/inner/file\.txt", found, re.ASCII)
    assert Path(found).read_text() == "text"
    assert found[:-len("/inner/file.txt")] in capsys.readouterr().out
    # The same link for other files there, without another line, also if it has to be made again.
    for _ in range(2):
        assert backend.plain(str(folder)) == os.path.dirname(found)
        assert capsys.readouterr().out == ""
    shutil.rmtree(links)
    links.mkdir()
    assert backend.plain(str(folder / "file.txt")) == found
    Path(found).parents[1].unlink()
    Path(found).parents[1].symlink_to("/nowhere")
    assert Path(backend.plain(str(folder / "file.txt"))).read_text() == "text"


def test_a_folder_of_links_that_others_can_write_is_not_used(links):
    backend.plain("/a b")
    folder, = links.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    with pytest.raises(InputError, match="^/a b: Jittor cannot use this path.* move it"):
        backend.plain("/a b")
    shutil.rmtree(folder)
    folder.symlink_to(links.parent)
    with pytest.raises(InputError, match="no link to it can be made in"):
        backend.plain("/a b")


def odd_environment(folder):
    """The Python of a virtual environment in ``folder`` with the packages of this one."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    site, = (folder / "venv").glob("lib/python*/site-packages")
    (site / "all.pth").write_text("\n".join(
        path for path in sys.path if path.endswith("site-packages")), encoding="utf-8")
    return folder / "venv/bin/python"


@pytest.mark.parametrize("name", ["My Projects", "我的 项目"])
def test_jittor_gets_paths_without_blanks(root, tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    found = start(root, odd_environment(folder), HOME=folder, without=["JITTOR_HOME"])
    home, later, *of_jittor = found
    assert later == str(folder)
    assert not re.search(r"[^\w/.+=${}-]", "".join((home, *of_jittor)), re.ASCII), found
    assert Path(home).resolve() == folder.resolve()
    assert Path(of_jittor[2]).samefile(folder / "venv/bin/python")
    assert [path.name for path in folder.glob(".cache/jittor/jt*")]


def test_home_is_that_of_jittor_only_while_it_is_imported(root, tmp_path):
    mine, jittors = tmp_path / "mine", tmp_path / "jittors"
    mine.mkdir()
    home, later, of_jittor, cache, _, python = start(root, HOME=mine, JITTOR_HOME=jittors)
    assert (home, later, of_jittor) == (str(jittors), str(mine), str(jittors))
    assert cache.startswith(str(jittors)) and f"HOME={jittors}" in python
    assert not list(mine.iterdir())  # Jittor would remember JITTOR_HOME there
    assert not (jittors / ".cache/jittor/config.json").exists()
    assert start(root, HOME=mine, without=["JITTOR_HOME"])[2] == str(mine)


def test_jittor_home_helps_where_home_does_not(root, tmp_path):
    for variables in ({"HOME": "/dev/null/none"}, {"HOME": "/proc/none"}):
        assert start(root, JITTOR_HOME=tmp_path, **variables)[2] == str(tmp_path)
        process = start(root, without=["JITTOR_HOME"], **variables)
        assert process.returncode == 1 and process.stdout == ""
        assert re.fullmatch(f"error: {variables['HOME']}/.*set JITTOR_HOME to .*\n", process.stderr)
    home, later, *_ = start(root, JITTOR_HOME=tmp_path, without=["HOME"])
    assert (home, later) == (str(tmp_path), "None")


def test_a_lock_that_cannot_be_written(jittor, root, tmp_path):
    """As in a cache into which another user, such as root, has written."""
    import jittor_utils

    lock = tmp_path / ".cache/jittor" / jittor_utils.lock.lock_path.partition("/.cache/jittor/")[2]
    lock.mkdir(parents=True)  # not writable for root, either
    code = "import sys; sys.path.insert(0, sys.argv[1]); from runtime import backend, script; " \
           "script.run(lambda: backend.start('cpu'))"
    process = subprocess.run([sys.executable, "-c", code, root / "src"], capture_output=True,
                             text=True, env={**os.environ, "JITTOR_HOME": str(tmp_path)})
    assert process.returncode == 1
    assert process.stderr == (f"error: {lock}: Is a directory; Jittor writes there: remove it, or "
                              "set JITTOR_HOME to another folder\n")


def test_no_home_at_all(monkeypatch):
    def missing():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", missing)
    monkeypatch.delenv("JITTOR_HOME", raising=False)
    with pytest.raises(InputError, match="HOME is not set.*JITTOR_HOME"):
        backend._find_home()


def test_a_cache_for_each_environment(root, tmp_path):
    """Its name follows from the environment, the compiler and Jittor, and from nothing else."""
    def name(python=sys.executable, source=root, cwd=None, **variables):
        return Path(start(source, python, cwd, **variables)[3]).name

    first = name(JITTOR_HOME=tmp_path / "a")
    assert re.fullmatch("[0-9a-f]{8}", first)
    clone = tmp_path / "clone"
    shutil.copytree(root / "src", clone / "src", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(["git", "init", "-q", "-b", "other", clone], check=True)
    assert {name(JITTOR_HOME=tmp_path / "a", cwd=tmp_path),
            name(JITTOR_HOME=tmp_path / "b", source=clone, cwd=clone),
            name(os.path.join(sys.prefix, "bin", "python%d.%d" % sys.version_info[:2]),
                 JITTOR_HOME=tmp_path / "a")} == {first}
    compiler = tmp_path / "bin/g++"
    compiler.parent.mkdir()
    compiler.symlink_to(shutil.which("g++"))
    others = {name(odd_environment(tmp_path), JITTOR_HOME=tmp_path / "a"),
              name(JITTOR_HOME=tmp_path / "a", cc_path=compiler),
              name(JITTOR_HOME=tmp_path / "a",
                   PATH=f"{compiler.parent}:{os.environ['PATH']}")}
    assert first not in others and len(others) == 2  # the last two have the same compiler


def test_the_users_name_of_the_cache(root, tmp_path):
    assert Path(start(root, JITTOR_HOME=tmp_path, cache_name="mine")[3]).name == "mine"
