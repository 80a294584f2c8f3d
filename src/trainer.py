"""The training loop: micro-batches, updates, validation, log lines and checkpoints."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import jittor as jt

import checkpoint
import loralib as lora
from cli import InputError, Progress
from dataset import FTDataset
from model import GPT2LMModel
from optimizer import AdamW, Schedule, clip_gradients
from run_log import RunLog


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
    seed: int


def train(model: GPT2LMModel, optimizer: AdamW, schedule: Schedule, train_data: FTDataset,
          valid_data: FTDataset, options: TrainOptions, say: Callable[[str], None]) -> Path:
    """Trains what ``optimizer`` holds and returns the last checkpoint, which has every weight.

    Leaves WORK_DIR/{train.log, metrics.csv, loss.png, model.STEP.pt}. Raises InputError when the
    loss is no longer finite.
    """
    log = RunLog(options.work_dir, say)
    gradients: dict[str, jt.Var] = {}
    since_log: list[float] = []  # losses since the last log line
    best_ppl = math.inf
    step, log_started = 0, time.perf_counter()
    model.train()
    with Progress(options.max_step, "training", "batch") as bar:
        for epoch, index, batch in _micro_batches(train_data, options):
            step += 1
            started = time.perf_counter()
            lr = schedule(step - 1)
            lora.seed_dropout(model, options.seed, step)
            loss = model.loss(batch.input_ids, batch.target, batch.mask, options.label_smooth)
            _accumulate(gradients, loss / options.grad_acc, optimizer.parameters)
            loss = float(loss.item())
            if not math.isfinite(loss):
                raise InputError(f"{options.work_dir}: the loss is {loss} at step {step}; lower "
                                 "--lr or set --clip")
            if step % options.grad_acc == 0:
                if options.clip > 0:
                    gradients = clip_gradients(gradients, options.clip)
                optimizer.step(gradients, lr)
                gradients = {}
            took = (time.perf_counter() - started) * 1000
            since_log.append(loss)
            average = sum(since_log) / len(since_log)
            bar.update(note=f"loss {loss:.2f}, ppl {_ppl(average):.2f}")

            if step % options.log_interval == 0:
                now = time.perf_counter()
                log.line(f"| epoch {epoch:3d} step {step:>8d} | {index:>6d} batches | "
                         f"lr {schedule(step):.3g} | "
                         f"ms/batch {(now - log_started) * 1000 / len(since_log):5.2f} | "
                         f"loss {loss:5.2f} | avg loss {average:5.2f} | ppl {_ppl(average):5.2f}")
                log_started, since_log = now, []
            if step % options.save_interval == 0 and step < options.max_step:
                save = checkpoint.save_lora if model.lora_config.r else checkpoint.save_model
                save(model, options.work_dir / f"model.{step}.pt")
            valid_loss = None
            if step % options.eval_interval == 0:
                valid_started = time.perf_counter()
                valid_loss = evaluate(model, valid_data, options.seed)
                best_ppl = min(best_ppl, _ppl(valid_loss))
                log.line(f"| Eval {step // options.eval_interval:3d} at step {step:>8d} | "
                         f"time: {time.perf_counter() - valid_started:5.2f}s | "
                         f"valid loss {valid_loss:5.2f} | valid ppl {_ppl(valid_loss):5.2f} | "
                         f"best ppl {best_ppl:5.2f} ")
            log.metrics(step, epoch, lr, loss, valid_loss, took)
    last = options.work_dir / f"model.{step}.pt"
    checkpoint.save_model(model, last)
    log.close()
    return last


def evaluate(model: GPT2LMModel, data: FTDataset, seed: int) -> float:
    """The mean over a data set's batches of their losses, without dropout and smoothing."""
    model.eval()
    losses = []
    with jt.no_grad():
        # Shuffled as the original's loader does, with the epoch it never sets.
        for batch in data.batches(seed, epoch=0):
            losses.append(float(model.loss(batch.input_ids, batch.target, batch.mask).item()))
    model.train()
    return sum(losses) / len(losses)


def _micro_batches(data: FTDataset, options: TrainOptions):
    """(epoch, batches of it so far, batch), both counted from 1, max_step of them at most."""
    epochs = itertools.count(1) if options.max_epoch is None else range(1, options.max_epoch + 1)
    batches = ((epoch, index, batch) for epoch in epochs for index, batch in
               enumerate(data.batches(options.seed, epoch), start=1))
    return itertools.islice(batches, options.max_step)


def _accumulate(gradients: dict[str, jt.Var], loss: jt.Var, parameters: dict[str, jt.Var]) -> None:
    """Adds the gradient of ``loss`` to ``gradients`` (by parameter name, empty at first)."""
    fresh = jt.grad(loss, list(parameters.values()))
    for name, gradient in zip(parameters, fresh):
        gradients[name] = gradients[name] + gradient if name in gradients else gradient
    jt.sync(list(gradients.values()))


def _ppl(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # exp(710) is no longer a float
