"""Training: one step (:class:`Trainer`), and a run of many with all that it leaves behind
(:class:`TrainingRun`)."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator, Sequence

import jittor as jt
import numpy as np

import about
import checkpoint
import lora
import train_state
from dataset import Batch, FTDataset, Sample
from model import GPT2LMModel
from optimizer import AdamW, Schedule, clip_gradients
from run_log import RunLog, captions
from runtime import processes
from runtime.errors import InputError, Interrupted
from train_state import Counters, TrainState

# How many tokens are computed at once: more make matrix products hardly faster, but take memory.
TOKENS_AT_ONCE = 512


def joined_batches(data: FTDataset, grad_acc: int) -> int:
    """How many micro-batches of an update to compute as one, see :meth:`Trainer.unit`.

    It depends on settings and data alone, so that processes agree and a resumed run repeats it.
    """
    return max(1, min(grad_acc, int(TOKENS_AT_ONCE / (data.batch_size * data.mean_tokens()))))


@dataclass(frozen=True)
class TrainOptions:
    """How a step trains. A step is a micro-batch; ``grad_acc`` of them make an update."""

    grad_acc: int = 1
    joined: int = 1  # how many micro-batches of an update are computed as one, at most
    clip: float = 0.0  # largest norm of the whole gradient; 0: no limit
    label_smooth: float = 0.0
    seed: int = 10  # of dropout and of the order of samples


class Trainer:
    """A model in training: its optimizer, the gradients since the last update, the steps done.

    Consecutive micro-batches of an update are a unit: :meth:`backward` computes them as one, which
    is faster, and :meth:`step` ends each of them. If there are several processes, each calls
    both for batches of its own; all hold the same weights.
    """

    def __init__(self, model: GPT2LMModel, optimizer: AdamW, schedule: Schedule,
                 options: TrainOptions):
        self.model, self.optimizer = model, optimizer
        self.schedule, self.options = schedule, options
        self.steps = 0
        self.gradients: dict[str, jt.Var] = {}  # by parameter name; empty after an update
        model.train()

    def unit(self, left: int) -> int:
        """How many micro-batches the next unit has, of ``left``."""
        done, joined = self.steps % self.options.grad_acc, self.options.joined
        return min(joined - done % joined, self.options.grad_acc - done, left)

    def backward(self, batches: Sequence[Batch]) -> list[float]:
        """Adds the gradients of a unit to ``gradients``; returns the loss of each micro-batch.

        A loss is over all processes' batches. Raises FloatingPointError if one is not finite.
        """
        options, first = self.options, self.steps + 1
        steps = range(first, first + len(batches))
        lora.seed_dropout(self.model, options.seed, [
            step * processes.world_size() + processes.rank() for step in steps])
        shares = self._shares_of_losses(batches)  # (parts,)
        self._accumulate(shares.sum() / options.grad_acc)
        losses = processes.total_array(shares.numpy()).tolist()
        for step, loss in zip(steps, losses):
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} at step {step}")
        return losses

    def step(self) -> None:
        """Ends a micro-batch that :meth:`backward` computed, each grad_acc-th with an update."""
        if (self.steps + 1) % self.options.grad_acc == 0:
            self._update()
        self.steps += 1

    def evaluate(self, data: FTDataset) -> float:
        """The mean loss over a data set's batches, without dropout and label smoothing.

        The targets are the tokens of the completions. A batch's loss is the mean over its targets.
        """
        # Shuffled as by the original's loader, whose epoch stays 0 in validation.
        batches = data.sample_batches(self.options.seed, 0, processes.rank(),
                                      processes.world_size())
        self.model.eval()
        losses: dict[Sample, float] = {}
        with jt.no_grad():
            for group in _groups(sorted({sample for batch in batches for sample in batch
                                         if sample[1]})):
                losses.update(zip(group, self.model.completion_losses(group)))
        self.model.train()
        sums = [sum(losses.get(sample, 0.0) for sample in batch) for batch in batches]
        targets = [sum(len(completion) for _, completion in batch) for batch in batches]
        totals, counts = processes.total_array(np.array([sums, targets], np.float32))
        return float(np.mean(totals / (counts + 0.0001), dtype=np.float64))

    def _shares_of_losses(self, batches: Sequence[Batch]) -> jt.Var:
        """What this process adds to the losses (parts,) of all processes' micro-batches."""
        input_ids, target, mask = (np.concatenate(arrays) for arrays in zip(*(
            (batch.input_ids, batch.target, batch.mask) for batch in batches)))
        losses = self.model.loss(input_ids, target, mask, self.options.label_smooth, len(batches))
        if processes.world_size() == 1:
            return losses
        # The model's loss is the mean over this process's targets: weight it by their number.
        targets = mask.reshape((len(batches), -1)).sum(axis=1)
        return losses * jt.array((targets + 0.0001) / (processes.total_array(targets) + 0.0001))

    def _accumulate(self, loss: jt.Var) -> None:
        """Adds the gradient of the sum of all processes' ``loss`` to ``gradients``."""
        parameters = self.optimizer.parameters
        new = processes.total(jt.grad(loss, list(parameters.values())))
        for name, gradient in zip(parameters, new):
            old = self.gradients.get(name)
            self.gradients[name] = gradient if old is None else old + gradient
        jt.sync(list(self.gradients.values()))

    def _update(self) -> None:
        """Updates the weights by the gradients added up, at the learning rate of this step."""
        if self.options.clip > 0:
            self.gradients = clip_gradients(self.gradients, self.options.clip)
        self.optimizer.step(self.gradients, self.schedule(self.steps))
        self.gradients = {}


