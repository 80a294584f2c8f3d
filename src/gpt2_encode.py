"""Stage 2: encodes JSON lines of text as JSON lines of GPT-2 token ids.

    python src/gpt2_encode.py --vocab DIR --input F --output F [--add_bos] [--add_eos]

A completion is encoded with a blank before it, because it continues its context. Records without
"completion" are inputs without a reference, and get none.
"""

from conversion import without_reference
from encoder import Encoder, get_encoder
from runtime.flags import ArgumentParser
from runtime.formats import read_jsonl, write_jsonl
from runtime.progress import log, progress
from runtime.script import run


def encode_record(record: dict, encoder: Encoder, add_bos: bool, add_eos: bool) -> dict:
    """The token ids of a record's context and, if it has one, completion.

    ``add_bos`` appends ``<|endoftext|>`` to the context, ``add_eos`` to the completion.
    """
    end = [encoder.end_of_text]
    encoded = {"context": encoder.encode(record["context"]) + end * add_bos}
    if "completion" in record:
        encoded["completion"] = encoder.encode(" " + record["completion"]) + end * add_eos
    return encoded


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--vocab", required=True, metavar="DIR",
                        help="folder of encoder.json and vocab.bpe")
    parser.add_argument("--input", required=True, metavar="FILE",
                        help="JSON lines of texts, from src/format_converting_*.py")
    parser.add_argument("--output", required=True, metavar="FILE", help="JSON lines of token ids")
    parser.add_argument("--add_bos", action="store_true",
                        help="put <|endoftext|> between context and completion")
    parser.add_argument("--add_eos", action="store_true",
                        help="put <|endoftext|> after the completion")
    args = parser.parse_args()

    records = read_jsonl(args.input, {"context": str, "completion": str},
                         "make the file with src/format_converting_*.py",
                         optional=["completion"])
    encoder = get_encoder(args.vocab)
    encoded = [encode_record(record, encoder, args.add_bos, args.add_eos)
               for record in progress(records, "encode", unit="lines")]
    write_jsonl(args.output, encoded)
    log(f"{args.output}: {len(encoded)} examples"
        + without_reference(record.get("completion", "") for record in records))


if __name__ == "__main__":
    run(main)
