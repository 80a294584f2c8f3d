"""What a training run leaves to look at: ``train.log``, ``metrics.csv`` and ``loss.png``."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Callable

from cli import InputError
from formats import replacing

COLUMNS = ("step", "epoch", "lr", "loss", "valid_loss", "ms_per_batch")


class RunLog:
    """Log lines on screen and in WORK_DIR/train.log, one row a micro-batch in metrics.csv.

    Both files begin anew with the run. Raises InputError where work_dir cannot be written.
    """

    def __init__(self, work_dir: Path, say: Callable[[str], None]):
        self.work_dir, self._say, self.rows = work_dir, say, []
        try:
            work_dir.mkdir(parents=True, exist_ok=True)
            self._log = open(work_dir / "train.log", "w", encoding="utf-8")
            self._metrics = open(work_dir / "metrics.csv", "w", encoding="utf-8", newline="")
        except OSError as error:
            raise InputError(f"{work_dir}: cannot be written: {error.strerror}; choose another "
                             "--work_dir") from None
        self._csv = csv.writer(self._metrics, lineterminator="\n")
        self._csv.writerow(COLUMNS)

    def line(self, text: str) -> None:
        """Says ``text`` and appends it to train.log; metrics.csv is on disk up to here, too."""
        self._say(text)
        self._log.write(text + "\n")
        self._log.flush()
        self._metrics.flush()

    def metrics(self, step: int, epoch: int, lr: float, loss: float, valid_loss: float | None,
                ms_per_batch: float) -> None:
        """One micro-batch: the learning rate it used and its loss; the validation's if it ran."""
        self.rows.append((step, loss, valid_loss))
        valid = "" if valid_loss is None else repr(valid_loss)
        self._csv.writerow((step, epoch, repr(lr), repr(loss), valid, f"{ms_per_batch:.2f}"))

    def close(self) -> None:
        """Closes the files and draws loss.png."""
        self._log.close()
        self._metrics.close()
        if self.rows:
            draw_losses(self.work_dir / "loss.png", self.rows)


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
    sums = [0.0]
    for loss in losses:
        sums.append(sums[-1] + loss)
    means = [(sums[i + 1] - sums[max(0, i + 1 - window)]) / min(i + 1, window)
             for i in range(len(losses))]
    axes.plot(steps, means, color="tab:blue", label=f"training, mean of {window}")
    valid = [(step, loss) for step, _, loss in rows if loss is not None]
    if valid:
        axes.plot(*zip(*valid), "o-", color="tab:orange", label="validation")
    axes.set(xlabel="micro-batch", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    pyplot.close(figure)
    with replacing(path) as file:
        file.write(picture.getvalue())
