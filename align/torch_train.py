"""Fine-tunes GPT-2 in PyTorch with the flags, logs, metrics and checkpoints of src/gpt2_ft.py.

    python align/torch_train.py @data/experiment.ini --train_data F --valid_data F

WORK_DIR gets train.log (the log lines), metrics.csv (a row for each micro-batch), model.STEP.pt.
``--precision bf16`` computes matrix products in bfloat16, ``float64`` all in double precision.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import time
from pathlib import Path

import torch

import torch_flags
import torch_model
from common import ArgumentParser, InputError, Progress, log, run
from torch_data import FTDataset, make_loader, read_samples
from torch_optim import SCHEDULERS, AdamW, make_schedule, parameter_groups

COLUMNS = ("step", "epoch", "lr", "loss", "valid_loss", "ms_per_batch")


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser("LoRA fine-tuning of GPT-2 by PyTorch.", "gpt2_ft")
    torch_flags.add_model_flags(parser, card="gpt2.md")
    positive = torch_flags.at_least(1)
    data = parser.add_argument_group("data")
    data.add_argument("--train_data", required=True, metavar="JSONL")
    data.add_argument("--valid_data", required=True, metavar="JSONL")
    data.add_argument("--train_batch_size", type=positive, default=8)
    data.add_argument("--valid_batch_size", type=positive, default=4)
    data.add_argument("--obj", choices=["clm", "jlm"], default="clm",
                      help="train on the completion (clm) or on the context too (jlm)")
    data.add_argument("--random_seed", type=int, default=10)
    steps = parser.add_argument_group("steps, all counted in micro-batches")
    steps.add_argument("--max_epoch", type=positive)
    steps.add_argument("--max_step", type=positive)
    steps.add_argument("--log_interval", type=positive, default=100)
    steps.add_argument("--eval_interval", type=positive, default=2000)
    steps.add_argument("--save_interval", type=positive, default=500)
    rule = parser.add_argument_group("training")
    rule.add_argument("--lr", type=float, default=0.00001)
    rule.add_argument("--scheduler", choices=SCHEDULERS, default="linear")
    rule.add_argument("--warmup_step", type=torch_flags.at_least(0), default=0)
    rule.add_argument("--i_steps", default="0", help="cycle: steps, e.g. 0,100,500")
    rule.add_argument("--i_lrs", default="0.00025", help="cycle: rates, e.g. 0,0.0002,0")
    rule.add_argument("--weight_decay", type=float, default=0.01)
    rule.add_argument("--adam_beta1", type=float, default=0.9)
    rule.add_argument("--adam_beta2", type=float, default=0.98)
    rule.add_argument("--adam_epislon", "--adam_epsilon", type=float, default=1e-6)
    rule.add_argument("--correct_bias", action=argparse.BooleanOptionalAction, default=False)
    rule.add_argument("--no_decay_bias", action="store_true")
    rule.add_argument("--grad_acc", type=positive, default=1)
    rule.add_argument("--clip", type=float, default=0.0, help="largest gradient norm; 0: no limit")
    rule.add_argument("--lora_dropout", type=float, default=0.0)
    rule.add_argument("--label_smooth", type=float, default=0.0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.random_seed)
    model = torch_flags.make_model(args, args.lora_dropout)
    vocab_size = model.config.vocab_size
    train_data = FTDataset(read_samples(args.train_data, vocab_size), args.train_batch_size,
                           args.seq_len, joint_lm=args.obj == "jlm")
    valid_data = FTDataset(read_samples(args.valid_data, vocab_size), args.valid_batch_size,
                           args.seq_len)
    optimizer = AdamW(parameter_groups(model, args.no_decay_bias), args.lr,
                      (args.adam_beta1, args.adam_beta2), args.adam_epislon, args.weight_decay,
                      args.correct_bias)
    i_steps, i_lrs = cycle_points(args)
    max_step = last_step(args, i_steps, train_data.num_batches)
    schedule = make_schedule(args.scheduler, args.lr, max_step, args.warmup_step, i_steps, i_lrs,
                             optimizer)
    train(model, optimizer, schedule,
          make_loader(train_data, args.random_seed, drop_last=True),
          make_loader(valid_data, args.random_seed, drop_last=False), max_step, args)


def cycle_points(args: argparse.Namespace) -> tuple[list[int], list[float]]:
    """--i_steps and --i_lrs as numbers. Raises InputError if they are no schedule."""
    try:
        i_steps = [int(item) for item in args.i_steps.split(",")]
        i_lrs = [float(item) for item in args.i_lrs.split(",")]
    except ValueError:
        raise InputError(f"--i_steps {args.i_steps} --i_lrs {args.i_lrs}: not numbers; write them "
                         "as 0,100,500 and 0,0.0002,0") from None
    if len(i_steps) != len(i_lrs) or sorted(set(i_steps)) != i_steps:
        raise InputError(f"--i_steps {args.i_steps} --i_lrs {args.i_lrs}: give as many rates as "
                         "steps, and the steps in ascending order")
    if args.scheduler == "cycle" and i_steps[-1] < 1:
        raise InputError(f"--i_steps {args.i_steps}: --scheduler cycle ends at its last step; give "
                         "it, e.g. --i_steps 0,100,500 --i_lrs 0,0.0002,0")
    return i_steps, i_lrs


def last_step(args: argparse.Namespace, i_steps: list[int], batches: int) -> int:
    """The micro-batch at which the schedule ends; training ends then at the latest."""
    if args.scheduler == "cycle":
        return i_steps[-1]
    if args.max_step is not None:
        return args.max_step
    if args.max_epoch is None:
        raise InputError("no end is given; add --max_epoch N or --max_step N")
    return args.max_epoch * batches


def train(model, optimizer, schedule, train_loader, valid_loader, max_step, args) -> None:
    """Runs all epochs and writes logs, metrics and checkpoints to ``args.work_dir``."""
    work_dir = Path(args.work_dir)
    batches = len(train_loader)
    total = max_step if args.max_epoch is None else min(max_step, args.max_epoch * batches)
    losses, times, best_ppl = [], [], math.inf  # losses and times: since the last log line
    model.train()
    with Report(work_dir) as report, Progress(total, "training", "batch") as bar:
        for step, (epoch, number, batch) in enumerate(micro_batches(train_loader, total), start=1):
            started, lr = time.perf_counter(), schedule.lr
            loss = batch_loss(model, batch, args.label_smooth)
            (loss / args.grad_acc).backward()
            if step % args.grad_acc == 0:
                if args.clip > 0:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
                optimizer.step()
                optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
            times.append((time.perf_counter() - started) * 1000)
            bar.update(note=f"loss {losses[-1]:.2f}, ppl {perplexity(losses[-1]):.2f}")

            row = dict(step=step, epoch=epoch, lr=lr, loss=losses[-1], ms_per_batch=times[-1])
            if step % args.log_interval == 0 or step == total:
                mean = sum(losses) / len(losses)
                report.line(f"| epoch {epoch:3d} step {step:>8d} | {number:>6d} batches | "
                            f"lr {schedule.lr:.3g} | ms/batch {sum(times) / len(times):5.2f} | "
                            f"loss {losses[-1]:5.2f} | avg loss {mean:5.2f} | "
                            f"ppl {perplexity(mean):5.2f}")
                losses, times = [], []
            if step % args.save_interval == 0 and step < total:
                torch_model.save_weights(model, work_dir / f"model.{step}.pt",
                                         lora_only=args.lora_dim > 0)
            if step % args.eval_interval == 0:
                started = time.perf_counter()
                row["valid_loss"] = evaluate(model, valid_loader)
                ppl = perplexity(row["valid_loss"])
                best_ppl = min(best_ppl, ppl)
                report.line(f"| Eval {step // args.eval_interval:3d} at step {step:>8d} | "
                            f"time: {time.perf_counter() - started:5.2f}s | "
                            f"valid loss {row['valid_loss']:5.2f} | valid ppl {ppl:5.2f} | "
                            f"best ppl {best_ppl:5.2f} ")
            report.row(row)
    torch_model.save_weights(model, work_dir / f"model.{total}.pt")
    log(f"saved {work_dir / f'model.{total}.pt'}")


def micro_batches(loader, total: int):
    """Yields ``total`` times (epoch, number of the batch in it, batch); both count from 1."""
    done = 0
    for epoch in itertools.count(start=1):
        loader.sampler.set_epoch(epoch)
        for number, batch in enumerate(loader, start=1):
            yield epoch, number, batch
            done += 1
            if done == total:
                return


def batch_loss(model, batch: dict, label_smooth: float) -> torch.Tensor:
    """The loss of one batch, a differentiable scalar."""
    logits = model(batch["input"].to(model.device), use_cache=False).logits  # (B, T, V)
    return torch_model.loss(logits, batch["target"].to(model.device),
                            batch["mask"].to(model.device, model.dtype), label_smooth)


@torch.no_grad()
def evaluate(model, loader) -> float:
    """The mean of the batches' losses, without label smoothing."""
    model.eval()
    losses = [batch_loss(model, batch, label_smooth=0.0).item() for batch in loader]
    model.train()
    return sum(losses) / len(losses)


def perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


class Report:
    """Writes train.log and metrics.csv to the work folder, each line immediately."""

    def __init__(self, work_dir: Path):
        try:
            work_dir.mkdir(parents=True, exist_ok=True)
            self.log_file = open(work_dir / "train.log", "w", encoding="utf-8", buffering=1)
            self.csv_file = open(work_dir / "metrics.csv", "w", newline="", encoding="utf-8",
                                 buffering=1)
        except OSError as error:
            raise InputError(f"{work_dir}: cannot be written: {error.strerror}; choose another "
                             "--work_dir") from None
        self.rows = csv.DictWriter(self.csv_file, COLUMNS, lineterminator="\n")
        self.rows.writeheader()

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *_) -> None:
        self.log_file.close()
        self.csv_file.close()

    def line(self, text: str) -> None:
        """One log line, on screen too."""
        log(text)
        self.log_file.write(f"{text}\n")

    def row(self, values: dict) -> None:
        """One micro-batch; floats keep their full precision."""
        self.rows.writerow(values)


if __name__ == "__main__":
    run(main)
