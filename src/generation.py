"""What src/gpt2_beam.py and src/gpt2_generate.py share: flags of the model and of the search."""

from __future__ import annotations

import argparse
from typing import Sequence

import model_flags
from config import GPT2Config, LoRAConfig
from runtime import memory, processes
from runtime.flags import at_least, between, wrong
from runtime.progress import log

CARD = "gpt2.sm"  # the original's default
END_OF_TEXT = 50256
FAST_ROWS = 160  # of a step; with more rows, a token takes hardly less time


def add_flags(parser: argparse.ArgumentParser, data: argparse._ArgumentGroup) -> None:
    """Adds the flags; ``data`` is the group of the parser's flags on what is to be continued."""
    data.add_argument("--batch_size", type=at_least(1), default=10,
                      help="contexts searched at a time; changes the speed only")
    data.add_argument("--hold_batch_size", action="store_true",
                      help="search no more than --batch_size contexts at a time; without it, on "
                           "the CPU more where that is faster and memory is free")
    data.add_argument("--seq_len", type=at_least(2), default=512,
                      help="a context keeps its last seq_len - eval_len tokens")
    data.add_argument("--eval_len", type=at_least(1), default=256, help="most tokens to generate")

    model_flags.add_flags(parser, CARD, trains=False)

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


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends with the parser's error where flags do not fit each other."""
    if args.seq_len <= args.eval_len:
        parser.error(f"--seq_len {args.seq_len} leaves no room for a context before --eval_len "
                     f"{args.eval_len} tokens")


def complete(args: argparse.Namespace) -> GPT2Config:
    """Sets the flags that follow from the checkpoints; the model's dimensions."""
    config = model_flags.complete(args, CARD)
    if args.seq_len > config.n_positions:
        wrong(f"--seq_len {args.seq_len}: the model has {config.n_positions} positions")
    if args.beam > config.vocab_size:
        wrong(f"--beam {args.beam}: the vocabulary has {config.vocab_size} tokens")
    if config.vocab_size <= END_OF_TEXT and args.eos_token_id == [END_OF_TEXT]:
        log(f"the vocabulary has {config.vocab_size} tokens and no {END_OF_TEXT}: every text will "
            "have --eval_len tokens; give an end token by --eos_token_id")
    return config


def cuts(args: argparse.Namespace, samples: Sequence[tuple[Sequence[int], Sequence[int]]]) -> str:
    """How many contexts lose their beginning, and how many completions are longer; "" if none."""
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
    if not parts:
        return ""
    room = max(args.eval_len, *(len(completion) for _, completion in samples))
    return (f"{'; '.join(parts)}; raise --eval_len to {room} and --seq_len to "
            f"{room + max(len(context) for context, _ in samples)} to cut none")


def contexts_at_a_time(args: argparse.Namespace, config: GPT2Config, contexts: int | None,
                       rows: int) -> int:
    """How many contexts to search at a time: ``--batch_size``, on the CPU more if memory is free.

    ``contexts`` says how many there are, None if that is not known; each has that many ``rows``
    (beams). The weights must not be in memory yet, and Jittor must have started. Raises InputError
    if there is not even the memory for ``--batch_size``.
    """
    import jittor as jt

    width = config.n_layer * config.n_embd
    weights = 4 * config.weights
    # keys and values of what is generated, logits
    generated = 4 * rows * (2 * width * args.eval_len + config.vocab_size)
    asked = args.batch_size if contexts is None else min(args.batch_size, contexts)
    memory.require(weights + asked * generated,
                   "take a smaller --batch_size, --beam or --model_card")
    if args.hold_batch_size or jt.flags.use_cuda:  # how much a GPU has left is not known
        return args.batch_size
    # Half of the rest stays free, for other programs and for what is needed for a moment.
    free = (memory.available() // processes.local_size() - weights) // 2
    context = generated + 4 * 3 * width * (args.seq_len - args.eval_len)  # at most
    return max(args.batch_size, min(FAST_ROWS // rows, free // context))


def make_generator(args: argparse.Namespace, config: GPT2Config):
    """The model with its weights, in the form that can only generate; Jittor must have started."""
    import jittor as jt

    import checkpoint
    from generator import Generator
    from model import GPT2LMModel

    if args.precision == "int8" and jt.flags.use_cuda:
        wrong("--precision int8: for --device cpu only; give bf16 or float32")
    model = GPT2LMModel(config, LoRAConfig(args.lora_dim, args.lora_alpha))
    checkpoint.load(model, args.init_checkpoint, args.lora_checkpoint, lora_required=True)
    # When the model is dropped, its matrices are freed as they are packed; on the CPU, those in
    # float32 only here, since the packed ones are larger and do not fit into freed memory.
    if args.precision == "float32" and not jt.flags.use_cuda:
        model.pack("float32", many_rows=False)
    return Generator(model, args.precision)


def beam_options(args: argparse.Namespace):
    """The flags as BeamOptions; Jittor must have started."""
    from beam_search import BeamOptions

    return BeamOptions(
        beam=args.beam, eval_len=args.eval_len, min_length=args.min_length,
        length_penalty=args.length_penalty, no_repeat_ngram_size=args.no_repeat_ngram_size,
        repetition_penalty=args.repetition_penalty, eos_token_ids=frozenset(args.eos_token_id))
