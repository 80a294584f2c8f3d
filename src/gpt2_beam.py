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

import about
import weight_files
from config import MODEL_CARDS, GPT2Config, LoRAConfig
from runtime import backend, memory, processes
from runtime.errors import Interrupted
from runtime.flags import (
    ArgumentParser,
    add_device_flag,
    add_resume_flag,
    at_least,
    between,
    number,
    settings_of,
    wrong,
)
from runtime.formats import write_jsonl
from runtime.locks import exclusive
from runtime.progress import Progress, log
from runtime.script import run
from search_state import SearchState

CARD = "gpt2.sm"  # the original's default
END_OF_TEXT = 50256


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__, "gpt2_beam")
    data = parser.add_argument_group("data")
    data.add_argument("--data", required=True, help="encoded samples (.jsonl)")
    data.add_argument("--batch_size", type=at_least(1), default=10,
                      help="contexts searched at a time; changes the speed only")
    data.add_argument("--seq_len", type=at_least(2), default=512,
                      help="a context keeps its last seq_len - eval_len tokens")
    data.add_argument("--eval_len", type=at_least(1), default=256, help="most tokens to generate")

    model = parser.add_argument_group("model")
    model.add_argument("--model_card", choices=[*MODEL_CARDS, "auto"],
                       help="size of GPT-2; auto: that of --init_checkpoint, which says it; none: "
                            f"auto, or {CARD} if it does not")
    model.add_argument("--init_checkpoint", metavar="PATH", required=True,
                       help="weights: a file (.bin, .pt, .safetensors, .pkl), a Hugging Face "
                            "folder or an index")
    model.add_argument("--lora_checkpoint", metavar="PATH",
                       help="LoRA matrices or the folder of a PEFT adapter, if --init_checkpoint "
                            "has only the base")
    model.add_argument("--lora_dim", type=at_least(0),
                       help="LoRA's rank r; 0: no LoRA; none: that of the checkpoint, or 0")
    model.add_argument("--lora_alpha", type=at_least(0, number),
                       help="LoRA's output is scaled by alpha / r; none: that of the checkpoint, "
                            "or 128")

    search = parser.add_argument_group("beam search")
    search.add_argument("--beam", type=at_least(1), default=1, help="beams of a context")
    search.add_argument("--length_penalty", type=between(-10, 10), default=1.0,
                        help="a sequence scores log p / length ** length_penalty")
    search.add_argument("--no_repeat_ngram_size", type=at_least(0), default=4,
                        help="no n-gram of this size twice; 0: no such rule")
    search.add_argument("--repetition_penalty", type=at_least(0.01, float), default=1.0,
                        help="on tokens generated before; 1: none")
    search.add_argument("--min_length", type=at_least(0), default=0, help="fewest tokens of a text")
    search.add_argument("--eos_token_id", type=at_least(0), action="append", default=[END_OF_TEXT],
                        help="a further end token; may be repeated")

    output = parser.add_argument_group("output")
    output.add_argument("--work_dir", type=Path, default=os.getenv("PT_OUTPUT_DIR", "gpt2_model"),
                        help="folder of the output file")
    output.add_argument("--output_file", default="beam_prediction.jsonl", help="its name there")
    add_resume_flag(parser, "the search for --output_file that broke off")
    add_device_flag(parser)
    args = parser.parse_args()
    if args.seq_len <= args.eval_len:
        parser.error(f"--seq_len {args.seq_len} leaves no room for a context before --eval_len "
                     f"{args.eval_len} tokens")
    return args


def complete(args: argparse.Namespace) -> GPT2Config:
    """Sets the flags that follow from the checkpoints; the model's dimensions."""
    config = about.complete(args, CARD, log)
    if args.seq_len > config.n_positions:
        wrong(f"--seq_len {args.seq_len}: the model has {config.n_positions} positions")
    if args.beam > config.vocab_size:
        wrong(f"--beam {args.beam}: the vocabulary has {config.vocab_size} tokens")
    if config.vocab_size <= END_OF_TEXT and args.eos_token_id == [END_OF_TEXT]:
        log(f"the vocabulary has {config.vocab_size} tokens and no {END_OF_TEXT}: every text will "
            "have --eval_len tokens; give an end token by --eos_token_id")
    return config


