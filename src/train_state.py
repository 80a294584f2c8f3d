"""The state of an unfinished training run: all that its next steps depend on, in one file.

``WORK_DIR/resume.STEP.pt`` holds the trained weights (under ``model_state_dict``, so that the
file also serves as ``--lora_checkpoint``), AdamW's moments, the gradients added up since the last
update, the counters, the state of the generators that fill up batches, and the settings, which a
run that resumes must share. Dropout and the order of samples follow from the seed and the step.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

import jittor as jt
import numpy as np

from optimizer import AdamW
from runtime import torch_file
from runtime.digests import sha256
from runtime.errors import InputError
from runtime.formats import replacing

NAME = re.compile(r"resume\.(\d+)\.pt")
FINISHED = "finished.json"  # what a finished run was made from, and its last checkpoint
KEPT = 2  # states in a work dir: if the newest is damaged, there is another


@dataclass
class Counters:
    """The counters of a run after ``step`` micro-batches."""

    step: int = 0
    updates: int = 0  # of the optimizer
    log_sum: float = 0.0  # of the losses since the last log line
    log_count: int = 0
    best_ppl: float = math.inf
    checkpoints: list[int] = field(default_factory=list)  # steps of the model.STEP.pt it saved
    log_sizes: list[int] = field(default_factory=list)  # bytes of train.log and metrics.csv


@dataclass
class TrainState:
    """A state as read from ``path``; the tables hold arrays by parameter name."""

    path: Path
    settings: dict[str, object]
    counters: Counters
    weights: dict[str, np.ndarray]
    m: dict[str, np.ndarray]
    v: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]  # empty right after an update
    train_fill: list[list[int]]  # FTDataset.fill_state in each process
    valid_fill: list[list[int]]

    def differing(self, settings: dict[str, object]) -> str | None:
        """The first of ``settings`` that the run of this state did not have, or None."""
        names = [*settings, *(name for name in self.settings if name not in settings)]
        return next((name for name in names
                     if self.settings.get(name) != settings.get(name)), None)

    def restore(self, optimizer: AdamW) -> dict[str, jt.Var]:
        """Sets the optimizer and the parameters it trains; returns the gradients added up so far.

        Raises InputError where the state is of other parameters.
        """
        shapes = {name: tuple(p.shape) for name, p in optimizer.parameters.items()}
        for table in (self.weights, self.m, self.v, self.gradients or self.weights):
            if shapes != {name: array.shape for name, array in table.items()}:
                raise InputError(f"{self.path}: the state of another model; remove it, or leave "
                                 "out --resume to start anew")
        for name, p in optimizer.parameters.items():
            p.update(jt.array(self.weights[name]))
            optimizer.m[name].update(jt.array(self.m[name]))
            optimizer.v[name].update(jt.array(self.v[name]))
        optimizer.updates = self.counters.updates
        return {name: jt.array(array) for name, array in self.gradients.items()}


def write(work_dir: Path, settings: dict[str, object], counters: Counters, optimizer: AdamW,
          gradients: dict[str, jt.Var], train_fill: list[list[int]],
          valid_fill: list[list[int]]) -> Path:
    """Writes ``resume.STEP.pt`` whole or not at all and removes older ones; returns its path.

    Raises InputError if it cannot be written, and FloatingPointError if a number in it is not
    finite, for training could not continue from there.
    """
    tables = {"model_state_dict": optimizer.parameters, "m": optimizer.m, "v": optimizer.v,
              "gradients": gradients}
    arrays = {key: {name: var.numpy() for name, var in table.items()}
              for key, table in tables.items()}
    for key, table in arrays.items():
        for name, array in table.items():
            if not np.isfinite(array).all():
                raise FloatingPointError(f"{key} of {name}")
    path = work_dir / f"resume.{counters.step}.pt"
    remove(work_dir, keep=KEPT - 1)  # before writing, so that the disk never holds more than KEPT
    about = {"settings": settings, "counters": asdict(counters), "train_fill": train_fill,
             "valid_fill": valid_fill}
    torch_file.save(path, {**arrays, "about": json.dumps(about)})
    return path


def newest(work_dir: Path) -> TrainState | None:
    """The newest state in ``work_dir`` that is whole, or None if there is none.

    Raises InputError where there are states, but all are damaged.
    """
    damaged = None
    for path in paths(work_dir):
        try:
            return read(path)
        except InputError as error:
            damaged = damaged or error
    if damaged:
        raise damaged
    return None


def read(path: Path) -> TrainState:
    """The state in ``path``; raises InputError where it is none, or damaged."""
    try:
        raw = torch_file.load(path)
        if sum(map(raw["about"].count, "[{")) > 1 << 16:  # each takes some 100 bytes of memory
            raise ValueError
        about = json.loads(raw["about"])
        settings, counters = about["settings"], Counters(**about["counters"])
        tables = [raw[key] for key in ("model_state_dict", "m", "v", "gradients")]
        fills = [about["train_fill"], about["valid_fill"]]
        if not (_is_plain(settings) and _possible(counters) and all(map(_is_table, tables))
                and all((array >= 0).all() for array in tables[2].values())  # mean squares
                and all(_is_fill(fill, settings.get("np")) for fill in fills)):
            raise ValueError
        return TrainState(path, settings, counters, *tables, *fills)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}; check its "
                         "permissions, or remove it") from None
    except (LookupError, AttributeError, TypeError, ValueError, RecursionError) as error:
        refused = f": {error}" if isinstance(error, torch_file.TorchFileError) else ""
        raise InputError(f"{path}: no state of a training run{refused}; remove it") from None


def _is_plain(settings: object) -> bool:
    """Whether this is a dict of values of flags, which messages may show."""
    return isinstance(settings, dict) and len(str(settings)) < 10_000 and all(
        f"{name}{value}".isprintable() and not isinstance(value, dict)
        for name, value in settings.items())


def _possible(counters: Counters) -> bool:
    """Whether these can be the counters of a run; may raise TypeError where they are not.

    metrics.csv, whose size is the second of ``log_sizes``, has a row for each step.
    """
    of_steps = [counters.updates, counters.log_count] + counters.checkpoints
    return all(type(n) is int for n in (counters.step, *of_steps, *counters.log_sizes)) \
        and 0 < counters.step < 2**53 and all(0 <= n <= counters.step for n in of_steps) \
        and counters.checkpoints == sorted(set(counters.checkpoints)) \
        and len(counters.log_sizes) == 2 and counters.log_sizes[0] >= 0 \
        and counters.log_sizes[1] >= counters.step \
        and type(counters.log_sum) is float and math.isfinite(counters.log_sum) \
        and type(counters.best_ppl) is float and counters.best_ppl > 0


def _is_table(table: object) -> bool:
    """Whether this is a dict of float32 arrays of finite numbers."""
    return isinstance(table, dict) and all(
        isinstance(array, np.ndarray) and array.dtype == np.float32 and np.isfinite(array).all()
        for array in table.values())


def _is_fill(states: object, world_size: object) -> bool:
    """Whether this is a list of states of Python's generator, one for each process."""
    return isinstance(states, list) and len(states) == world_size and all(
        isinstance(state, list) and len(state) == 625 and state[-1] in range(625)
        and all(type(n) is int and 0 <= n < 2**32 for n in state)
        and any(state[1:-1])  # from zeros alone it would draw zeros for ever
        for state in states)


