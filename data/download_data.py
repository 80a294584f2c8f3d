"""Fetches the official files of E2E, WebNLG and DART, as published with the original experiment.

    python data/download_data.py [e2e] [webnlg] [dart]

Each data set gets a folder in ``--data_dir``. E2E_SOURCE=FOLDER copies E2E's files from a folder
instead, WEBNLG_SOURCE and DART_SOURCE those of the others. GITHUB_RAW=URL sets a mirror of
https://raw.githubusercontent.com; E2E_URL, WEBNLG_URL and DART_URL set the URL of the folder that
has a data set's files.

E2E: Novikova et al. (2017), CC BY-SA 4.0. WebNLG: Gardent et al. (2017), CC BY-NC-SA 4.0. DART:
Nan et al. (2021), MIT licence.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from runtime.digests import git_blob_id  # noqa: E402
from runtime.download import fetch, is_there  # noqa: E402
from runtime.errors import InputError  # noqa: E402
from runtime.flags import ArgumentParser  # noqa: E402
from runtime.formats import replacing  # noqa: E402
from runtime.progress import log  # noqa: E402
from runtime.script import run  # noqa: E402

GITHUB_RAW = "https://raw.githubusercontent.com"
PLACE = "microsoft/LoRA/c4593f060e6a368d7bb5af5273b8e42810cdef90/examples/NLG/data"


@dataclass(frozen=True)
class DataSet:
    """A data set: its folder, here and there, and the git blob ids of its files."""

    folder: str
    blob_ids: dict[str, str]


DATA_SETS = {
    "e2e": DataSet("e2e", {
        "train.txt": "2f92a2790c00a48574dcc89465a326f33d7e7cc6",
        "valid.txt": "94f87112e11198710d65a1d5dc7d0b8d9155a07d",
        "test.txt": "084da9f4409d98058bcb020614afa83824440484"}),
    "webnlg": DataSet("webnlg_challenge_2017", {
        "train.json": "461766d1fe902bd659b821a03f49310c22403686",
        "dev.json": "180f096ff49a7e597dd7c507ea0c5441e839b770",
        "test.json": "7f552799b7e3b5badf95b725c20d955e0886811e"}),
    "dart": DataSet("dart", {
        "dart-v1.1.1-full-train.json": "66d6ce4aeb5d01c318c7fc15d7747ef39ea320be",
        "dart-v1.1.1-full-dev.json": "e3a7a497677e7edd9c45a3aaadb3ab8fd5493f75",
        "dart-v1.1.1-full-test.json": "c3de833701dcd475ff3bf0b72cd96e13aeeb6b68"}),
}


def copy(source: Path, path: Path, blob_id: str, variable: str) -> None:
    """Copies an official file; raises InputError if ``source`` is missing or not that file."""
    if not source.is_file():
        raise InputError(f"{source}: no such file; without {variable}, it is downloaded")
    if git_blob_id(source) != blob_id:
        raise InputError(f"{source}: not the official file (git_blob_id is not {blob_id}); to "
                         f"train on data of your own, copy it to {path} yourself")
    with open(source, "rb") as original, replacing(path) as file:
        shutil.copyfileobj(original, file)


def copy_all(source: Path, folder: Path, blob_ids: dict[str, str], variable: str) -> None:
    """Copies the official files that ``source`` has; raises InputError for the others."""
    problems = []
    for name, blob_id in blob_ids.items():
        try:
            if not is_there(folder / name, git_blob_id, blob_id):
                copy(source / name, folder / name, blob_id, variable)
            log(f"{folder / name}: verified")
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("; ".join(problems))


def fetch_all(url: str, folder: Path, blob_ids: dict[str, str], remedy: str) -> None:
    """Fetches the official files that ``folder`` lacks; raises InputError at the first failure."""
    for name, blob_id in blob_ids.items():
        fetch(f"{url.rstrip('/')}/{name}", folder / name, git_blob_id, blob_id, remedy)
        log(f"{folder / name}: verified")


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("data_sets", nargs="*", metavar="DATA_SET",
                        help=f"{', '.join(DATA_SETS)} (default: e2e)")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), metavar="DIR",
                        help="folder to write to")
    args = parser.parse_args()
    for name in args.data_sets:
        if name not in DATA_SETS:
            parser.error(f"{name}: no data set; there are {', '.join(DATA_SETS)}")
    sources = {"e2e": os.environ.get("E2E_SOURCE"), "webnlg": os.environ.get("WEBNLG_SOURCE"),
               "dart": os.environ.get("DART_SOURCE")}
    urls = {"e2e": os.environ.get("E2E_URL"), "webnlg": os.environ.get("WEBNLG_URL"),
            "dart": os.environ.get("DART_URL")}
    mirror = (os.environ.get("GITHUB_RAW") or GITHUB_RAW).rstrip("/")
    for name in args.data_sets or ["e2e"]:
        place, blob_ids = DATA_SETS[name].folder, DATA_SETS[name].blob_ids
        variable = f"{name.upper()}_SOURCE"
        if sources[name]:
            copy_all(Path(sources[name]), args.data_dir / place, blob_ids, variable)
        else:
            fetch_all(urls[name] or f"{mirror}/{PLACE}/{place}", args.data_dir / place, blob_ids,
                      "run this again to resume; GITHUB_RAW=https://... takes a mirror, and "
                      f"{variable}=DIR copies the files from a folder")


if __name__ == "__main__":
    run(main)
