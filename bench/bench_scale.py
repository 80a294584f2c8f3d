"""Times training and beam search for several batch sizes, sequence lengths and model sizes.

Ours and align's PyTorch side run in alternation. One setting varies at a time; the others are the
experiment's (batch size 2, 64 tokens). All samples have the full length: there is no padding.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import chain
from statistics import mean

import conditions
import model_files
import quiet
import report
import samples
from shared import (
    BEAM,
    MODEL_CARDS,
    TRAIN,
    ArgumentParser,
    FTDataset,
    Progress,
    at_least,
    log,
    run,
)
from workers import Worker, in_turns

SIDES = {"ours": "side_jittor.py", "align": "side_align.py"}
NAMES = {"ours": "ours (Jittor)", "align": "PyTorch (align)"}


def numbers(text: str) -> list[int]:
    """An argparse type: integers such as "1,2,4"."""
    values = [int(item) for item in text.split(",")]
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text}: all must be 1 or more")
    return values


def cards(text: str) -> list[str]:
    """An argparse type: model cards such as "gpt2.nano,gpt2.sm"."""
    for card in text.split(","):
        if card not in MODEL_CARDS:
            raise argparse.ArgumentTypeError(f"{card} is not one of {', '.join(MODEL_CARDS)}")
    return text.split(",")


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__, prog="bench/run.sh scale")
    parser.add_argument("--cards", type=cards, default="gpt2.nano,gpt2.sm", help="sizes of GPT-2")
    parser.add_argument("--batch_sizes", type=numbers, default="1,2,4,8",
                        help=f"batch sizes of training, at {TRAIN['seq_len']} tokens")
    parser.add_argument("--seq_lens", type=numbers, default="32,64,128,256",
                        help="sequence lengths of training, at batch size "
                        f"{TRAIN['batch_size']}")
    parser.add_argument("--beam_sizes", type=numbers, default="1,4,16",
                        help="contexts that beam search takes at the same time")
    parser.add_argument("--rounds", type=at_least(1), default=5,
                        help="largest number of blocks of each side for a setting")
    parser.add_argument("--seconds", type=at_least(0, float), default=6.0,
                        help="no further block for a setting after so many seconds")
    conditions.add_flags(parser, "scale")
    args = parser.parse_args()
    if not all(2 <= length <= 1024 for length in args.seq_lens):
        parser.error("--seq_lens: give lengths from 2 to 1024 tokens")
    return args


def main() -> None:
    args = parse_args()
    conditions.limit_instructions(args.isa)
    settings = ([(size, TRAIN["seq_len"]) for size in args.batch_sizes]
                + [(TRAIN["batch_size"], length) for length in args.seq_lens])
    settings = list(dict.fromkeys(settings))
    training, beam = {}, {}
    with ExitStack() as stack:
        workers = {side: stack.enter_context(Worker(script)) for side, script in SIDES.items()}
        starts = [worker.ask("start", device=args.device) for worker in workers.values()]
        watch = quiet.Watch({side: worker.process.pid for side, worker in workers.items()},
                            args.quiet)
        for card in args.cards:
            log(f"{card}: loading the model")
            model = model_files.random_model(card)
            for worker in workers.values():
                worker.ask("load", **model, lora_dropout=TRAIN["lora_dropout"])
            with Progress(len(settings), f"{card}, training", "setting") as bar:
                training[card] = []
                for batch_size, seq_len in settings:
                    training[card].append({"batch_size": batch_size, "seq_len": seq_len,
                                           **train(args, watch, workers, batch_size, seq_len)})
                    bar.update()
            with Progress(len(args.beam_sizes), f"{card}, beam search", "setting") as bar:
                beam[card] = []
                for batch_size in args.beam_sizes:
                    beam[card].append({"batch_size": batch_size,
                                       **search(args, watch, workers, batch_size)})
                    bar.update()
    results = {**report.setting(starts, args), "flags": TRAIN, "beam_flags": BEAM,
               "quiet": watch.summary(), "training": training, "beam": beam}
    report.write(args.name, results, describe(results), figure(results))


def measure(args: argparse.Namespace, watch: quiet.Watch,
            ask: Callable[[str, int], list[float]]) -> dict:
    """Medians and ratio of what ``ask`` measures on both sides until the time is used up."""
    blocks, started = {side: [] for side in SIDES}, time.perf_counter()
    for answers in in_turns(SIDES, args.rounds, ask, watch):
        for side, answer in answers.items():
            blocks[side].append(answer)
        if time.perf_counter() - started > args.seconds:
            break
    return {**{side: report.spread(chain(*of_side)) for side, of_side in blocks.items()},
            "ratio": report.ratio(blocks["ours"], blocks["align"])}


def train(args: argparse.Namespace, watch: quiet.Watch, workers: dict[str, Worker],
          batch_size: int, seq_len: int) -> dict:
    """Measures milliseconds per micro-batch."""
    block = TRAIN["grad_acc"]
    flags = {flag: value for flag, value in TRAIN.items() if flag != "lora_dropout"}
    flags.update(batch_size=batch_size, seq_len=seq_len,
                 data=str(samples.of_length(seq_len, count=4 * batch_size)))
    for worker in workers.values():
        worker.ask("start_training", **flags)
        worker.ask("train", steps=block)  # to warm up
    # The mean over an update, because only its last micro-batch includes the optimizer step.
    return measure(args, watch, lambda side, _: [
        mean(workers[side].ask("train", steps=block)["ms"])])


def search(args: argparse.Namespace, watch: quiet.Watch, workers: dict[str, Worker],
           batch_size: int) -> dict:
    """Measures samples per second; align's side always takes one sample at a time."""
    data = samples.of_length(TRAIN["seq_len"], count=batch_size)
    queries = FTDataset(data, 1, TRAIN["seq_len"], BEAM["eval_len"]).queries()
    sizes = {"ours": batch_size, "align": 1}

    def ask(side: str, _: int, **flags) -> list[float]:
        answer = workers[side].ask("search", queries=queries[:sizes[side]],
                                   batch_size=sizes[side], **{**BEAM, **flags})
        return [sizes[side] / answer["seconds"]]

    for side in SIDES:
        ask(side, 0, eval_len=4)  # to warm up
    return measure(args, watch, ask)