# Flags that do not change the predictions: a search that is continued may differ in them.
FREE_FLAGS = {"work_dir", "output_file", "batch_size", "resume", "device"}
FILE_FLAGS = ("data", "init_checkpoint", "lora_checkpoint")


def report_cuts(args: argparse.Namespace, samples: list[tuple[list[int], list[int]]]) -> None:
    """Logs how many contexts lose their beginning, and how many completions are longer."""
    keep, parts = args.seq_len - args.eval_len, []
    for what, limit, lengths in (
            (f"contexts lose their beginning, being longer than {keep} tokens (--seq_len "
             f"{args.seq_len} less --eval_len {args.eval_len})", keep,
             [len(context) for context, _ in samples]),
            (f"completions are longer than --eval_len {args.eval_len}", args.eval_len,
             [len(completion) for _, completion in samples])):
        cut = sum(length > limit for length in lengths)
        if cut:
            parts.append(f"{cut} of {len(samples)} {what}, by up to {max(lengths) - limit}")
    if parts:
        room = max(args.eval_len, *(len(completion) for _, completion in samples))
        log(f"{args.data}: {'; '.join(parts)}; raise --eval_len to {room} and --seq_len to "
            f"{room + max(len(context) for context, _ in samples)} to cut none")


def make_generator(args: argparse.Namespace, config: GPT2Config):
    """The model with its weights, in the form that can only generate."""
    import checkpoint
    from generator import Generator
    from model import GPT2LMModel

    model = GPT2LMModel(config, LoRAConfig(args.lora_dim, args.lora_alpha))
    checkpoint.load(model, args.init_checkpoint, args.lora_checkpoint, lora_required=True)
    return Generator(model)  # when the model is dropped, its matrices are freed as they are packed


def search(args: argparse.Namespace, generator, distinct: list[tuple[int, ...]],
           state: SearchState) -> None:
    """Searches this process's share of the different contexts, as far as ``state`` lacks them."""
    from beam_search import BeamOptions, predict

    options = BeamOptions(
        beam=args.beam, eval_len=args.eval_len, min_length=args.min_length,
        length_penalty=args.length_penalty, no_repeat_ngram_size=args.no_repeat_ngram_size,
        repetition_penalty=args.repetition_penalty, eos_token_ids=frozenset(args.eos_token_id))
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
            predict(generator, left, options, args.batch_size, on_batch)
        except KeyboardInterrupt:
            raise Interrupted(f"stopped after {len(state.answers)} of {len(distinct)} different "
                              "contexts; to continue: the same command with --resume") from None


def main() -> None:
    args = parse_args()
    config = complete(args)
    backend.start(args.device)
    from dataset import FTDataset  # needs Jittor, see backend

    data = FTDataset(args.data, args.batch_size, args.seq_len, args.eval_len,
                     vocab_size=config.vocab_size, n_positions=config.n_positions)
    queries = data.queries()
    report_cuts(args, data.samples)
    distinct = sorted(dict.fromkeys(queries), key=len)
    settings = settings_of(args, FREE_FLAGS, FILE_FLAGS, weight_files.digest)
    processes.check_same({**vars(args), **settings})
    output = args.work_dir / args.output_file
    state = SearchState(args.work_dir, output, settings, log)
    state.load(args.resume, len(distinct), args.eval_len)
    if processes.total_number(state.finished and processes.rank() == 0):
        log(f"finished before, nothing to do: {output}; --resume no searches anew")
        return
    rows = min(args.batch_size, len(distinct)) * args.beam
    # the weights, keys and values of what is generated, logits
    memory.require(4 * (config.weights + rows * (2 * config.n_layer * config.n_embd * args.eval_len
                                                 + config.vocab_size)),
                   "take a smaller --batch_size, --beam or --model_card")
    generator = make_generator(args, config)
    started = time.perf_counter()
    lock = exclusive(args.work_dir / f".{output.name}.searching", "another --output_file")
    with lock if processes.rank() == 0 else nullcontext():
        state.begin()
        continued = bool(state.answers)
        search(args, generator, distinct, state)
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
