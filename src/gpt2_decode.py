"""Stage 5: decodes predicted token ids to text, and collects the references of each context.

    python src/gpt2_decode.py --vocab DIR --sample_file F --input_file F \\
        --output_ref_file F --output_pred_file F [--ref_type e2e|webnlg|dart] ...

Lines of the input with equal contexts (or equal ids in ``--ref_unique_file``) are one group, in
the order of their first lines: one prediction and all their completions as its references. Of
several predictions for a group the last counts. Inputs without a reference have no "completion" or
an empty one; if none has a reference, only the predictions are written.
"""

from __future__ import annotations

import argparse
import os
import re
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Hashable

from conversion import without_reference
from encoder import END_OF_TEXT, Encoder, get_encoder
from runtime.errors import InputError
from runtime.flags import ArgumentParser, at_least
from runtime.formats import is_stream, read_jsonl, read_lines, replacing
from runtime.progress import log
from runtime.script import run


@dataclass
class Group:
    """What belongs to one context; ``line`` is the first line of the input that has it."""

    line: int
    references: list[str] = field(default_factory=list)
    prediction: str | None = None


def clean(text: str) -> str:
    """The text up to ``<|endoftext|>`` and the first empty line, on one line.

    A single line break becomes a blank, since in the output files each line is a record.
    """
    text = text.split(END_OF_TEXT)[0].split("\n\n")[0]
    # Matches begin only where a run of white space does, or a long run would take quadratic time.
    return re.sub(r"(?<!\s)\s*[\r\n]\s*", " ", text.strip())


def post_process(text: str, tokenize: bool, lower: bool) -> str:
    """The text, if asked in lower case, its words and other characters separated by blanks."""
    text = text.lower() if lower else text
    return " ".join(re.findall(r"\w+|[^\w\s]", text)) if tokenize else text


def read_keys(path: str, input_file: str, n: int) -> list[int]:
    """The integers in a file of one a line; there must be ``n``, as many as in ``input_file``."""
    keys = []
    for number, line in enumerate(read_lines(path), start=1):
        try:
            keys.append(int(line))
        except ValueError:
            raise InputError(f"{path}:{number}: not an integer; every line must be the id of the "
                             f"same line of {input_file}") from None
    if len(keys) != n:
        raise InputError(f"{path}: {len(keys)} lines, but {input_file} has {n}; every line must "
                         "be the id of the same line there")
    return keys


def group_references(path: str, records: list[dict], keys: list[Hashable], wanted: str,
                     may_be_empty: bool) -> dict[Hashable, Group]:
    """The groups of an input file's records, where record i belongs to group ``keys[i]``.

    ``wanted`` is all, seen (records whose "cate" is true) or unseen (false). A completion that is
    absent or empty is no reference, unless references ``may_be_empty``. Raises InputError for one
    that loses all its text, unless they may, and if no record is wanted.
    """
    groups: dict[Hashable, Group] = {}
    for line, (record, key) in enumerate(zip(records, keys), start=1):
        if wanted != "all" and record["cate"] != (wanted == "seen"):
            continue
        completion = record.get("completion", "")
        reference = clean(completion)
        if not reference and completion.strip() and not may_be_empty:
            raise InputError(f"{path}:{line}: the completion has no text before its first empty "
                             "line, which would end a group; give it one or remove the line")
        group = groups.setdefault(key, Group(line))
        if reference or may_be_empty and "completion" in record:
            group.references.append(reference)
    if not groups:
        raise InputError(f"{path}: no line is of a category {wanted} in training; "
                         "take --filter all")
    return groups


def decode_samples(path: str, samples: list[dict], encoder: Encoder, keys: list[Hashable],
                   groups: dict[Hashable, Group], input_file: str) -> None:
    """Decodes the samples of a prediction file into their groups.

    Only the first ``length`` token ids of a sample, if it has one, are the prediction. Raises
    InputError for an id beyond the input, for a token id outside the vocabulary, and for a group
    without a sample.
    """
    for line, sample in enumerate(samples, start=1):
        if sample["id"] >= len(keys):
            raise InputError(f"{path}:{line}: id {sample['id']}, but {input_file} has only "
                             f"{len(keys)} lines; give the file that the predictions are of")
        length = sample.get("length", len(sample["predict"]))  # the original writes none
        if type(length) is not int or not 0 <= length <= len(sample["predict"]):
            raise InputError(f"{path}:{line}: \"length\" is not a number of tokens of \"predict\"; "
                             "make the file with src/gpt2_beam.py")
        try:
            prediction = clean(encoder.decode(sample["predict"][:length]))
        except ValueError as error:
            raise InputError(f"{path}:{line}: {error}; give the vocabulary that the model was "
                             "trained with") from None
        if keys[sample["id"]] in groups:
            groups[keys[sample["id"]]].prediction = prediction
    for group in groups.values():
        if group.prediction is None:
            raise InputError(f"{path}: no prediction for the context of {input_file}:{group.line};"
                             " run src/gpt2_beam.py on all of the data")