def mark_finished(work_dir: Path, settings: dict[str, object], checkpoint: Path) -> None:
    """Notes that a run with these settings has ended with ``checkpoint``, see :func:`finished`."""
    about = {"checkpoint": checkpoint.name, "sha256": sha256(checkpoint), "settings": settings}
    with replacing(work_dir / FINISHED) as file:
        file.write(json.dumps(about).encode("utf-8"))


def finished(work_dir: Path, settings: dict[str, object]) -> Path | None:
    """The last checkpoint if a run with these settings has ended in ``work_dir``, else None."""
    try:
        about = json.loads((work_dir / FINISHED).read_text(encoding="utf-8"))
        checkpoint = work_dir / about["checkpoint"]
        if about["settings"] == settings and about["sha256"] == sha256(checkpoint):
            return checkpoint
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        pass  # none, or damaged
    return None


def remove(work_dir: Path, keep: int = 0, step: int | None = None) -> None:
    """Removes all states but the ``keep`` newest ones, or only that of ``step``."""
    found = paths(work_dir)[keep:] if step is None else [work_dir / f"resume.{step}.pt"]
    for path in found:
        if not path.is_dir():  # no state of ours
            path.unlink(missing_ok=True)


def paths(work_dir: Path) -> list[Path]:
    """The paths of all states, newest first."""
    found = [(int(match[1]), path) for path in work_dir.glob("resume.*.pt")
             if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]
