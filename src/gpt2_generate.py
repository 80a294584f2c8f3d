"""Generates text for inputs without references: stages 2, 4 and 5 in one process.

    python src/gpt2_generate.py @data/experiment.ini --init_checkpoint model.1050.pt \\
        "name : Blue Spice | Type : pub"

Takes one input from the command line, those of ``--input``, or a line each from standard input. The
text of each goes to standard output, in their order; everything else goes to standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from functools import partial
from typing import TYPE_CHECKING, Callable, Iterator, NamedTuple

import generation
from config import GPT2Config
from dataset import check_sample
from encoder import Encoder, get_encoder
from format_converting_e2e import SEPARATOR
from gpt2_decode import clean
from gpt2_encode import encode_record
from runtime import backend, processes
from runtime.errors import InputError
from runtime.flags import ArgumentParser, add_device_flag, at_least, between, seed
from runtime.formats import is_text, read_jsonl, read_lines
from runtime.progress import log, results_on_stdout
from runtime.script import run

if TYPE_CHECKING:  # needs Jittor
    from beam_search import Hypothesis

EXAMPLE = "name : Blue Spice | Type : pub"
SAMPLING = ("temperature", "top_k", "top_p", "random_seed")  # flags that need --sample


class Query(NamedTuple):
    """An input; ``referenced``: its line has a reference behind "||", which is not read."""

    where: str  # it is from, for errors
    context: str
    tokens: list[int]
    referenced: bool


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__, "gpt2_beam", borrowed=True)
    data = parser.add_argument_group("input")
    data.add_argument("text", metavar="TEXT", nargs="?",
                      help=f"one input, e.g. \"{EXAMPLE}\"; without it and --input: the lines of "
                           "standard input")
    data.add_argument("--input", metavar="FILE",
                      help="inputs, one a line; .jsonl: the \"context\" of each line")
    data.add_argument("--vocab", metavar="DIR", default="vocab",
                      help="folder of encoder.json and vocab.bpe")
    generation.add_flags(parser, data)

    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--sample", action="store_true",
                          help="draw the texts at random instead of searching them; no --beam")
    sampling.add_argument("--temperature", type=at_least(0.01, float), default=1.0,
                          help="logits are divided by it: below 1, likely tokens become likelier")
    sampling.add_argument("--top_k", type=at_least(0), default=0,
                          help="draw from the k likeliest tokens; 0: from all")
    sampling.add_argument("--top_p", type=between(0, 1), default=1.0,
                          help="draw from the fewest tokens whose probabilities add up to this")
    sampling.add_argument("--random_seed", type=seed, default=10,
                          help="with the number of an input, it determines what is drawn")

    output = parser.add_argument_group("output")
    output.add_argument("--n_best", type=at_least(1), default=1, metavar="N",
                        help="print the best N texts of each input, then an empty line")
    output.add_argument("--json", action="store_true",
                        help="print a JSON line for each input: texts, scores and token ids")
    add_device_flag(parser)
    args = parser.parse_args()

    generation.check_flags(parser, args)
    if args.text is not None and args.input is not None:
        parser.error(f"--input {args.input}: give this or TEXT, not both")
    for name in SAMPLING:
        if not args.sample and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} {getattr(args, name)}: does nothing without --sample")
    if not args.sample and args.n_best > args.beam:
        parser.error(f"--n_best {args.n_best}: a search with --beam {args.beam} need not find so "
                     "many")
    if parser.left_out:
        print(f"note: not for this script, and left out: {', '.join(parser.left_out)}",
              file=sys.stderr)
    return args


def make_query(where: str, text: str, encoder: Encoder, config: GPT2Config,
               is_line: bool = True) -> Query:
    """The query of an input, encoded as by stages 1 and 2.

    In a line as E2E's, "||" ends the context. Raises InputError for an empty input, and one that
    the model cannot read.
    """
    reference = ""
    if is_line:
        text, _, reference = text.strip().partition(SEPARATOR)
    if not text.strip() or not is_text(text):
        raise InputError(f"{where}: {'not UTF-8' if text.strip() else 'an empty input'}; write "
                         f"one such as {EXAMPLE}")
    tokens = encode_record({"context": text}, encoder, add_bos=True, add_eos=False)["context"]
    check_sample(where, tokens, [], config.vocab_size, config.n_positions)
    return Query(where, text, tokens, bool(reference))


def read_given(args: argparse.Namespace, make: Callable[..., Query]) -> list[Query]:
    """The query on the command line, or those of ``--input``."""
    if args.text is not None:
        return [make("TEXT", args.text)]
    remedy = f"write one input a line, e.g. {EXAMPLE}"
    if args.input.endswith(".jsonl"):
        records = read_jsonl(args.input, {"context": str}, remedy)
        return [make(f"{args.input}:{number}", record["context"], is_line=False)
                for number, record in enumerate(records, start=1)]
    lines = read_lines(args.input, remedy)
    if not lines:
        raise InputError(f"{args.input}: the file is empty; {remedy}")
    return [make(f"{args.input}:{number}", line) for number, line in enumerate(lines, start=1)]


def read_stream(make: Callable[..., Query]) -> Iterator[list[Query]]:
    """The queries of standard input, as many at a time as have come.

    Raises InputError after those before a mistake; on a terminal, a mistake is reported only.
    """
    number, rest, chunk = 0, b"", b"-"
    while chunk:
        chunk = os.read(sys.stdin.fileno(), 1 << 16)
        *lines, rest = (rest + chunk).split(b"\n")
        if rest and not chunk:  # the last line has no line end
            lines = [rest]
        queries: list[Query] = []
        for line in lines:
            number += 1
            try:
                queries.append(make(f"standard input:{number}", decoded(line, number)))
            except InputError as error:
                if queries:
                    yield queries
                    queries = []
                if not sys.stdin.isatty():
                    raise
                print(f"error: {error}", file=sys.stderr)
        if queries:
            yield queries


def decoded(line: bytes, number: int) -> str:
    """A line of standard input, with that number, as text."""
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r")
    except UnicodeDecodeError:
        raise InputError(f"standard input:{number}: not UTF-8; convert it, e.g. iconv -f ENCODING "
                         "-t UTF-8") from None
    if "\r" in text:
        raise InputError(f"standard input:{number}: a carriage return inside the line; end lines "
                         "with LF or CRLF, or give a file with --input")
    return text


def report(args: argparse.Namespace, queries: list[Query]) -> None:
    """Logs what of the queries is not read."""
    referenced = sum(query.referenced for query in queries)
    if referenced:
        log(f"{referenced} of {len(queries)} inputs have a reference behind \"{SEPARATOR}\", which "
            "is not read")
    if cut := generation.cuts(args, [(query.tokens, []) for query in queries]):
        log(cut)


def generate(args: argparse.Namespace, generator, queries: list[Query],
             first: int) -> list[list[Hypothesis]]:
    """The continuations of a batch, ``--n_best`` of each; ``first`` is its first query's number."""
    from beam_search import search_n_best
    from sampling import SampleOptions, sample

    keep, options = args.seq_len - args.eval_len, generation.beam_options(args)
    contexts = [tuple(query.tokens[-keep:]) for query in queries]
    if args.sample:
        how = SampleOptions(args.temperature, args.top_k, args.top_p)
        seeds = [[(args.random_seed, number, n) for n in range(args.n_best)]
                 for number in range(first, first + len(contexts))]
        return sample(generator, contexts, options, how, seeds)
    distinct = list(dict.fromkeys(contexts))
    found = dict(zip(distinct, search_n_best(generator, distinct, options, args.n_best)))
    return [found[context] for context in contexts]