def _groups(samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """Divides samples, sorted by context, into groups of about TOKENS_AT_ONCE tokens."""
    group: list[Sample] = []
    tokens = 0
    for context, completion in samples:
        if tokens >= TOKENS_AT_ONCE:
            yield group
            group, tokens = [], 0
        tokens += len(completion) + (0 if group and group[-1][0] == context else len(context))
        group.append((context, completion))
    if group:
        yield group


@dataclass(frozen=True)
class RunOptions:
    """How long a run lasts, and what it leaves when; intervals are in steps."""

    work_dir: Path
    max_step: int
    max_epoch: int | None  # None: no limit but max_step
    log_interval: int
    eval_interval: int
    save_interval: int
    state_interval: int
    keep_last: int | None  # how many checkpoints before the last to keep; None: all
    settings: dict[str, object]  # what a run must share with the one that it resumes
    title: str = ""  # of the loss curve
    data: str = ""  # the name of the data set, for the checkpoints


class TrainingRun:
    """Trains on ``train_data``, validates on ``valid_data`` and writes files to WORK_DIR.

    These are train.log, metrics.csv, loss.png, model.STEP.pt, model.best.pt, and until the end
    resume.STEP.pt. If there are several processes, process 0 writes. ``say`` gets each log line.
    """

    def __init__(self, trainer: Trainer, train_data: FTDataset, valid_data: FTDataset,
                 options: RunOptions, say: Callable[[str], None]):
        self.trainer, self.train_data, self.valid_data = trainer, train_data, valid_data
        self.options, self.say = options, say
        self.counters = Counters()
        self.last_step = options.max_step
        if options.max_epoch:
            epoch = train_data.full_batches(processes.world_size())
            self.last_step = min(options.max_step, options.max_epoch * epoch)
        self.writes = processes.rank() == 0
        self.only_lora = trainer.model.lora_config.r > 0  # only LoRA trains

    def run(self, state: TrainState | None = None,
            stop_requested: Callable[[], bool] = lambda: False,
            on_step: Callable[[str], None] = lambda note: None) -> Path:
        """Trains to the end and returns the last checkpoint, which has every weight.

        Continues from ``state``, if given, as if the run had never stopped. ``on_step`` gets the
        mean loss since the last log line and its perplexity, in words, after each step. Raises
        InputError when the loss is no longer finite, and Interrupted, after it saved the state,
        when ``stop_requested``.
        """
        options, trainer, counters = self.options, self.trainer, self._begin(state)
        first, last_log = trainer.steps, (trainer.steps, time.perf_counter())
        for unit in self._units():
            begun, started = trainer.steps, time.perf_counter()
            losses = self._backward([batch for _, _, batch in unit])
            seconds = (time.perf_counter() - started) / len(unit)  # of a micro-batch
            for left, (epoch, index, _), loss in zip(reversed(range(len(unit))), unit, losses):
                started = time.perf_counter()
                trainer.step()
                step, ended = trainer.steps, time.perf_counter()
                counters.log_sum += loss
                counters.log_count += 1
                average = counters.log_sum / counters.log_count
                on_step(f"avg loss {average:.2f}, ppl {_ppl(average):.2f}")

                now = step, ended - left * seconds  # without the micro-batches that are left
                if step % options.log_interval == 0 or step == self.last_step:
                    self._log_step(epoch, index, loss, last_log, now)
                    last_log = now
                elif step - first <= trainer.options.grad_acc:  # up to its end Jittor compiles
                    last_log = now
                if step % options.save_interval == 0 and step < self.last_step:
                    self._save_checkpoint()
                valid_loss = self._validate() if step % options.eval_interval == 0 else None
                self.log.metrics(step, epoch, trainer.schedule(step - 1), loss, valid_loss,
                                 (seconds + ended - started) * 1000)
            if step < self.last_step:
                if processes.total_number(stop_requested()):  # in any process
                    self._stop()
                if step // options.state_interval > begun // options.state_interval:
                    self._save_state()
        return self._finish()

    def _begin(self, state: TrainState | None) -> Counters:
        """Restores ``state`` or, without one, removes what an earlier run left to resume from."""
        if state is not None:
            if state.counters.step >= self.last_step:
                raise InputError(f"{state.path}: after step {state.counters.step}, but the run has "
                                 f"{self.last_step} steps; remove it")
            self.counters = state.counters
            self.trainer.gradients = state.restore(self.trainer.optimizer)
            self.trainer.steps = state.counters.step
            for data, states in ((self.train_data, state.train_fill),
                                 (self.valid_data, state.valid_fill)):
                data.fill_state = states[processes.rank()]
        elif self.writes:
            train_state.remove(self.options.work_dir)
            (self.options.work_dir / train_state.FINISHED).unlink(missing_ok=True)
        self.log = RunLog(self.options.work_dir, self.say,
                          state.counters.log_sizes if state else None, self.writes,
                          captions(self.options.title, self.trainer.options.label_smooth,
                                   self.train_data.joint_lm))
        return self.counters

    def _units(self) -> Iterator[list[tuple[int, int, Batch]]]:
        """The micro-batches that are left, those together that are computed as one."""
        micro_batches = self._micro_batches()
        while left := self.last_step - self.trainer.steps:
            yield list(itertools.islice(micro_batches, self.trainer.unit(left)))

    def _micro_batches(self) -> Iterator[tuple[int, int, Batch]]:
        """(epoch, number in it, batch) of the steps to come, for ever; the numbers begin at 1."""
        trainer, data, world_size = self.trainer, self.train_data, processes.world_size()
        epochs, first = divmod(trainer.steps, data.full_batches(world_size))
        for epoch in itertools.count(epochs + 1):
            batches = data.batches(trainer.options.seed, epoch, processes.rank(), world_size,
                                   drop_last=True, first=first)
            for index, batch in enumerate(batches, start=first + 1):
                yield epoch, index, batch
            first = 0

    def _backward(self, batches: list[Batch]) -> list[float]:
        try:
            return self.trainer.backward(batches)
        except FloatingPointError as error:
            if self.writes:  # the state of these weights
                train_state.remove(self.options.work_dir, step=self.trainer.steps)
            raise self._diverged(error) from None

    def _log_step(self, epoch: int, index: int, loss: float, last_log: tuple[int, float],
                  now: tuple[int, float]) -> None:
        """The original's log line; averages are over the steps since the one before."""
        step, counters = self.trainer.steps, self.counters
        average = counters.log_sum / counters.log_count
        milliseconds = (now[1] - last_log[1]) * 1000 / (now[0] - last_log[0])
        self.log.line(f"| epoch {epoch:3d} step {step:>8d} | {index:>6d} batches | "
                      f"lr {self.trainer.schedule(step):.3g} | ms/batch {milliseconds:5.2f} | "
                      f"loss {loss:5.2f} | avg loss {average:5.2f} | ppl {_ppl(average):5.2f}")
        counters.log_sum, counters.log_count = 0.0, 0

    def _validate(self) -> float:
        """Logs the validation loss and returns it; keeps the best weights in model.best.pt."""
        step, started = self.trainer.steps, time.perf_counter()
        loss = self.trainer.evaluate(self.valid_data)
        if _ppl(loss) < self.counters.best_ppl:
            self.counters.best_ppl = _ppl(loss)
            self._save("model.best.pt")
        self.log.line(f"| Eval {step // self.options.eval_interval:3d} at step {step:>8d} | "
                      f"time: {time.perf_counter() - started:5.2f}s | valid loss {loss:5.2f} | "
                      f"valid ppl {_ppl(loss):5.2f} | best ppl {self.counters.best_ppl:5.2f} ")
        return loss

    def _save_checkpoint(self) -> None:
        """Saves model.STEP.pt and removes the oldest beyond the last ``keep_last`` of them."""
        steps, keep = self.counters.checkpoints, self.options.keep_last
        self._save(f"model.{self.trainer.steps}.pt")
        steps.append(self.trainer.steps)
        while keep is not None and len(steps) > keep:
            oldest = self.options.work_dir / f"model.{steps.pop(0)}.pt"
            if self.writes:
                oldest.unlink(missing_ok=True)

    def _save(self, name: str, whole: bool = False) -> Path:
        """Saves what trains or, if ``whole``, every weight."""
        path = self.options.work_dir / name
        if self.writes:
            save = checkpoint.save_lora if self.only_lora and not whole else checkpoint.save_model
            model = self.trainer.model
            save(model, path, about.describe(model.config, model.lora_config, self.options.data,
                                             self.trainer.steps))
        return path

    def _save_state(self) -> None:
        """Saves resume.STEP.pt."""
        fills = [processes.gather(data.fill_state) for data in (self.train_data, self.valid_data)]
        if not self.writes:
            return
        optimizer, counters = self.trainer.optimizer, self.counters
        counters.step, counters.updates = self.trainer.steps, optimizer.updates
        counters.log_sizes = self.log.sync()
        try:
            train_state.write(self.options.work_dir, self.options.settings, counters, optimizer,
                              self.trainer.gradients, *fills)
        except FloatingPointError as error:
            raise self._diverged(f"{error} is no longer finite after step {self.trainer.steps}"
                                 ) from None

    def _stop(self) -> None:
        """Saves the state and raises Interrupted."""
        self._save_state()
        processes.barrier()  # the first process that ends makes mpirun end the others
        raise Interrupted(f"stopped after step {self.trainer.steps}; to continue: the same "
                          "command with --resume")

    def _finish(self) -> Path:
        """Saves the whole model; the run can no longer be resumed."""
        last = self._save(f"model.{self.trainer.steps}.pt", whole=True)
        self.log.close()
        if self.writes:
            train_state.mark_finished(self.options.work_dir, self.options.settings, last)
            train_state.remove(self.options.work_dir)
        return last

    def _diverged(self, what: object) -> InputError:
        """The error to end with, which names the last good weights if there are any."""
        flag = "--lora_checkpoint" if self.only_lora else "--init_checkpoint"
        good = train_state.paths(self.options.work_dir)
        start = f", e.g. with {flag} {good[0]}, the last good state" if good else ""
        return InputError(f"{self.options.work_dir}: {what}; start anew with a lower --lr or with "
                          f"--clip{start}")


def _ppl(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # exp(710) is no longer a float