def describe(results: dict) -> list[str]:
    """The report in Markdown."""
    lines = report.introduction("Cost against size", results)
    lines += ["Medians [quartiles]. Training has the flags of the experiment except those that the "
              "table varies; all samples have the full length.", ""]
    for card, settings in results["training"].items():
        lines += report.table(
            [f"{card}, training: batch x tokens", *(f"{name}, ms/batch" for name in NAMES.values()),
             "our time / their time"],
            [[f"{one['batch_size']} x {one['seq_len']}",
              *(report.cell(one[side], 1) for side in SIDES), report.cell(one["ratio"], 3)]
             for one in settings])
    lines += [f"Beam search, beam {BEAM['beam']}, {BEAM['eval_len']} tokens; align's side takes "
              "one context at a time at every batch size.", ""]
    for card, settings in results["beam"].items():
        lines += report.table(
            [f"{card}, beam search: batch", *(f"{name}, samples/s" for name in NAMES.values()),
             "our time / their time"],
            [[one["batch_size"], *(report.cell(one[side], 3) for side in SIDES),
              report.cell(report.inverse(one["ratio"]), 3)] for one in settings])
    return lines


def figure(results: dict) -> bytes:
    """A PNG: training against batch size and sequence length, beam search against batch size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing, panels = pyplot.subplots(1, 3, figsize=(13, 4.6), dpi=120, layout="constrained")
    for colour, card in enumerate(results["training"]):
        training = results["training"][card]
        curves = [("batch_size", [one for one in training if one["seq_len"] == TRAIN["seq_len"]]),
                  ("seq_len", [one for one in training
                               if one["batch_size"] == TRAIN["batch_size"]]),
                  ("batch_size", results["beam"][card])]
        for axes, (name, points) in zip(panels, curves):
            points = sorted(points, key=lambda one, name=name: one[name])
            for side, style in zip(SIDES, ("o-", "s--")):
                axes.loglog([one[name] for one in points],
                            [one[side]["median"] for one in points], style, color=f"C{colour}",
                            markersize=4, label=f"{card}, {NAMES[side]}")
    for axes, (across, up) in zip(panels, (
            (f"batch size ({TRAIN['seq_len']} tokens a sample)", "training, ms/batch"),
            (f"sequence length (batch size {TRAIN['batch_size']})", "training, ms/batch"),
            ("batch size", "beam search, samples/s"))):
        axes.set(xlabel=across, ylabel=up)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize="small", ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
    picture = io.BytesIO()
    drawing.savefig(picture, format="png", metadata={"Software": None})
    pyplot.close(drawing)
    return picture.getvalue()


if __name__ == "__main__":
    run(main)
