"""Fetches OpenAI's GPT-2 weights from Hugging Face into a folder.

    python pretrained_checkpoints/download_checkpoints.py [sm|md|lg ...]

HF_ENDPOINT names a mirror of https://huggingface.co.
"""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from runtime.digests import sha256  # noqa: E402
from runtime.download import TIMEOUT, USER_AGENT, fetch  # noqa: E402
from runtime.errors import InputError  # noqa: E402
from runtime.flags import ArgumentParser  # noqa: E402
from runtime.progress import log  # noqa: E402
from runtime.script import run  # noqa: E402

ENDPOINT = "https://huggingface.co"
FOLDER = Path("pretrained_checkpoints")
REMEDY = "run this again to resume; HF_ENDPOINT=https://... takes a mirror"


class Checkpoint(NamedTuple):
    """A file in a repository of the hub, and its name here."""

    repository: str
    revision: str  # a commit, so that the file does not change
    name: str
    sha256: str | None = None  # None: the one that the hub states for this commit
    file: str = "pytorch_model.bin"


CHECKPOINTS = {
    "sm": Checkpoint("openai-community/gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e",
                     "gpt2-pytorch_model.bin",
                     "7c5d3f4b8b76583b422fcb9189ad6c89d5d97a094541ce8932dce3ecabde1421"),
    "md": Checkpoint("openai-community/gpt2-medium", "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
                     "gpt2-medium-pytorch_model.bin"),
    "lg": Checkpoint("openai-community/gpt2-large", "32b71b12589c2f8d625668d2335a01cac3249519",
                     "gpt2-large-pytorch_model.bin"),
}


def download(checkpoint: Checkpoint, folder: Path, endpoint: str = ENDPOINT) -> Path:
    """Fetches the checkpoint into ``folder`` unless it is there; returns its path.

    Raises InputError as :func:`download.fetch` does.
    """
    path = folder / checkpoint.name
    url = (f"{endpoint.rstrip('/')}/{checkpoint.repository}/resolve/{checkpoint.revision}/"
           f"{checkpoint.file}")
    expected = checkpoint.sha256 or stated_sha256(url)
    fetch(url, path, sha256, expected, REMEDY)
    return path


def stated_sha256(url: str) -> str:
    """The SHA-256 that the hub states for a large file, without fetching the file.

    The hub answers with a redirection to its storage; its header ``X-Linked-Etag`` is the quoted
    SHA-256 (huggingface_hub reads it, too). Raises InputError if there is no such header.
    """
    request = urllib.request.Request(url, method="HEAD", headers=USER_AGENT)
    try:
        response = urllib.request.build_opener(_UntilStated).open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code >= 400:
            raise InputError(f"{url}: HTTP {error.code} {error.reason}; {REMEDY}") from None
        response = error  # the redirection that was not followed
    except OSError as error:
        raise InputError(f"{url}: {getattr(error, 'reason', error)}; {REMEDY}") from None
    with response:
        etag = response.headers.get("X-Linked-Etag")
    digest = (etag or "").strip('"')
    if len(digest) != 64:
        raise InputError(f"{url}: the server states no SHA-256 (X-Linked-Etag) to verify the file "
                         "by; set HF_ENDPOINT to another mirror")
    return digest


class _UntilStated(urllib.request.HTTPRedirectHandler):
    """Follows redirections, e.g. of renamed repositories, up to the one with the digest."""

    def redirect_request(self, request, file, code, message, headers, url):
        if "X-Linked-Etag" in headers:
            return None
        following = super().redirect_request(request, file, code, message, headers, url)
        following.method = "HEAD"
        return following


def main() -> None:
    parser = ArgumentParser("Fetches GPT-2 from Hugging Face.",
                            prog="download_pretrained_checkpoints.sh")
    parser.add_argument("cards", nargs="*", metavar="sm|md|lg", help="which sizes (default: sm)")
    cards = parser.parse_args().cards or ["sm"]
    for card in cards:
        if card not in CHECKPOINTS:
            parser.error(f"no such size: {card}; choose from {', '.join(CHECKPOINTS)}")
    endpoint = os.environ.get("HF_ENDPOINT") or ENDPOINT
    for card in cards:
        path = download(CHECKPOINTS[card], FOLDER, endpoint)
        log(f"{path}: verified")


if __name__ == "__main__":
    run(main)
