"""The state of a beam search: the answers so far, so that a search that broke off can go on.

``WORK_DIR/OUTPUT_FILE.state`` holds a JSON line with the settings, then for each different context
that was searched a line with its number and the predicted token ids. Of a finished search, only the
settings, the SHA-256 of the output and the speed are left, the speed only if the search was not
continued. If there are several processes, those other than 0 add to ``OUTPUT_FILE.state.RANK``, and
each reads the files of all.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Callable

from runtime import processes
from runtime.digests import sha256
from runtime.errors import InputError
from runtime.formats import replacing


class SearchState:
    """``answers``, by number of the context, of the search that has these ``settings``.

    ``say`` gets a line where an earlier state is not used.
    """

    def __init__(self, work_dir: Path, output: Path, settings: dict[str, object],
                 say: Callable[[str], None]):
        self.output, self.settings, self.say = output, settings, say
        self.path = work_dir / f"{output.name}.state"
        self.own = (self.path if processes.rank() == 0 else
                    self.path.with_name(f"{self.path.name}.{processes.rank()}"))
        self.answers: dict[int, list[int]] = {}
        self.finished = False  # whether ``output`` is what such a search has written

    def load(self, resume: str, contexts: int, eval_len: int) -> None:
        """Reads what an earlier search left, if ``resume`` is yes or auto, not if it is no.

        Raises InputError if that was another search and ``resume`` is yes; with auto, and if it is
        damaged, the search begins anew.
        """
        paths = [self.path, *self.path.parent.glob(f"{self.path.name}.*")] if resume != "no" else []
        for path in filter(Path.is_file, paths):
            try:
                header, *lines = map(json.loads, path.read_bytes().split(b"\n")[:-1])
                answers = {int(number): [int(token) for token in ids] for number, ids in lines}
                same, digest = header["settings"] == self.settings, header.get("sha256")
                if not all(number in range(contexts) and len(ids) <= eval_len
                           and all(token >= 0 for token in ids) for number, ids in answers.items()):
                    raise ValueError
            except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
                self.say(f"{path}: no state of a beam search; starting from the beginning")
                continue
            if not same and resume == "yes":
                raise InputError(f"{path}: of a search with other flags or files; give the same, "
                                 "or leave out --resume to start anew")
            if same:
                self.answers.update(answers)
                self.finished |= self.output.is_file() and digest == sha256(self.output)
            else:
                self.say(f"{path}: of a search with other flags or files; starting from the "
                         "beginning")

    def begin(self) -> None:
        """Writes the answers so far to this process's file, for :meth:`add` to continue."""
        with replacing(self.own) as file:
            file.write(json.dumps({"settings": self.settings}).encode() + b"\n")
        self.add(self.answers)

    def add(self, answers: dict[int, list[int]]) -> None:
        """Adds answers; raises InputError if they cannot be written."""
        try:
            with open(self.own, "ab") as file:
                file.writelines(json.dumps(answer).encode() + b"\n" for answer in answers.items())
        except OSError as error:
            raise InputError(f"{self.own}: cannot be written: {error.strerror or error}; free some "
                             "space or choose another --work_dir") from None
        self.answers.update(answers)

    def finish(self, samples_per_s: float | None) -> None:
        """Notes that ``output`` is written, and how fast; process 0 calls it."""
        for path in self.path.parent.glob(f"{self.path.name}.*"):
            path.unlink(missing_ok=True)
        about: dict[str, object] = {"settings": self.settings, "samples_per_s": samples_per_s}
        if self.output.is_file():
            about["sha256"] = sha256(self.output)
        with replacing(self.path) as file:
            file.write(json.dumps(about).encode() + b"\n")
