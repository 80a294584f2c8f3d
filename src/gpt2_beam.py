"""Stage 4: continues the contexts of encoded samples by beam search.

Reads ``--data`` (src/gpt2_encode.py makes it) and the weights that src/gpt2_ft.py saved; writes
one JSON line a sample to WORK_DIR/OUTPUT_FILE: its id, ``--eval_len`` token ids, and how many of
them, from the first on, are predicted; the others are zeros, as in the original.
"""

import argparse
import os
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np

import generation
import weight_files
from runtime import backend, processes
from runtime.errors import Interrupted
from runtime.flags import ArgumentParser, add_device_flag, add_resume_flag, settings_of
from runtime.formats import write_jsonl
from runtime.locks import exclusive
from runtime.progress import Progress, log
from runtime.script import run
from search_state import SearchState


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__, "gpt2_beam")
    data = parser.add_argument_group("data")
    data.add_argument("--data", required=True, help="encoded samples (.jsonl)")
    generation.add_flags(parser, data)

    output = parser.add_argument_group("output")
    output.add_argument("--work_dir", type=Path, default=os.getenv("PT_OUTPUT_DIR", "gpt2_model"),
                        help="folder of the output file")
    output.add_argument("--output_file", default="beam_prediction.jsonl", help="its name there")
    add_resume_flag(parser, "the search for --output_file that broke off")
    add_device_flag(parser)
    args = parser.parse_args()
    generation.check_flags(parser, args)
    return args


# Flags that do not change the predictions: a search that is continued may differ in them.
FREE_FLAGS = {"work_dir", "output_file", "batch_size", "hold_batch_size", "resume", "device"}
FILE_FLAGS = ("data", "init_checkpoint", "lora_checkpoint")


def search(args: argparse.Namespace, generator, distinct: list[tuple[int, ...]],
           at_a_time: int, state: SearchState) -> None:
    """Searches this process's share of the different contexts, as far as ``state`` lacks them."""
    from beam_search import predict

    numbers = {query: number for number, query in enumerate(distinct)}
    share = distinct[processes.rank()::processes.world_size()]  # both long and short ones
    left = [query for query in share if numbers[query] not in state.answers]
    if state.answers:
        log(f"{len(state.answers)} of {len(distinct)} different contexts were searched before")
    with Progress(len(share), "beam search", "context", initial=len(share) - len(left)) as bar:
        def on_batch(answers):
            state.add({numbers[query]: ids for query, ids in answers.items()})
            bar.update(len(answers))

        try:
            predict(generator, left, generation.beam_options(args), at_a_time, on_batch)
        except KeyboardInterrupt:
            raise Interrupted(f"stopped after {len(state.answers)} of {len(distinct)} different "
                              "contexts; to continue: the same command with --resume") from None


def main() -> None:
    args = parse_args()
    config = generation.complete(args)
    backend.start(args.device)
    from dataset import FTDataset  # needs Jittor, see backend

    data = FTDataset(args.data, args.batch_size, args.seq_len, args.eval_len,
                     vocab_size=config.vocab_size, n_positions=config.n_positions,
                     contexts_only=True)
    queries = data.queries()
    if cut := generation.cuts(args, data.samples):
        log(f"{args.data}: {cut}")
    distinct = sorted(dict.fromkeys(queries), key=len)
    settings = settings_of(args, FREE_FLAGS, FILE_FLAGS, weight_files.digest)
    processes.check_same({**vars(args), **settings})
    output = args.work_dir / args.output_file
    state = SearchState(args.work_dir, output, settings, log)
    state.load(args.resume, len(distinct), args.eval_len)
    if processes.total_number(state.finished and processes.rank() == 0):
        log(f"finished before, nothing to do: {output}; --resume no searches anew")
        return
    at_a_time = generation.contexts_at_a_time(args, config, len(distinct), args.beam)
    generator = generation.make_generator(args, config)
    started = time.perf_counter()
    lock = exclusive(args.work_dir / f".{output.name}.searching", "another --output_file")
    with lock if processes.rank() == 0 else nullcontext():
        state.begin()
        continued = bool(state.answers)
        search(args, generator, distinct, at_a_time, state)
        table = np.zeros((len(distinct), 1 + args.eval_len), np.int32)  # a length, token ids
        for number in range(processes.rank(), len(distinct), processes.world_size()):
            ids = state.answers[number]
            table[number, 0], table[number, 1:1 + len(ids)] = len(ids), ids
        answers = dict(zip(distinct, processes.total_array(table).tolist()))
        took = time.perf_counter() - started
        if processes.rank() == 0:
            write_jsonl(output, ({"id": i, "predict": answers[query][1:],
                                  "length": answers[query][0]} for i, query in enumerate(queries)))
            state.finish(None if continued else round(len(queries) / took, 2))
    log(f"{len(queries)} samples ({len(distinct)} different contexts) in {took:.1f} s, "
        f"{len(queries) / took:.2f} samples/s; saved {output}")


if __name__ == "__main__":
    run(main)
