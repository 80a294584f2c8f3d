"""Times beam search with GPT-2 and LoRA: ours, CTranslate2, transformers' generate, align's.

All sides have the same weights (LoRA is merged for sides that do not support it). They continue
the same contexts in alternation: first one context at a time, then, where supported, in batches.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from itertools import chain
from pathlib import Path

import model_files
import report
import samples
from shared import (
    BEAM,
    MODEL_CARDS,
    TRAIN,
    ArgumentParser,
    FTDataset,
    InputError,
    Progress,
    at_least,
    log,
    run,
)
from workers import Worker, in_turns

SCRIPTS = {"ours": "side_jittor.py", "ctranslate2": "side_ctranslate2.py",
           "generate": "side_transformers.py", "align": "side_align.py"}
NAMES = {"ours": "ours (Jittor)", "ctranslate2": "CTranslate2",
         "generate": "transformers `generate`", "align": "PyTorch (align)"}
IN_BATCHES = ("ours", "ctranslate2")


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__, prog="bench/run.sh beam")
    parser.add_argument("--card", choices=MODEL_CARDS, default="gpt2.sm", help="size of GPT-2")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="trained weights, the last "
                        "model.STEP.pt of src/gpt2_ft.py; if it is not given: random weights, "
                        "with which hardly any beam ends early")
    parser.add_argument("--samples", type=at_least(1), default=8,
                        help="contexts that every side continues one at a time")
    parser.add_argument("--batch_size", type=at_least(2), default=16,
                        help="contexts at the same time, for the sides that support it")
    parser.add_argument("--batches", type=at_least(0), default=2, help="number of such batches")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to compute")
    parser.add_argument("--name", default="beam", help="name of the files in bench/results")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    model = (model_files.trained_model(args.card, args.checkpoint) if args.checkpoint
             else model_files.random_model(args.card))
    converted = model_files.for_ctranslate2(model)
    data, source = samples.of_e2e("test")
    dataset = FTDataset(data, 1, TRAIN["seq_len"], BEAM["eval_len"])
    queries = list(dict.fromkeys(dataset.queries()))  # ours searches equal contexts only once
    wanted = max(args.samples, args.batches * args.batch_size)
    if len(queries) < wanted:
        raise InputError(f"{data}: {len(queries)} different contexts, but {wanted} are needed; "
                         "use smaller --samples, --batches or --batch_size")

    with ExitStack() as stack:
        workers = {side: stack.enter_context(Worker(script)) for side, script in SCRIPTS.items()}
        starts = [worker.ask("start", device=args.device) for worker in workers.values()]
        for side, worker in workers.items():
            log(f"{NAMES[side]}: loading the model, then a short search to warm up")
            worker.ask("load", **({"folder": converted} if side == "ctranslate2" else model))
            for size in (1, args.batch_size) if side in IN_BATCHES else (1,):
                search(worker, queries[:size], size, eval_len=4)
        one = alternate({side: workers[side] for side in SCRIPTS}, queries, args.samples, 1)
        many = alternate({side: workers[side] for side in IN_BATCHES}, queries, args.batches,
                         args.batch_size)
    results = {**report.setting(starts, args.device), "card": args.card, "flags": BEAM,
               "weights": str(args.checkpoint or "random"), "data": source,
               "batch_size_1": one, f"batch_size_{args.batch_size}": many}
    report.write(args.name, results, describe(args, results, one, many))
    agreed, searched = one["align"]["agree"], one["align"]["samples"]
    if agreed != searched:
        raise InputError(f"only {agreed} of {searched} answers are the same as align's; "
                         "run bash align/run.sh e2e --strict")


def search(worker: Worker, queries: list, batch_size: int, **flags) -> dict:
    return worker.ask("search", queries=queries, batch_size=batch_size, **{**BEAM, **flags})


def alternate(workers: dict[str, Worker], queries: list, blocks: int, batch_size: int) -> dict:
    """Speed, its ratio and agreement of all sides on the same blocks of ``batch_size`` queries."""
    paces, ids = {side: [] for side in workers}, {side: [] for side in workers}

    def ask(side: str, block: int) -> dict:
        start = block * batch_size
        return search(workers[side], queries[start:start + batch_size], batch_size)

    with Progress(blocks, f"batch size {batch_size}", "block") as bar:
        for answers in in_turns(workers, blocks, ask):
            for side, answer in answers.items():
                paces[side].append([batch_size / answer["seconds"]])
                ids[side] += answer["ids"]
            bar.update()
    return {side: {
        "samples_per_s": report.spread(chain(*of_side)), "blocks": of_side,
        "samples": len(ids[side]),
        "ratio": report.ratio(paces["ours"], of_side) if side != "ours" else None,
        "agree": sum(a == b for a, b in zip(ids["ours"], ids[side]))}
        for side, of_side in paces.items() if of_side}


def describe(args: argparse.Namespace, results: dict, one: dict, many: dict) -> list[str]:
    """The report in Markdown."""
    lines = report.introduction(f"Beam search, {args.card}", results)
    lines += [f"Beam {BEAM['beam']}, at most {BEAM['eval_len']} tokens, contexts of at most "
              f"{TRAIN['seq_len'] - BEAM['eval_len']} tokens, length_penalty "
              f"{BEAM['length_penalty']}, no_repeat_ngram_size {BEAM['no_repeat_ngram_size']}; "
              f"weights: {results['weights']}; data: {results['data']}. Medians [quartiles] over "
              "blocks of the sides in alternation; a block is one batch.", ""]
    for batch_size, sides in ((1, one), (args.batch_size, many)):
        if sides:
            lines += report.table(
                [f"batch size {batch_size}", "samples/s", "our time / their time [over blocks]",
                 "same ids as ours"],
                [[NAMES[side], report.cell(of_side["samples_per_s"], 3),
                  report.cell(report.inverse(of_side["ratio"]), 3),
                  f"{of_side['agree']} of {of_side['samples']}"]
                 for side, of_side in sides.items()])
    lines += ["align uses the same algorithm as ours, so its ids must be the same. CTranslate2 and "
              "`generate` have other rules for the end of a search, and `generate` also forbids "
              "n-grams of the context.", ""]
    return lines


if __name__ == "__main__":
    run(main)
