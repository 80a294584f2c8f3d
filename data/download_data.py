"""Fetches the official E2E files, as published with the original experiment, into a folder.

    python data/download_data.py [DIR]

E2E_SOURCE=FOLDER copies them from a folder instead; E2E_URL sets another URL to download from.
The E2E NLG data set is by Novikova et al. (2017), CC BY-SA 4.0.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from runtime.digests import git_blob_id  # noqa: E402
from runtime.download import fetch, is_there  # noqa: E402
from runtime.errors import InputError  # noqa: E402
from runtime.flags import ArgumentParser  # noqa: E402
from runtime.formats import replacing  # noqa: E402
from runtime.progress import log  # noqa: E402
from runtime.script import run  # noqa: E402

URL = ("https://raw.githubusercontent.com/microsoft/LoRA/"
       "c4593f060e6a368d7bb5af5273b8e42810cdef90/examples/NLG/data/e2e")
BLOB_IDS = {
    "train.txt": "2f92a2790c00a48574dcc89465a326f33d7e7cc6",
    "valid.txt": "94f87112e11198710d65a1d5dc7d0b8d9155a07d",
    "test.txt": "084da9f4409d98058bcb020614afa83824440484",
}
REMEDY = ("run this again to resume, or copy the files from a folder: "
          "E2E_SOURCE=DIR bash data/download_data.sh")


def copy(source: Path, path: Path, blob_id: str) -> None:
    """Copies an official file; raises InputError if ``source`` is missing or not that file."""
    if not source.is_file():
        raise InputError(f"{source}: no such file; without E2E_SOURCE, it is downloaded")
    if git_blob_id(source) != blob_id:
        raise InputError(f"{source}: not the official file (git_blob_id is not {blob_id}); to "
                         f"train on data of your own, copy it to {path} yourself")
    with open(source, "rb") as original, replacing(path) as file:
        shutil.copyfileobj(original, file)


def copy_all(source: Path, folder: Path) -> None:
    """Copies the official files that ``source`` has; raises InputError for the others."""
    problems = []
    for name, blob_id in BLOB_IDS.items():
        try:
            if not is_there(folder / name, git_blob_id, blob_id):
                copy(source / name, folder / name, blob_id)
            log(f"{folder / name}: verified")
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("; ".join(problems))


def fetch_all(url: str, folder: Path) -> None:
    """Fetches the official files that ``folder`` lacks; raises InputError at the first failure."""
    for name, blob_id in BLOB_IDS.items():
        fetch(f"{url.rstrip('/')}/{name}", folder / name, git_blob_id, blob_id, REMEDY)
        log(f"{folder / name}: verified")


def main() -> None:
    parser = ArgumentParser("Fetches the official E2E files.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("data/e2e"), metavar="DIR",
                        help="folder to write to")
    folder = parser.parse_args().folder
    if os.environ.get("E2E_SOURCE"):
        copy_all(Path(os.environ["E2E_SOURCE"]), folder)
    else:
        fetch_all(os.environ.get("E2E_URL") or URL, folder)


if __name__ == "__main__":
    run(main)
