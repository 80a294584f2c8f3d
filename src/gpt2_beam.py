"""Stage 4: continues the contexts of encoded samples by beam search.

Reads ``--data`` (src/gpt2_encode.py makes it) and the weights that src/gpt2_ft.py saved; writes
one JSON line a sample, its id and the predicted token ids, to WORK_DIR/OUTPUT_FILE.
"""

import argparse
import json
import os
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np

from config import MODEL_CARDS, LoRAConfig
from runtime import backend, processes
from runtime.flags import ArgumentParser, add_device_flag, at_least, between
from runtime.formats import replacing
from runtime.progress import Progress, log
from runtime.script import run

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
    model.add_argument("--model_card", choices=MODEL_CARDS, default="gpt2.sm", help="size of GPT-2")
    model.add_argument("--init_checkpoint", metavar="FILE", required=True,
                       help="weights (.bin, .pt, .safetensors)")
    model.add_argument("--lora_checkpoint", metavar="FILE",
                       help="LoRA matrices, if --init_checkpoint has only the base")
    model.add_argument("--lora_dim", type=at_least(0), default=0, help="LoRA's rank r; 0: no LoRA")
    model.add_argument("--lora_alpha", type=at_least(0), default=128,
                       help="LoRA's output is scaled by alpha / r")

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
    add_device_flag(parser)
    args = parser.parse_args()

    config = MODEL_CARDS[args.model_card]
    if args.seq_len <= args.eval_len:
        parser.error(f"--seq_len {args.seq_len} leaves no room for a context before --eval_len "
                     f"{args.eval_len} tokens")
    if args.seq_len > config.n_positions:
        parser.error(f"--seq_len {args.seq_len}: the model has {config.n_positions} positions")
    if args.beam > config.vocab_size:
        parser.error(f"--beam {args.beam}: the vocabulary has {config.vocab_size} tokens")
    return args


def main() -> None:
    args = parse_args()
    backend.start(args.device)
    # What needs Jittor is imported after the start, see backend.
    import checkpoint
    from beam_search import BeamOptions, predict
    from dataset import FTDataset
    from generator import Generator
    from model import GPT2LMModel

    card = MODEL_CARDS[args.model_card]
    queries = FTDataset(args.data, args.batch_size, args.seq_len, args.eval_len,
                        vocab_size=card.vocab_size, n_positions=card.n_positions).queries()
    model = GPT2LMModel(card, LoRAConfig(args.lora_dim, args.lora_alpha))
    checkpoint.load(model, args.init_checkpoint, args.lora_checkpoint, lora_required=True)
    generator = Generator(model)
    del model  # so that its matrices are freed as they are packed
    options = BeamOptions(
        beam=args.beam, eval_len=args.eval_len, min_length=args.min_length,
        length_penalty=args.length_penalty, no_repeat_ngram_size=args.no_repeat_ngram_size,
        repetition_penalty=args.repetition_penalty, eos_token_ids=frozenset(args.eos_token_id))
    # Each process searches its share of the different contexts, both long and short ones.
    distinct = sorted(dict.fromkeys(queries), key=len)
    share = set(distinct[processes.rank()::processes.world_size()])
    mine = [i for i, query in enumerate(queries) if query in share]
    predictions = np.zeros((len(queries), args.eval_len), np.int32)
    output = args.work_dir / args.output_file
    started = time.perf_counter()
    # Opened before the search, so that a bad path fails at once.
    with replacing(output) if processes.rank() == 0 else nullcontext() as file:
        with Progress(len(mine), "beam search", "sample") as bar:
            answers = predict(generator, [queries[i] for i in mine], options, args.batch_size,
                              bar.update)
        for i, answer in zip(mine, answers):
            predictions[i] = answer
        predictions = processes.total_array(predictions)
        if file:
            for i, ids in enumerate(predictions.tolist()):
                file.write(f"{json.dumps({'id': i, 'predict': ids})}\n".encode("utf-8"))
    took = time.perf_counter() - started
    log(f"{len(queries)} samples ({len(distinct)} different contexts) in {took:.1f} s, "
        f"{len(queries) / took:.2f} samples/s; saved {output}")


if __name__ == "__main__":
    run(main)
