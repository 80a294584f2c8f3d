"""Scores predictions against references: BLEU, NIST, METEOR, ROUGE-L and CIDEr.

    python eval/e2e/measure_scores.py e2e_ref.txt e2e_pred.txt -p

Figures, options and file formats are those of the E2E NLG challenge's own script (Dusek et al.,
2020, "Evaluating the State-of-the-Art of End-to-End Natural Language Generation").
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from pathlib import Path

EVAL = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(EVAL), str(EVAL.parent / "src")]  # for metrics/ and runtime/

from challenge_files import Segment, load  # noqa: E402
from metrics import coco  # noqa: E402
from metrics.mteval import Bleu, Nist  # noqa: E402
from runtime.errors import InputError  # noqa: E402
from runtime.flags import ArgumentParser  # noqa: E402
from runtime.formats import replacing  # noqa: E402
from runtime.script import run  # noqa: E402

METRICS = ("BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr")


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument("ref_file", metavar="REF", help="references: one per line, an empty line "
                        "after those of each input (no empty line: one reference per input); or "
                        "a .tsv or .csv of sources and references")
    parser.add_argument("sys_file", metavar="PRED", help="predictions: one per line; or a .tsv or "
                        ".csv of sources and predictions")
    parser.add_argument("-l", "--sent-level", "--seg-level", "--sentence-level",
                        "--segment-level", metavar="TSV", help="write the scores of each segment "
                        "to this file instead of printing the scores of all")
    parser.add_argument("-s", "--src-file", metavar="SRC", help="sources, one per line: PRED must "
                        "be a table with the same sources")
    parser.add_argument("-p", "--python", action="store_true", help="BLEU and NIST of the "
                        "challenge's Python version instead of NIST's mteval-v13a.pl: they differ "
                        "where predictions are empty or shorter than 5 words (-l: always so)")
    parser.add_argument("-t", "--table", action="store_true",
                        help="print the scores as one tab-separated line")
    parser.add_argument("-H", "--header", action="store_true",
                        help="with -t: print a line of headings before it")
    return parser.parse_args()


def scores_of_coco(segments: list[Segment]) -> tuple[dict[str, coco.Scores], InputError | None]:
    """METEOR, ROUGE-L and CIDEr by name; where METEOR failed, its scores are NaN, and why."""
    found = coco.scores([segment.references for segment in segments],
                        [segment.prediction for segment in segments])
    failure = found["METEOR"]
    if isinstance(failure, InputError):
        return {**found, "METEOR": (math.nan, [math.nan] * len(segments))}, failure
    return found, None


def figure(score: float) -> str:
    return "missing" if math.isnan(score) else f"{score:.4f}"


def document_scores(segments: list[Segment], others: dict[str, coco.Scores],
                    v13a: bool) -> dict[str, str]:
    """The five scores of all segments together, by name; ``v13a`` as in `mteval`."""
    bleu, nist = Bleu(v13a=v13a), Nist(v13a=v13a)
    for segment in segments:
        bleu.add(segment.prediction, segment.references)
        nist.add(segment.prediction, segment.references)
    return {"BLEU": figure(bleu.score()), "NIST": figure(nist.score()),
            **{name: figure(document) for name, (document, _) in others.items()}}


def segment_rows(segments: list[Segment], others: dict[str, coco.Scores]) -> list[list[str]]:
    """The table of each segment's scores, headings first.

    As in the challenge's script, BLEU and NIST are the Python version's, whatever -p says.
    """
    rows = [["src", "sys_out", "BLEU", "sentBLEU", "NIST", *others]]
    for index, segment in enumerate(segments):
        scores = []
        for metric in (Bleu(), Bleu(smoothing=1.0), Nist()):
            metric.add(segment.prediction, segment.references)
            scores.append(metric.score())
        scores += [each[index] for _, each in others.values()]
        texts = [re.sub("[\t\r]", " ", text) for text in (segment.source, segment.prediction)]
        rows.append(texts + [figure(score) for score in scores])
    return rows


def main() -> None:
    args = parse_args()
    segments = load(args.ref_file, args.sys_file, args.src_file)
    coco.require()
    with_cr = sum("\r" in "".join([source, prediction, *references])
                  for source, references, prediction in segments)
    if with_cr:
        print(f"note: {with_cr} of {len(segments)} inputs have a carriage return inside a line, "
              "which is taken for a blank, not for the end of the line", file=sys.stderr)
    print(f"scoring {len(segments)} predictions (METEOR takes about a minute) ...",
          file=sys.stderr)
    if args.sent_level is not None:
        with replacing(args.sent_level) as file:  # opened now: a bad path fails early
            others, failure = scores_of_coco(segments)
            for row in segment_rows(segments, others):
                file.write(("\t".join(row) + "\n").encode("utf-8"))
    else:
        others, failure = scores_of_coco(segments)
        print_scores(args, document_scores(segments, others, v13a=not args.python))
    if failure:
        raise failure


def print_scores(args: argparse.Namespace, scores: dict[str, str]) -> None:
    if args.table:
        if args.header:
            print("\t".join(["File", *METRICS]))
        print("\t".join([args.sys_file, *(scores[name] for name in METRICS)]))
        return
    print("SCORES:\n==============")
    for name in METRICS:
        print(f"{name}: {scores[name]}")
    print()


if __name__ == "__main__":
    run(main)
