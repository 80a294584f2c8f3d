"""Times beam search with GPT-2 and LoRA: ours and other programs, each in its precisions.

All sides have the same weights (LoRA is merged for sides that do not support it). They continue
the same contexts in alternation: first one context at a time, then, where supported, in batches. A
side whose packages are missing is left out.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from itertools import chain
from pathlib import Path

import conditions
import model_files
import quiet
import report
import samples
import sides
from shared import (
    BEAM,
    MODEL_CARDS,
    TRAIN,
    ArgumentParser,
    FTDataset,
    InputError,
    Progress,
    at_least,
    run,
)
from workers import Worker, in_turns


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__, prog="bench/run.sh beam")
    parser.add_argument("--card", choices=MODEL_CARDS, default="gpt2.sm", help="size of GPT-2")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="trained weights, the last "
                        "model.STEP.pt of src/gpt2_ft.py; if it is not given: random weights, "
                        "with which hardly any beam ends early")
    parser.add_argument("--sides", type=sides.some_of(sides.SEARCH),
                        default=",".join(sides.SEARCH),
                        help="programs beside ours, such as compiled,ctranslate2")
    parser.add_argument("--precisions", type=sides.some_of(sides.PRECISIONS),
                        default=",".join(sides.PRECISIONS), help="of the programs that have them")
    parser.add_argument("--samples", type=at_least(1), default=8,
                        help="contexts that every side continues one at a time")
    parser.add_argument("--batch_size", type=at_least(2), default=16,
                        help="contexts at the same time, for the sides that support it")
    parser.add_argument("--batches", type=at_least(0), default=2, help="number of such batches")
    conditions.add_flags(parser, "beam")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    conditions.limit_instructions(args.isa)
    model = (model_files.trained_model(args.card, args.checkpoint) if args.checkpoint
             else model_files.random_model(args.card))
    data, source = samples.of_e2e("test")
    dataset = FTDataset(data, 1, TRAIN["seq_len"], BEAM["eval_len"])
    queries = list(dict.fromkeys(dataset.queries()))  # ours searches equal contexts only once
    wanted = max(args.samples, args.batches * args.batch_size)
    if len(queries) < wanted:
        raise InputError(f"{data}: {len(queries)} different contexts, but {wanted} are needed; "
                         "use smaller --samples, --batches or --batch_size")
    chosen = sides.choose(sides.SEARCH, args.sides, args.precisions)
    folders: dict[str, str] = {}  # of programs that need another format

    def prepare(key: str, worker: Worker) -> None:
        program, precision = chosen[key].program, chosen[key].precision
        files, form = model, key.split()[0]
        if program.converter:
            if form not in folders:
                folders[form] = model_files.converted(model, form, program.converter)
            files = {"folder": folders[form]}
        worker.ask("load", **files, precision=precision, **dict(program.options))
        for size in (1, args.batch_size) if program.batches and args.batches else (1,):
            search(worker, queries[:size], size, eval_len=4)

    with ExitStack() as stack:
        team = sides.Team(stack, chosen)
        team.start(args.device, prepare)
        chosen = {key: chosen[key] for key in team.workers}
        watch = quiet.Watch(team.pids, args.quiet)
        one = alternate(team.workers, chosen, watch, queries, args.samples, 1)
        in_batches = {key: side for key, side in chosen.items() if side.program.batches}
        many = alternate(team.workers, in_batches, watch, queries, args.batches, args.batch_size)
        peaks = {key: quiet.peak_mib(pid) for key, pid in team.pids.items()}
    results = {**report.setting(team.starts, args), "card": args.card, "flags": BEAM,
               "weights": str(args.checkpoint or "random"), "data": source,
               "left_out": team.left_out, "quiet": watch.summary(), "peak_mib": peaks,
               "ours": sides.ours(chosen), "tables": {1: one, args.batch_size: many}}
    report.write(args.name, results, describe(results))
    align = one.get("align float32")
    if align and align["agree"] != align["samples"]:
        raise InputError(f"only {align['agree']} of {align['samples']} answers are the same as "
                         "align's; run bash align/run.sh e2e --strict")


def search(worker: Worker, queries: list, batch_size: int, **flags) -> dict:
    return worker.ask("search", queries=queries, batch_size=batch_size, **{**BEAM, **flags})


def alternate(workers: dict[str, Worker], chosen: dict[str, sides.Side], watch: quiet.Watch,
              queries: list, blocks: int, batch_size: int) -> dict:
    """Speed, its ratios and agreement of all sides on the same blocks of ``batch_size`` queries."""
    rounds = []

    def ask(key: str, block: int) -> dict:
        start = block * batch_size
        return search(workers[key], queries[start:start + batch_size], batch_size)

    with Progress(blocks, f"batch size {batch_size}", "block") as bar:
        for answers in in_turns(chosen, blocks, ask, watch):
            rounds.append(answers)
            bar.update()
    return judge(chosen, rounds, batch_size) if rounds else {}


def judge(chosen: dict[str, sides.Side], rounds: list[dict], batch_size: int) -> dict:
    """Medians and ratios of times, and how many ids are those of ours in float32."""
    seconds = {key: [[answers[key]["seconds"]] for answers in rounds] for key in chosen}
    ids = {key: list(chain(*(answers[key]["ids"] for answers in rounds))) for key in chosen}
    return {key: {
        "title": side.title,
        "samples_per_s": report.spread(batch_size / took for took, in seconds[key]),
        "seconds": [took for took, in seconds[key]], "samples": len(ids[key]),
        "tokens": sum(len(row) - row.count(0) for row in ids[key]) / len(ids[key]),
        "ratios": {own: report.ratio(seconds[own], seconds[key])
                   for own in sides.ours(chosen) if own != key},
        "agree": sum(a == b for a, b in zip(ids["ours float32"], ids[key]))}
        for key, side in chosen.items()}


def describe(results: dict) -> list[str]:
    """The report in Markdown."""
    lines = report.introduction(f"Beam search, {results['card']}", results)
    lines += [f"Beam {BEAM['beam']}, at most {BEAM['eval_len']} tokens, contexts of at most "
              f"{TRAIN['seq_len'] - BEAM['eval_len']} tokens, length_penalty "
              f"{BEAM['length_penalty']}, no_repeat_ngram_size {BEAM['no_repeat_ngram_size']}; "
              f"weights: {results['weights']}; data: {results['data']}. Medians [quartiles] over "
              "blocks of the sides in alternation; a block is one batch.", ""]
    for batch_size, found in results["tables"].items():
        if found:
            lines += report.table(
                [f"batch size {batch_size}", "samples/s", *report.ratio_heads(results),
                 "same ids as ours in float32", "tokens a sample", "peak memory, MiB"],
                [[one["title"], report.cell(one["samples_per_s"], 3),
                  *(report.cell(one["ratios"].get(own), 3) for own in results["ours"]),
                  f"{one['agree']} of {one['samples']}", f"{one['tokens']:.1f}",
                  report.whole(results["peak_mib"][key])] for key, one in found.items()])
    lines += ["align uses the same algorithm as ours, so its ids must be the same. CTranslate2, "
              "OpenVINO and `generate` have other rules for the end of a search, and `generate` "
              "and OpenVINO also forbid n-grams of the context. Peak memory: of the process that "
              "loads the model and searches, at all batch sizes.", ""]
    return lines


if __name__ == "__main__":
    run(main)
