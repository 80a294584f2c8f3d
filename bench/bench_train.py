"""Measures training of GPT-2 with LoRA on E2E: time of a micro-batch, start-up time, peak memory.

Ours and other programs train on the same batches in alternation, each in the precisions that it
has. The same run measures the fastest matrix products in each precision, to which the speed of
each side is compared. A side whose packages are missing is left out.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path
from statistics import median

import conditions
import flops
import model_files
import quiet
import report
import samples
import sides
from shared import (
    FLAGS,
    LORA,
    MODEL_CARDS,
    ROOT,
    TRAIN,
    WORK,
    ArgumentParser,
    FTDataset,
    InputError,
    Progress,
    at_least,
    log,
    run,
)
from workers import Worker, in_turns

PRECISIONS = ("float32", "bf16")
SHAPES = [(128, 768, 3072), (1024, 1024, 1024), (2048, 2048, 2048), (3072, 3072, 3072)]
LIMIT = sides.Program("matrix products", "side_onednn.py")


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__, prog="bench/run.sh train")
    parser.add_argument("--card", choices=MODEL_CARDS, default="gpt2.sm", help="size of GPT-2")
    parser.add_argument("--sides", type=sides.some_of(sides.TRAINING),
                        default=",".join(sides.TRAINING),
                        help="programs beside ours, such as torch,compiled")
    parser.add_argument("--precisions", type=sides.some_of(PRECISIONS),
                        default=",".join(PRECISIONS), help="of the programs that have them")
    parser.add_argument("--rounds", type=at_least(1), default=8, help="blocks of each side")
    parser.add_argument("--block", type=at_least(1), default=4,
                        help="micro-batches of a block; a multiple of grad_acc")
    parser.add_argument("--warm_up", type=at_least(1), default=12,
                        help="micro-batches of each side before its first block")
    parser.add_argument("--runs", type=at_least(0), default=3,
                        help="whole runs of each program, for memory and start-up time; 0: none")
    conditions.add_flags(parser, "train")
    args = parser.parse_args()
    for flag in ("block", "warm_up"):
        if getattr(args, flag) % TRAIN["grad_acc"]:
            parser.error(f"--{flag} must be a multiple of {TRAIN['grad_acc']} (grad_acc)")
    return args


def main() -> None:
    args = parse_args()
    conditions.limit_instructions(args.isa)
    data, source = samples.of_e2e("train")
    model = model_files.random_model(args.card)
    results = {**steps(args, model, data), "data": source}
    if args.runs:
        results["programs"] = programs(args, model, data)
    report.write(args.name, results, describe(results))


def steps(args: argparse.Namespace, model: dict, data: Path) -> dict:
    """Times micro-batches and matrix products of all sides in alternation."""
    chosen = sides.choose(sides.TRAINING, args.sides, args.precisions)
    precisions = sorted({side.precision for side in chosen.values()}, reverse=True)
    chosen["limit"] = sides.Side(LIMIT, "/".join(precisions))
    flags = {flag: value for flag, value in TRAIN.items() if flag != "lora_dropout"}

    def products(worker: Worker) -> dict[str, list[float]]:
        return worker.ask("products", shapes=SHAPES, precisions=precisions, repeats=3)

    def prepare(key: str, worker: Worker) -> None:
        if key == "limit":
            products(worker)
            return
        side = chosen[key]
        worker.ask("load", **model, lora_dropout=TRAIN["lora_dropout"], precision=side.precision,
                   **dict(side.program.options))
        worker.ask("start_training", data=str(data), **flags)
        worker.ask("train", steps=args.warm_up)

    with ExitStack() as stack:
        team = sides.Team(stack, chosen)
        team.start(args.device, prepare)
        watch = quiet.Watch(team.pids, args.quiet)

        def ask(key: str, _: int) -> dict:
            worker = team.workers[key]
            return products(worker) if key == "limit" else worker.ask("train", steps=args.block)

        rounds = []
        with Progress(args.rounds, "training", "round") as bar:
            for answers in in_turns(team.workers, args.rounds, ask, watch):
                rounds.append(answers)
                bar.update()
        peaks = {key: quiet.peak_mib(pid) for key, pid in team.pids.items()}
    limits = {} if "limit" not in team.workers else products_of(rounds)
    trained = [key for key in team.workers if key != "limit"]
    return {**report.setting(team.starts, args), "card": args.card, "flags": TRAIN,
            "lora": LORA, "block": args.block, "warm_up": args.warm_up, "shapes": SHAPES,
            "left_out": team.left_out, "quiet": watch.summary(), "limits": limits,
            **judge({key: chosen[key] for key in trained}, rounds, limits,
                    needed_flops(args, data, watch.kept), peaks)}


def products_of(rounds: list[dict]) -> dict[str, list[float]]:
    """GFLOP/s of each shape of SHAPES by precision, medians over rounds."""
    return {precision: [flops.matmul(*shape) / 1e6 / median(
        answers["limit"][precision][n] for answers in rounds) for n, shape in enumerate(SHAPES)]
        for precision in rounds[0]["limit"]}


def judge(chosen: dict[str, sides.Side], rounds: list[dict], limits: dict[str, list[float]],
          needed: list[list[int]], peaks: dict[str, float | None]) -> dict:
    """Medians, ratios, and the share of the speed of matrix products that each side reaches.

    ``needed`` has the operations of each round's micro-batches.
    """
    def updates(values: list[float]) -> list[float]:
        # Means over an update, because only its last micro-batch includes the optimizer step.
        acc = TRAIN["grad_acc"]
        return [sum(values[n:n + acc]) / acc for n in range(0, len(values), acc)]

    blocks = {key: [updates(answers[key]["ms"]) for answers in rounds] for key in chosen}
    counts = list(chain(*map(updates, needed)))
    found = {}
    for key, side in chosen.items():
        times = list(chain(*blocks[key]))
        reached = [count / 1e6 / ms for count, ms in zip(counts, times)]  # GFLOP/s
        limit = limits.get(side.precision)
        found[key] = {
            "title": side.title, "ms_per_batch": report.spread(times),
            "gflops": report.spread(reached), "peak_mib": peaks[key],
            "of_limit": median(reached) / max(limit) if limit else None,
            "ratios": {own: report.ratio(blocks[own], blocks[key])
                       for own in sides.ours(chosen) if own != key},
            "blocks": [answers[key]["ms"] for answers in rounds],
            "losses": [answers[key]["loss"] for answers in rounds]}
    return {"sides": found, "ours": sides.ours(chosen),
            "needed_gflop": report.spread(n / 1e9 for n in chain(*needed))}


def needed_flops(args: argparse.Namespace, data: Path, rounds: list[int]) -> list[list[int]]:
    """The operations of each micro-batch of these rounds, dropped ones counted; see flops.py."""
    dataset = FTDataset(data, TRAIN["batch_size"], TRAIN["seq_len"])
    last = args.warm_up + (max(rounds) + 1) * args.block
    batches = (batch for epoch in range(1, last + 1)
               for batch in dataset.batches(TRAIN["seed"], epoch))
    counts = [flops.micro_batch(batch.mask, MODEL_CARDS[args.card], LORA["r"])
              for batch in islice(batches, args.warm_up, last)]
    return [counts[n * args.block:(n + 1) * args.block] for n in rounds]


def programs(args: argparse.Namespace, model: dict, data: Path) -> dict:
    """Whole runs of the training programs: peak memory, seconds to the first step.

    Each first runs once untimed, so that Jittor's operators are compiled and the files cached.
    """
    commands = {"src/gpt2_ft.py": []}
    if "bf16" in args.precisions:
        commands["src/gpt2_ft.py --precision bf16"] = []
    if "align" in args.sides:
        commands["align/torch_train.py"] = []
    for command in list(commands):
        try:
            whole_run(args, model, data, command)
        except InputError as error:
            if command == "src/gpt2_ft.py":
                raise
            log(f"{command}: left out ({error})")
            del commands[command]
    with Progress(args.runs, "whole runs", "round") as bar:
        for answers in in_turns(commands, args.runs, lambda command, _: (
                whole_run(args, model, data, command))):
            for command, answer in answers.items():
                commands[command].append(answer)
            bar.update()
    return {command: {"first_step_s": report.spread(first for first, _ in measured),
                      "peak_mib": report.spread(peak for _, peak in measured)}
            for command, measured in commands.items()}


def whole_run(args: argparse.Namespace, model: dict, data: Path,
              command: str) -> tuple[float, float]:
    """Seconds from the start of the program to the end of its first step; peak memory in MiB."""
    program, *more = command.split()
    flags = {"train_data": data, "valid_data": data, "model_card": args.card,
             "init_checkpoint": model["base"], "lora_checkpoint": model["lora"],
             "max_step": 4, "log_interval": 1, "device": args.device}
    model_files.room_for(WORK / "run", 2 * Path(model["base"]).stat().st_size)
    with tempfile.TemporaryDirectory(dir=WORK) as work_dir, \
            tempfile.TemporaryFile("w+", encoding="utf-8") as stderr:
        words = [sys.executable, ROOT / program, f"@{FLAGS}", "--work_dir", work_dir, *more]
        for flag, value in flags.items():
            words += [f"--{flag}", str(value)]
        first_step, started = None, time.perf_counter()
        with subprocess.Popen(words, text=True, stdout=subprocess.PIPE,
                              stderr=stderr) as process:
            for line in process.stdout:
                if first_step is None and line.startswith("| epoch"):
                    first_step = time.perf_counter() - started
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode or first_step is None:
            stderr.seek(0)
            last = (stderr.read().strip().splitlines() or ["no message"])[-1]
            raise InputError(f"{program}: exit code {process.returncode} ({last})")
    return first_step, usage.ru_maxrss / 1024


def describe(results: dict) -> list[str]:
    """The report in Markdown."""
    lines = report.introduction(f"Training, {results['card']}", results)
    cell, found = report.cell, results["sides"]
    count = len(next(iter(found.values()))["blocks"]) * results["block"]
    needed, limits = results["needed_gflop"], results["limits"]
    lines += [f"Batch {TRAIN['batch_size']}, seq_len {TRAIN['seq_len']}, grad_acc "
              f"{TRAIN['grad_acc']}, LoRA r {LORA['r']}, alpha {LORA['alpha']}, dropout "
              f"{TRAIN['lora_dropout']}, label_smooth {TRAIN['label_smooth']}; data: "
              f"{results['data']}. {count} micro-batches of each side in alternating blocks of "
              f"{results['block']}, after {results['warm_up']} to warm up. Medians [quartiles]. "
              "Minimal PyTorch computes the micro-batches of an update as one; the time is that "
              "of one micro-batch.", ""]
    lines += report.table(
        ["", "ms/batch", *report.ratio_heads(results), "GFLOP/s", "share of the limit",
         "peak memory, MiB"],
        [[one["title"], cell(one["ms_per_batch"], 1),
          *(cell(one["ratios"].get(own), 3) for own in results["ours"]),
          cell(one["gflops"], 1), report.percent(one["of_limit"]),
          report.whole(one["peak_mib"])] for one in found.values()])
    lines += [f"GFLOP/s: the operations that the task needs, {needed['median']:.1f} "
              f"[{needed['q1']:.1f}, {needed['q3']:.1f}] GFLOP per micro-batch (bench/flops.py "
              "defines what is counted), divided by the time. Peak memory: of the process that "
              "loads the model and trains.", ""]
    if limits:
        lines += ["The limit is the fastest matrix product of this run in the same precision, of "
                  "`torch.mm` and oneDNN's product with a packed weight:", ""]
        lines += report.table(
            ["GFLOP/s", *(f"({m}, {k}) x ({k}, {n})" for m, k, n in results["shapes"])],
            [[precision, *(f"{speed:.0f}" for speed in speeds)]
             for precision, speeds in limits.items()])
    if "programs" in results:
        lines += ["Whole runs of 4 micro-batches with warm caches, in alternation:", ""]
        lines += report.table(
            ["", "start to end of first step, s", "peak memory, MiB"],
            [[f"`{command}`", cell(one["first_step_s"], 1), cell(one["peak_mib"], 0)]
             for command, one in results["programs"].items()])
    return lines


if __name__ == "__main__":
    run(main)