def reference_files(target: str, ref_type: str, ref_num: int,
                    references: list[list[str]]) -> dict[Path, list[str]]:
    """The lines of each reference file, where ``references`` holds a list for each prediction.

    e2e: one file, an empty line after each group. webnlg, dart: ``ref_num`` files in a folder,
    file i with the i-th reference of each group, or its first where it has fewer, or an empty line
    where it has none. No files if no reference has text.
    """
    if not any(map("".join, references)):
        return {}
    if ref_type == "e2e":
        return {Path(target): [line for group in references for line in (*group, "")]}
    return {Path(target, f"reference{i}"): [(group[i:i + 1] or group[:1] or [""])[0]
                                            for group in references]
            for i in range(ref_num)}


def refuse_old(target: str) -> None:
    """Raises InputError if references of another run are where this one writes none."""
    path = Path(target)
    if path.is_file() and not is_stream(path) or path.is_dir() and any(path.glob("reference*")):
        raise InputError(f"{path}: holds references, but no input of this run has any; remove it "
                         "or give --output_ref_file another name")


def write_together(files: dict[Path, list[str]]) -> None:
    """Writes several files of lines; no file is replaced before all are written."""
    with ExitStack() as stack:  # ends in reverse order: first streams are written, which may fail
        for path, lines in sorted(files.items(), key=lambda item: is_stream(item[0])):
            file = stack.enter_context(replacing(path))
            file.writelines(f"{line}\n".encode("utf-8") for line in lines)
            file.flush()  # so that a full disk is noticed before the first file is replaced
            os.fsync(file.fileno())


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--vocab", required=True, metavar="DIR",
                        help="folder of encoder.json and vocab.bpe")
    parser.add_argument("--sample_file", required=True, metavar="FILE",
                        help="predictions, from gpt2_beam.py")
    parser.add_argument("--input_file", required=True, metavar="FILE",
                        help="formatted JSON lines that the predictions are of")
    parser.add_argument("--output_ref_file", required=True, metavar="PATH",
                        help="references: a file for e2e, a folder for webnlg and dart")
    parser.add_argument("--output_pred_file", required=True, metavar="FILE",
                        help="decoded predictions, one a line")
    parser.add_argument("--ref_unique_file", metavar="FILE",
                        help="an integer for each input line, equal ones are one group; none: "
                             "equal contexts are")
    parser.add_argument("--ref_type", default="e2e", choices=["e2e", "webnlg", "dart"],
                        help="layout of the references")
    parser.add_argument("--ref_num", type=at_least(1), default=4, metavar="N",
                        help="number of reference files for webnlg and dart")
    parser.add_argument("--tokenize", action="store_true",
                        help="separate words and punctuation by blanks")
    parser.add_argument("--lower", action="store_true", help="write lower case")
    parser.add_argument("--filter", default="all", choices=["all", "seen", "unseen"],
                        help="keep only lines whose \"cate\", of WebNLG, is true (seen) or false")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    fields = {"context": str, "completion": str, **({"cate": bool} if args.filter != "all" else {})}
    records = read_jsonl(args.input_file, fields,
                         f"make the file with src/format_converting_{args.ref_type}.py",
                         optional=["completion"])
    samples = read_jsonl(args.sample_file, {"id": int, "predict": list},
                         "make the file with src/gpt2_beam.py")
    keys = [record["context"] for record in records]
    if args.ref_unique_file:
        keys = read_keys(args.ref_unique_file, args.input_file, len(records))

    encoder = get_encoder(args.vocab)
    groups = group_references(args.input_file, records, keys, args.filter,
                              may_be_empty=args.ref_type != "e2e")
    decode_samples(args.sample_file, samples, encoder, keys, groups, args.input_file)

    finish = partial(post_process, tokenize=args.tokenize, lower=args.lower)
    predictions = [finish(group.prediction or "") for group in groups.values()]
    references = [[finish(text) for text in group.references] for group in groups.values()]
    files = reference_files(args.output_ref_file, args.ref_type, args.ref_num, references)
    pred_file = Path(args.output_pred_file)
    if os.path.realpath(pred_file) in {os.path.realpath(path) for path in files}:
        raise InputError(f"{pred_file}: named for the predictions and for references; give "
                         "--output_pred_file another name")
    if not files:
        refuse_old(args.output_ref_file)
    write_together({**files, pred_file: predictions})
    written = references
    if args.ref_type != "e2e":
        written = [group[:args.ref_num] for group in references]
    left_out = sum(map(len, references)) - sum(map(len, written))
    log(f"{args.output_pred_file}: {len(predictions)} predictions; {args.output_ref_file}: "
        + (f"{sum(map(len, written))} references" if files else "not written")
        + (f", {left_out} beyond --ref_num {args.ref_num} left out" if left_out else "")
        + without_reference(map("".join, references)))


if __name__ == "__main__":
    run(main)
