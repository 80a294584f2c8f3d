"""The beam search of src/gpt2_beam.py in PyTorch, written for clarity.

    python align/torch_beam.py --data test.jsonl --init_checkpoint model.1050.pt --lora_dim 4

Writes ``{"id": n, "predict": [eval_len token ids, zeros after the sequence]}`` on each line.

The result is that of the original with a batch size of 1. With larger batches, the original takes
the first token of sample b from row b of (batch * beams) rows, which belongs to another sample.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache, GPT2LMHeadModel

import torch_flags
from common import ArgumentParser, InputError, log, progress, run, write_jsonl
from torch_data import read_samples

END_OF_TEXT = 50256


@torch.no_grad()
def search(model: GPT2LMHeadModel, query: list[int], *, num_beams: int, eval_len: int,
           eos: Collection[int] = (END_OF_TEXT,), length_penalty: float = 1.0,
           no_repeat_ngram_size: int = 4, repetition_penalty: float = 1.0,
           min_length: int = 0) -> list[int]:
    """The best continuation of ``query``: at most ``eval_len`` ids, the end token included.

    A beam that ends is rated score / length ** length_penalty and is not continued; the first of
    the best is the result. Beams that have not ended after ``eval_len`` tokens are rated too. The
    search stops earlier only if all beams have ended, because then the result cannot change.
    """
    model.eval()
    cache = DynamicCache()
    output = model(torch.tensor([query], device=model.device), past_key_values=cache,
                   use_cache=True)
    logits = output.logits[:, -1].repeat(num_beams, 1)  # (num_beams, V)
    cache.batch_repeat_interleave(num_beams)
    vocab_size = logits.shape[-1]

    history = torch.empty(num_beams, 0, dtype=torch.long, device=model.device)
    scores = torch.full_like(logits[:, 0], -torch.inf)  # (num_beams)
    scores[0] = 0.0  # all beams are still equal: the first step continues one of them
    best, best_score = [], None

    for length in range(1, eval_len + 1):
        restrict(logits, history, eos if length - 1 < min_length else (),
                 no_repeat_ngram_size, repetition_penalty)
        log_probs = torch.log(torch.softmax(logits, dim=-1))
        scores, chosen = (scores[:, None] + log_probs).flatten().topk(num_beams)
        beam, token = chosen // vocab_size, chosen % vocab_size
        history = torch.cat([history[beam], token[:, None]], dim=1)  # (num_beams, length)

        ended = [n for n in range(num_beams) if int(token[n]) in eos]
        if length == eval_len:
            ended += [n for n in range(num_beams) if n not in ended]
        for n in ended:
            score = scores[n] / length ** length_penalty
            if best_score is None or score > best_score:
                best, best_score = history[n].tolist(), score
            scores[n] = -torch.inf
        if best_score is not None and bool(torch.isneginf(scores).all()):
            break
        cache.reorder_cache(beam)
        logits = model(token[:, None], past_key_values=cache, use_cache=True).logits[:, -1]
    return best


def restrict(logits: Tensor, history: Tensor, forbidden: Collection[int],
             no_repeat_ngram_size: int, repetition_penalty: float) -> None:
    """Changes ``logits`` (num_beams, V) in place, given what each beam has generated so far.

    The order is: the repetition penalty (Keskar et al., 2019, arXiv:1909.05858), tokens that are
    ``forbidden`` for all beams, tokens that would repeat an n-gram.
    """
    if repetition_penalty != 1.0:
        for beam, tokens in enumerate(history):
            seen = tokens.unique()
            values = logits[beam, seen]
            logits[beam, seen] = torch.where(values < 0, values * repetition_penalty,
                                             values / repetition_penalty)
    for token in forbidden:
        logits[:, token] = -torch.inf
    if no_repeat_ngram_size > 0:
        for beam, tokens in enumerate(history.tolist()):
            logits[beam, repeating(tokens, no_repeat_ngram_size)] = -torch.inf


def repeating(tokens: list[int], n: int) -> list[int]:
    """The tokens that would repeat an n-gram of ``tokens`` if they were appended to it."""
    tail = tokens[len(tokens) - n + 1:]
    return [tokens[i + n - 1] for i in range(len(tokens) - n + 1) if tokens[i:i + n - 1] == tail]


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser("Beam search with GPT-2 and LoRA by PyTorch.", "gpt2_beam")
    torch_flags.add_model_flags(parser, card="gpt2.sm")
    positive = torch_flags.at_least(1)
    parser.add_argument("--data", required=True, metavar="JSONL", help="samples to continue")
    parser.add_argument("--output_file", default="beam_prediction.jsonl",
                        help="name of the output in --work_dir (default: %(default)s)")
    parser.add_argument("--batch_size", type=positive, default=10,
                        help="largest number of samples at a time; no effect: this program "
                             "takes one at a time, without padding, and the output is the same")
    parser.add_argument("--beam", type=positive, default=1)
    parser.add_argument("--eval_len", type=positive, default=256,
                        help="tokens to generate at most (default: %(default)s)")
    parser.add_argument("--min_length", type=torch_flags.at_least(0), default=0)
    parser.add_argument("--length_penalty", type=float, default=1.0)
    parser.add_argument("--no_repeat_ngram_size", type=torch_flags.at_least(0), default=4,
                        help="no n-gram of this length may occur twice; 0: no limit")
    parser.add_argument("--repetition_penalty", type=float, default=1.0)
    parser.add_argument("--eos_token_id", type=int, action="append", default=[END_OF_TEXT],
                        help=f"an end token in addition to {END_OF_TEXT}; may be repeated")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.eval_len >= args.seq_len:
        raise InputError(f"--eval_len {args.eval_len}: must be less than --seq_len {args.seq_len}, "
                         "which holds the context too")
    model = torch_flags.make_model(args)
    vocab_size = model.config.vocab_size
    for token in args.eos_token_id:
        if not 0 <= token < vocab_size:
            raise InputError(f"--eos_token_id {token}: is outside the vocabulary of {vocab_size}")
    queries = []
    for number, sample in enumerate(read_samples(args.data, vocab_size), start=1):
        if not sample["context"]:
            raise InputError(f"{args.data}:{number}: the context is empty; encode with --add_bos")
        queries.append(tuple(sample["context"][-(args.seq_len - args.eval_len):]))

    started = time.perf_counter()
    found = {}  # equal contexts have equal continuations
    for query in progress(dict.fromkeys(queries), "beam search", unit="sample"):
        tokens = search(model, list(query), num_beams=args.beam, eval_len=args.eval_len,
                        eos=set(args.eos_token_id), length_penalty=args.length_penalty,
                        no_repeat_ngram_size=args.no_repeat_ngram_size,
                        repetition_penalty=args.repetition_penalty, min_length=args.min_length)
        found[query] = {"predict": tokens + [0] * (args.eval_len - len(tokens)),
                        "length": len(tokens)}
    output = Path(args.work_dir) / args.output_file
    write_jsonl(output, ({"id": n, **found[query]} for n, query in enumerate(queries)))
    seconds = time.perf_counter() - started
    log(f"{len(queries)} samples ({len(found)} different) in {seconds:.1f} s, "
        f"{len(queries) / seconds:.2f} samples/s; wrote {output}")


if __name__ == "__main__":
    run(main)
