"""The training loop: micro-batches, updates, validation, log lines and checkpoints."""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import jittor as jt

import checkpoint
import loralib as lora
import processes
import train_state
from cli import InputError, Interrupted, Progress, StopRequest
from dataset import Batch, FTDataset
from model import GPT2LMModel
from optimizer import AdamW, Schedule, clip_gradients
from run_log import RunLog
from train_state import Counters, TrainState


@dataclass(frozen=True)
class TrainOptions:
    """How to train; steps are micro-batches, of which ``grad_acc`` make an update."""

    work_dir: Path
    max_step: int
    max_epoch: int | None  # None: until max_step
    grad_acc: int
    clip: float  # largest gradient norm, 0: any
    label_smooth: float
    log_interval: int
    eval_interval: int
    save_interval: int
    state_interval: int
    keep_last: int | None  # checkpoints before the last; None: all
    seed: int
    settings: dict[str, object]  # all that a run must share with one it goes on from


def train(model: GPT2LMModel, optimizer: AdamW, schedule: Schedule, train_data: FTDataset,
          valid_data: FTDataset, options: TrainOptions, say: Callable[[str], None],
          state: TrainState | None = None) -> Path:
    """Trains what ``optimizer`` holds and returns the last checkpoint, which has every weight.

    Goes on from ``state`` where there is one, as if the run had never stopped. Leaves
    WORK_DIR/{train.log, metrics.csv, loss.png, model.STEP.pt, model.best.pt}, and resume.STEP.pt
    until the end. Raises InputError when the loss is no longer finite, and Interrupted, the state
    being saved, when the user stops it. Of several processes each sees its share of the samples;
    all hold the same weights, and process 0 writes.
    """
    rank, world_size = processes.rank(), processes.world_size()
    done, gradients = Counters(), {}
    if state:
        done, gradients = state.counters, state.restore(optimizer)
    elif rank == 0:
        train_state.remove(options.work_dir)  # of an earlier run, whose logs go now
    log = RunLog(options.work_dir, say, done.log_sizes or None, write=rank == 0)

    def save(name: str, whole: bool = not model.lora_config.r) -> Path:
        path = options.work_dir / name
        if rank == 0:
            (checkpoint.save_model if whole else checkpoint.save_lora)(model, path)
        return path

    def diverged(what: str) -> InputError:
        flag = "--lora_checkpoint" if model.lora_config.r else "--init_checkpoint"
        return _diverged(options.work_dir, what, flag)

    def save_state() -> None:
        if rank:
            return
        done.log_sizes = log.sync()
        done.updates = optimizer.updates
        try:
            train_state.write(options.work_dir, options.settings, done, optimizer, gradients)
        except FloatingPointError as error:
            raise diverged(f"{error} is no longer finite after step {done.step}") from None

    for _ in range(done.step // options.eval_interval):  # as the validations so far have left it
        deque(valid_data.batches(options.seed, 0, rank, world_size, skip=len(valid_data)), maxlen=0)
    log_started, log_step = time.perf_counter(), done.step
    model.train()
    with StopRequest(say) as stop, Progress(options.max_step, "training", "batch",
                                            initial=done.step) as bar:
        batches = _micro_batches(train_data, options, done.step)
        for epoch, index, batch in itertools.islice(batches, options.max_step - done.step):
            step = done.step + 1
            started = time.perf_counter()
            lr = schedule(step - 1)
            lora.seed_dropout(model, options.seed, step * world_size + rank)
            loss = _loss(model, batch, options.label_smooth)
            accumulate(gradients, loss / options.grad_acc, optimizer.parameters)
            loss, stopped = processes.total_numbers(float(loss.item()), stop.requested)
            if not math.isfinite(loss):
                if rank == 0:  # the weights that gave this
                    train_state.remove(options.work_dir, step=done.step)
                raise diverged(f"the loss is {loss} at step {step}")
            if step % options.grad_acc == 0:
                if options.clip > 0:
                    gradients = clip_gradients(gradients, options.clip)
                optimizer.step(gradients, lr)
                gradients = {}
            took = (time.perf_counter() - started) * 1000
            done.step = step
            done.log_sum += loss
            done.log_count += 1
            average = done.log_sum / done.log_count
            bar.update(note=f"loss {loss:.2f}, ppl {_ppl(average):.2f}")

            if step % options.log_interval == 0:
                now = time.perf_counter()
                log.line(f"| epoch {epoch:3d} step {step:>8d} | {index:>6d} batches | "
                         f"lr {schedule(step):.3g} | "
                         f"ms/batch {(now - log_started) * 1000 / (step - log_step):5.2f} | "
                         f"loss {loss:5.2f} | avg loss {average:5.2f} | ppl {_ppl(average):5.2f}")
                log_started, log_step = now, step
                done.log_sum, done.log_count = 0.0, 0
            if step % options.save_interval == 0 and step < options.max_step:
                save(f"model.{step}.pt")
                done.checkpoints.append(step)
                if rank == 0:
                    _prune(options.work_dir, done.checkpoints, options.keep_last)
            valid_loss = None
            if step % options.eval_interval == 0:
                valid_started = time.perf_counter()
                valid_loss = evaluate(model, valid_data, options.seed)
                if _ppl(valid_loss) < done.best_ppl:
                    done.best_ppl = _ppl(valid_loss)
                    save("model.best.pt")
                log.line(f"| Eval {step // options.eval_interval:3d} at step {step:>8d} | "
                         f"time: {time.perf_counter() - valid_started:5.2f}s | "
                         f"valid loss {valid_loss:5.2f} | valid ppl {_ppl(valid_loss):5.2f} | "
                         f"best ppl {done.best_ppl:5.2f} ")
            log.metrics(step, epoch, lr, loss, valid_loss, took)
            if step < options.max_step:
                if stopped:
                    save_state()
                    processes.total_numbers(0)  # none ends before the state is on disk
                    raise Interrupted(f"stopped after step {step}; to continue: the same command "
                                      "with --resume")
                if step % options.state_interval == 0:
                    save_state()
    last = save(f"model.{done.step}.pt", whole=True)
    log.close()
    if rank == 0:
        train_state.remove(options.work_dir)
    return last


def evaluate(model: GPT2LMModel, data: FTDataset, seed: int) -> float:
    """The mean over a data set's batches of their losses, without dropout and smoothing."""
    model.eval()
    losses = []
    with jt.no_grad():
        # Shuffled as the original's loader does, with the epoch it never sets.
        for batch in data.batches(seed, 0, processes.rank(), processes.world_size()):
            losses += processes.total_numbers(float(_loss(model, batch).item()))
    model.train()
    return sum(losses) / len(losses)


def _loss(model: GPT2LMModel, batch: Batch, label_smooth: float = 0.0) -> jt.Var:
    """What this process adds to the loss of all processes' batches taken as one."""
    loss = model.loss(batch.input_ids, batch.target, batch.mask, label_smooth)
    if processes.world_size() == 1:
        return loss
    # Its mean is over its own tokens; that of all counts each token once.
    tokens = float(batch.mask.sum())
    all_tokens, = processes.total_numbers(tokens)
    return loss * ((tokens + 0.0001) / (all_tokens + 0.0001))


def _micro_batches(data: FTDataset, options: TrainOptions, done: int):
    """(epoch, batches of it so far, batch), both counted from 1, without the first ``done``."""
    rank, world_size = processes.rank(), processes.world_size()
    an_epoch = -(-len(data) // world_size) // data.batch_size  # incomplete ones are dropped
    for epoch in itertools.count(1):
        if options.max_epoch is not None and epoch > options.max_epoch:
            return
        skip = min(done, an_epoch)
        done -= skip
        for index, batch in enumerate(data.batches(options.seed, epoch, rank, world_size,
                                                   drop_last=True, skip=skip), start=skip + 1):
            yield epoch, index, batch


def _prune(work_dir: Path, steps: list[int], keep: int | None) -> None:
    """Removes the checkpoints of all but the last ``keep`` of ``steps``, there and here."""
    while keep is not None and len(steps) > keep:
        (work_dir / f"model.{steps.pop(0)}.pt").unlink(missing_ok=True)


def _diverged(work_dir: Path, what: str, flag: str) -> InputError:
    """What went wrong, and the weights from which another run may start."""
    good = train_state.paths(work_dir)
    start = f", e.g. with {flag} {good[0]}, the last good state" if good else ""
    return InputError(f"{work_dir}: {what}; start anew with a lower --lr or with --clip{start}")


def accumulate(gradients: dict[str, jt.Var], loss: jt.Var, parameters: dict[str, jt.Var]) -> None:
    """Adds the gradient of all processes' ``loss`` to ``gradients`` (by name, empty at first)."""
    fresh = processes.total(jt.grad(loss, list(parameters.values())))
    for name, gradient in zip(parameters, fresh):
        gradients[name] = gradients[name] + gradient if name in gradients else gradient
    jt.sync(list(gradients.values()))


def _ppl(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # exp(710) is no longer a float