def lines_of(args: argparse.Namespace, number: int, query: Query, found: list[Hypothesis],
             encoder: Encoder) -> str:
    """What is printed for a query."""
    try:
        texts = [clean(encoder.decode(one.tokens)) for one in found]
    except ValueError as error:
        raise InputError(f"{query.where}: predicts a token that is no text: {error}; give the "
                         "vocabulary that the model was trained with") from None
    if args.json:
        return json.dumps({"id": number, "context": query.context, "predictions": [
            {"text": text, "score": float(one.score), "predict": list(one.tokens)}
            for text, one in zip(texts, found)]}) + "\n"
    if args.n_best == 1:
        return "".join(texts) + "\n"
    return "".join(f"{text}\n" for text in [*texts, ""])


def main() -> None:
    args = parse_args()
    if processes.world_size() > 1:
        raise InputError("src/gpt2_generate.py works in one process; start it without mpirun")
    with results_on_stdout() as results:
        config = generation.complete(args)
        encoder = get_encoder(args.vocab)
        make = partial(make_query, encoder=encoder, config=config)
        streamed = args.text is None and args.input is None
        given = [] if streamed else read_given(args, make)
        backend.start(args.device)
        at_a_time = generation.contexts_at_a_time(
            args, config, None if streamed else len(given),
            args.n_best if args.sample else args.beam)
        generator = generation.make_generator(args, config)
        if streamed and sys.stdin.isatty():
            log(f"one input a line, e.g. {EXAMPLE}; Ctrl-D ends")
        number = 0
        for queries in read_stream(make) if streamed else [given]:
            report(args, queries)
            for start in range(0, len(queries), at_a_time):
                batch = queries[start:start + at_a_time]
                for query, found in zip(batch, generate(args, generator, batch, number)):
                    results.write(lines_of(args, number, query, found, encoder).encode("utf-8"))
                    number += 1
                results.flush()


if __name__ == "__main__":
    run(main)
