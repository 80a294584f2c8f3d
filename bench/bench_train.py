"""Measures training of GPT-2 with LoRA on E2E: time of a micro-batch, start-up time, peak memory.

Ours, align's PyTorch side and transformers + peft train on the same batches in alternation. The
same run measures the speed of float32 matrix products, to which the speed of each side is compared.
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

import flops
import model_files
import report
import samples
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

SIDES = {"ours": "side_jittor.py", "align": "side_align.py", "peft": "side_transformers.py"}
NAMES = {"ours": "ours (Jittor)", "align": "PyTorch (align)", "peft": "transformers + peft"}
PROGRAMS = {"ours": "src/gpt2_ft.py", "align": "align/torch_train.py"}
SHAPES = [(1024, 1024, 1024), (2048, 2048, 2048), (128, 768, 3072)]  # (m, k) x (k, n)


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__, prog="bench/run.sh train")
    parser.add_argument("--card", choices=MODEL_CARDS, default="gpt2.sm", help="size of GPT-2")
    parser.add_argument("--rounds", type=at_least(1), default=8, help="blocks of each side")
    parser.add_argument("--block", type=at_least(1), default=4,
                        help="micro-batches of a block; a multiple of grad_acc")
    parser.add_argument("--warm_up", type=at_least(1), default=10,
                        help="micro-batches of each side before its first block")
    parser.add_argument("--runs", type=at_least(0), default=3,
                        help="whole runs of each program, for memory and start-up time; 0: none")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to compute")
    parser.add_argument("--name", default="train", help="name of the files in bench/results")
    args = parser.parse_args()
    for flag in ("block", "warm_up"):
        if getattr(args, flag) % TRAIN["grad_acc"]:
            parser.error(f"--{flag} must be a multiple of {TRAIN['grad_acc']} (grad_acc)")
    return args


def main() -> None:
    args = parse_args()
    data, source = samples.of_e2e("train")
    model = model_files.random_model(args.card)
    results = steps(args, model, data)
    results["data"] = source
    if args.runs:
        results["programs"] = programs(args, model, data)
    report.write(args.name, results, describe(args, results))


def steps(args: argparse.Namespace, model: dict, data: Path) -> dict:
    """Times micro-batches and matrix products of all sides in alternation."""
    with ExitStack() as stack:
        workers = {side: stack.enter_context(Worker(script)) for side, script in SIDES.items()}
        starts = {side: worker.ask("start", device=args.device)
                  for side, worker in workers.items()}
        for side, worker in workers.items():
            log(f"{NAMES[side]}: loading the model, then {args.warm_up} micro-batches to warm up")
            worker.ask("load", **model, lora_dropout=TRAIN["lora_dropout"])
            worker.ask("start_training", data=str(data), **{
                flag: value for flag, value in TRAIN.items() if flag != "lora_dropout"})
            worker.ask("train", steps=args.warm_up)

        blocks = {side: [] for side in SIDES}  # ms, [block][micro-batch]
        losses = {side: [] for side in SIDES}
        products = {side: [] for side in ("ours", "align")}  # ms, [round][shape][repeat]

        def block(side: str, _: int) -> dict:
            return workers[side].ask("train", steps=args.block)

        def matmul(side: str, _: int) -> list[list[float]]:
            return workers[side].ask("matmul", shapes=SHAPES, repeats=3)

        with Progress(args.rounds, "training", "round") as bar:
            for answers in in_turns(SIDES, args.rounds, block):
                for side, answer in answers.items():
                    blocks[side].append(answer["ms"])
                    losses[side].append(answer["loss"])
                for answer in in_turns(products, 1, matmul):
                    for side, times in answer.items():
                        products[side].append(times)
                bar.update()
    return {**report.setting(starts.values(), args.device), "card": args.card, "flags": TRAIN,
            "lora": LORA, "block": args.block, "warm_up": args.warm_up,
            "losses": losses, **judge(args, data, blocks, products)}


def judge(args: argparse.Namespace, data: Path, blocks: dict, products: dict) -> dict:
    """Medians, ratios, and the share of the matmul speed that each side reaches."""
    acc = TRAIN["grad_acc"]
    # Means over an update, because only its last micro-batch includes the optimizer step.
    updates = {side: [[sum(block[n:n + acc]) / acc for n in range(0, args.block, acc)]
                      for block in of_side] for side, of_side in blocks.items()}
    needed = needed_flops(args, data)
    of_update = [sum(needed[n:n + acc]) / acc for n in range(0, len(needed), acc)]

    speeds = {side: [flops.matmul(*shape) / 1e6 / median(
        time for times in of_side for time in times[n]) for n, shape in enumerate(SHAPES)]
        for side, of_side in products.items()}  # GFLOP/s
    limit = max(max(of_side) for of_side in speeds.values())
    sides = {}
    for side, of_side in updates.items():
        times = list(chain(*of_side))
        reached = [count / 1e6 / ms for count, ms in zip(of_update, times)]  # GFLOP/s
        sides[side] = {"ms_per_batch": report.spread(times), "gflops": report.spread(reached),
                       "of_limit": median(reached) / limit, "blocks": blocks[side]}
    return {"sides": sides, "matmul_gflops": speeds, "matmul_shapes": SHAPES,
            "limit_gflops": limit, "needed_gflop": report.spread(n / 1e9 for n in needed),
            "ratios": {side: report.ratio(updates["ours"], updates[side])
                       for side in SIDES if side != "ours"}}


def needed_flops(args: argparse.Namespace, data: Path) -> list[int]:
    """The operations that each timed micro-batch needs, see flops.py."""
    dataset = FTDataset(data, TRAIN["batch_size"], TRAIN["seq_len"])
    last = args.warm_up + args.rounds * args.block
    batches = (batch for epoch in range(1, last + 1)
               for batch in dataset.batches(TRAIN["seed"], epoch))
    return [flops.micro_batch(batch.mask, MODEL_CARDS[args.card], LORA["r"])
            for batch in islice(batches, args.warm_up, last)]


def programs(args: argparse.Namespace, model: dict, data: Path) -> dict:
    """Whole runs of the two training programs: peak memory, seconds to the first step.

    Each first runs once untimed, so that Jittor's operators are compiled and the files cached.
    """
    found = {side: {"first_step_s": [], "peak_mib": []} for side in PROGRAMS}
    with Progress(args.runs + 1, "whole runs", "round") as bar:
        for turn, answers in enumerate(in_turns(PROGRAMS, args.runs + 1, lambda side, _: (
                whole_run(args, model, data, PROGRAMS[side])))):
            for side, (first_step, peak) in answers.items():
                if turn:
                    found[side]["first_step_s"].append(first_step)
                    found[side]["peak_mib"].append(peak)
            bar.update()
    return {side: {name: report.spread(values) for name, values in of_side.items()}
            for side, of_side in found.items()}


def whole_run(args: argparse.Namespace, model: dict, data: Path,
              program: str) -> tuple[float, float]:
    """Seconds from the start of the program to the end of its first step; peak memory in MiB."""
    flags = {"train_data": data, "valid_data": data, "model_card": args.card,
             "init_checkpoint": model["base"], "lora_checkpoint": model["lora"],
             "max_step": 4, "log_interval": 1, "device": args.device}
    model_files.room_for(WORK / "run", 2 * Path(model["base"]).stat().st_size)
    with tempfile.TemporaryDirectory(dir=WORK) as work_dir, \
            tempfile.TemporaryFile("w+", encoding="utf-8") as stderr:
        command = [sys.executable, ROOT / program, f"@{FLAGS}", "--work_dir", work_dir]
        for flag, value in flags.items():
            command += [f"--{flag}", str(value)]
        first_step, started = None, time.perf_counter()
        with subprocess.Popen(command, text=True, stdout=subprocess.PIPE,
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


def describe(args: argparse.Namespace, results: dict) -> list[str]:
    """The report in Markdown."""
    lines = report.introduction(f"Training, {args.card}", results)
    cell, sides, block = report.cell, results["sides"], results["block"]
    count = args.rounds * block
    needed = results["needed_gflop"]
    lines += [f"Batch {TRAIN['batch_size']}, seq_len {TRAIN['seq_len']}, grad_acc "
              f"{TRAIN['grad_acc']}, LoRA r {LORA['r']}, alpha {LORA['alpha']}, dropout "
              f"{TRAIN['lora_dropout']}, label_smooth {TRAIN['label_smooth']}; data: "
              f"{results['data']}. {count} micro-batches of each side in alternating blocks of "
              f"{block}, after {results['warm_up']} to warm up. Medians [quartiles].", ""]
    lines += report.table(
        ["", "ms/batch", "our time / their time [over blocks]", "GFLOP/s", "share of the limit"],
        [[NAMES[side], cell(one["ms_per_batch"], 1), cell(results["ratios"].get(side), 3),
          cell(one["gflops"], 1), f"{one['of_limit']:.1%}"] for side, one in sides.items()])
    lines += [f"GFLOP/s: the operations that the task needs, {needed['median']:.1f} "
              f"[{needed['q1']:.1f}, {needed['q3']:.1f}] GFLOP per micro-batch (bench/flops.py "
              "defines what is counted), divided by the time. The limit is the fastest float32 "
              "matrix product of this run, "
              f"{results['limit_gflops']:.0f} GFLOP/s:", ""]
    lines += report.table(
        ["GFLOP/s", *(f"({m}, {k}) x ({k}, {n})" for m, k, n in results["matmul_shapes"])],
        [[{"ours": "jt.matmul or ops.linear", "align": "torch.mm"}[side],
          *(f"{s:.0f}" for s in speeds)]
         for side, speeds in results["matmul_gflops"].items()])
    if "programs" in results:
        lines += ["Whole runs of 4 micro-batches with warm caches, "
                  f"{args.runs} of each program in alternation:", ""]
        lines += report.table(
            ["", "start to end of first step, s", "peak memory, MiB"],
            [[f"`{PROGRAMS[side]}`", cell(one["first_step_s"], 1), cell(one["peak_mib"], 0)]
             for side, one in results["programs"].items()])
    return lines


if __name__ == "__main__":
    run(main)
