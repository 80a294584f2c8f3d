"""The records of a training run: ``train.log``, ``metrics.csv`` and ``loss.png``."""

from __future__ import annotations

import csv
import io
import itertools
import os
from pathlib import Path
from typing import Callable

from runtime.errors import InputError
from runtime.formats import is_stream, replacing

COLUMNS = ("step", "epoch", "lr", "loss", "valid_loss", "ms_per_batch")
FILES = ("train.log", "metrics.csv")


class RunLog:
    """Log lines on screen and in WORK_DIR/train.log, one row for each step in metrics.csv.

    Without ``sizes`` both files begin anew. With them, as :meth:`sync` returned them to the run
    that broke off, both are cut to these sizes and continued. Raises InputError if work_dir cannot
    be written or lacks the beginning of the files, or if one of them is a device or a pipe. If
    ``write`` is false, it does nothing.
    """

    def __init__(self, work_dir: Path, say: Callable[[str], None],
                 sizes: list[int] | None = None, write: bool = True):
        self.work_dir, self._say, self._write = work_dir, say, write
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
            draw_losses(self.work_dir / "loss.png", self.rows)

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


def draw_losses(path: Path, rows: list[tuple[int, float, float | None]]) -> None:
    """A PNG of (step, training loss, validation loss or None) rows, with a running mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [step for step, _, _ in rows]
    losses = [loss for _, loss, _ in rows]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8, label="training")
    window = max(1, len(rows) // 50)
    sums = [0.0, *itertools.accumulate(losses)]
    means = [(sums[i + 1] - sums[max(0, i + 1 - window)]) / min(i + 1, window)
             for i in range(len(losses))]
    axes.plot(steps, means, color="tab:blue", label=f"training, mean of {window}")
    valid = [(step, loss) for step, _, loss in rows if loss is not None]
    if valid:
        axes.plot(*zip(*valid), "o-", color="tab:orange", label="validation")
    axes.set(xlabel="micro-batch", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as file:
        figure.savefig(file, format="png", metadata={"Software": None})
    pyplot.close(figure)
