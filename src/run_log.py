"""The records of a training run: ``train.log``, ``metrics.csv`` and ``loss.png``."""

from __future__ import annotations

import csv
import io
import itertools
import logging
import os
import textwrap
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

from runtime.errors import InputError, one_line
from runtime.formats import is_stream, replacing

COLUMNS = ("step", "epoch", "lr", "loss", "valid_loss", "ms_per_batch")
FILES = ("train.log", "metrics.csv")


@dataclass(frozen=True)
class Captions:
    """The words in loss.png: above it, and what the two curves are."""

    title: str = ""
    training: str = "training"
    validation: str = "validation"


def captions(title: str, label_smooth: float, joint_lm: bool) -> Captions:
    """Says how the training loss differs from the validation loss, which shares its axis."""
    differences = ["jlm: every token is a target"] * joint_lm
    if label_smooth:
        differences.append(f"label smoothing {label_smooth:g} raises it")
    return Captions(title, f"training ({', '.join(differences)})" if differences else "training",
                    "validation (clm: the completion's tokens)" if joint_lm else "validation")


class RunLog:
    """Log lines on screen and in WORK_DIR/train.log, one row for each step in metrics.csv.

    Without ``sizes`` both files begin anew. With them, as :meth:`sync` returned them to the run
    that broke off, both are cut to these sizes and continued. Raises InputError if work_dir cannot
    be written or lacks the beginning of the files, or if one of them is a device or a pipe. If
    ``write`` is false, it does nothing. ``words`` are for the loss curve.
    """

    def __init__(self, work_dir: Path, say: Callable[[str], None],
                 sizes: list[int] | None = None, write: bool = True,
                 words: Captions | None = None):
        self.work_dir, self._say, self._write = work_dir, say, write
        self.words = words or Captions()
        self.rows: list[tuple[int, float, float | None]] = []
        self._buffer = ""  # rows of metrics.csv that are not written yet
        if not write:
            return
        try:
            work_dir.mkdir(parents=True, exist_ok=True)
            for name in FILES:
                if is_stream(work_dir / name):
                    raise InputError(f"{work_dir / name}: not a regular file, so a run could not "
                                     "be resumed; remove it or choose another --work_dir")
            # Unbuffered, so that an error occurs when a line is written and not when it is closed.
            self._log, self._metrics = (
                open(work_dir / name, "wb" if sizes is None else "r+b", buffering=0)
                for name in FILES)
            for file, size in zip((self._log, self._metrics), sizes or (0, 0)):
                if os.fstat(file.fileno()).st_size < size:
                    raise InputError(f"{file.name}: shorter than when the run broke off; put it "
                                     "back, or leave out --resume to start anew")
                file.truncate(size)
                file.seek(size)
        except OSError as error:
            raise self._unwritable(error) from None
        if sizes is None:
            self._row(COLUMNS)
        else:
            self._read_rows()

    def line(self, text: str) -> None:
        """Prints ``text`` and appends it to train.log; writes metrics.csv up to here, too."""
        if not self._write:
            return
        self._say(text)
        self._append(self._log, text + "\n")
        self._flush()

    def metrics(self, step: int, epoch: int, lr: float, loss: float, valid_loss: float | None,
                ms_per_batch: float) -> None:
        """One step: its learning rate, its loss, and the validation loss if there was one."""
        if not self._write:
            return
        self.rows.append((step, loss, valid_loss))
        valid = "" if valid_loss is None else repr(valid_loss)
        self._row((step, epoch, repr(lr), repr(loss), valid, f"{ms_per_batch:.2f}"))

    def sync(self) -> list[int]:
        """Writes both files to the disk and returns their sizes in bytes."""
        self._flush()
        try:
            for file in (self._log, self._metrics):
                os.fsync(file.fileno())
        except OSError as error:
            raise self._unwritable(error) from None
        return [file.tell() for file in (self._log, self._metrics)]

    def close(self) -> None:
        """Closes the files and draws loss.png."""
        if not self._write:
            return
        self._flush()
        self._log.close()
        self._metrics.close()
        if self.rows:
            draw_losses(self.work_dir / "loss.png", self.rows, self.words)

    def _row(self, values: tuple) -> None:
        self._buffer += ",".join(map(str, values)) + "\n"

    def _flush(self) -> None:
        self._append(self._metrics, self._buffer)
        self._buffer = ""

    def _append(self, file: io.FileIO, text: str) -> None:
        rest = memoryview(text.encode("utf-8"))
        try:
            while rest:  # a disk that is nearly full takes only a part
                rest = rest[file.write(rest):]
        except OSError as error:
            raise self._unwritable(error) from None

    def _read_rows(self) -> None:
        """Reads the rows of the run so far, for the loss curve."""
        path = self.work_dir / "metrics.csv"
        try:
            with open(path, encoding="utf-8", newline="") as file:
                for row in csv.DictReader(file):
                    self.rows.append((int(row["step"]), float(row["loss"]),
                                      float(row["valid_loss"]) if row["valid_loss"] else None))
        except (ValueError, KeyError, TypeError, csv.Error):
            raise InputError(f"{path}: not as the run left it that broke off; put it back, or "
                             "leave out --resume to start anew") from None

    def _unwritable(self, error: OSError) -> InputError:
        return InputError(f"{self.work_dir}: cannot be written: {error.strerror or error}; free "
                          "some space or choose another --work_dir")


def centred_means(values: list[float], half: int) -> list[float]:
    """The mean of each value and of ``half`` on either side; fewer on both sides at the ends."""
    sums = [0.0, *itertools.accumulate(values)]
    sides = [min(half, i, len(values) - 1 - i) for i in range(len(values))]
    return [(sums[i + n + 1] - sums[i - n]) / (2 * n + 1) for i, n in enumerate(sides)]


def draw_losses(path: Path, rows: list[tuple[int, float, float | None]],
                words: Captions) -> None:
    """A PNG of (step, training loss, validation loss or None) rows, with a running mean."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # no warning if HOME is read-only
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [step for step, _, _ in rows]
    losses = [loss for _, loss, _ in rows]
    half = len(rows) // 100
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes.plot(steps, losses, color="tab:blue", alpha=0.3 if half else 1.0, linewidth=0.8,
              label=words.training)
    if half:
        axes.plot(steps, centred_means(losses, half), color="tab:blue",
                  label=f"training, centred mean of {2 * half + 1}")
    valid = [(step, loss) for step, _, loss in rows if loss is not None]
    if valid:
        axes.plot(*zip(*valid), "o-", color="tab:orange", label=words.validation)
    # A path may hold dollar signs, which are no formula here, and characters that no font has.
    axes.set_title(textwrap.fill(one_line(words.title), 100), fontsize="medium",
                   parse_math=False)
    axes.set(xlabel="micro-batch", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    with warnings.catch_warnings(), replacing(path) as file:
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(file, format="png", metadata={"Software": None})
    pyplot.close(figure)
