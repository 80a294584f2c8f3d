"""Scores WebNLG's or DART's predictions against references: BLEU, METEOR and TER.

    python eval/eval_m.py -R references/reference -H hypothesis -nr 6 -m bleu,meteor,ter

The files are those of stage 5, src/gpt2_decode.py: line k of the predictions and of each reference
file belongs to input k. Flags and scores are those of the WebNLG challenge's script eval.py
(Castro Ferreira et al., 2020, "The 2020 Bilingual, Bi-Directional WebNLG+ Shared Task"). Unlike it,
this one takes no empty segment for what follows the last line break.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # for runtime/

from runtime.errors import InputError, one_line  # noqa: E402
from runtime.flags import ArgumentParser, at_least  # noqa: E402
from runtime.formats import read_lines, write_jsonl  # noqa: E402
from runtime.script import run  # noqa: E402

METRICS = ("bleu", "meteor", "ter")
UNUSED = ("chrf++", "bert", "bleurt")  # of the original's, not in the experiment


def metric_names(text: str) -> set[str]:
    """The type of -m: names of metrics between commas."""
    names = set(text.lower().split(","))
    if unknown := sorted(names - set(METRICS)):
        raise argparse.ArgumentTypeError(
            f"no metric {', '.join(unknown)!r}; there are {', '.join(METRICS)} "
            f"(the original's {', '.join(UNUSED)} are not part of the experiment)")
    return names


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument("-R", "--reference", required=True, metavar="PREFIX",
                        help="reference files without their numbers: PREFIX0, PREFIX1 ...")
    parser.add_argument("-H", "--hypothesis", required=True, metavar="FILE",
                        help="predictions, one in a line")
    parser.add_argument("-nr", "--num_refs", required=True, type=at_least(1), metavar="N",
                        help="number of reference files")
    parser.add_argument("-m", "--metrics", type=metric_names, default="bleu,meteor,ter",
                        metavar="NAMES", help="bleu, meteor and ter, or some of them, separated "
                        "by commas; bleu is two scores")
    parser.add_argument("-lng", "--language", choices=["en"], default="en",
                        help="METEOR's stems and synonyms are English")
    parser.add_argument("-who", metavar="NAME",
                        help="what is scored, for the line on stderr; none: the predictions' file")
    parser.add_argument("--json", metavar="FILE",
                        help="write the scores to this file, too, without rounding")
    return parser.parse_args()


def load(prefix: str, number: int, hypothesis: str) -> tuple[list[str], list[list[str]]]:
    """The prediction of each segment, and its references: those that differ from one another.

    Raises InputError for a file that is missing, empty, or of another length than the others.
    """
    predictions = read_lines(hypothesis, cr_in_lines=True)
    if not predictions:
        raise InputError(f"{hypothesis}: the file is empty; make it with src/gpt2_decode.py")
    columns = []
    for path in (f"{prefix}{i}" for i in range(number)):
        columns.append(read_lines(path, f"-R and -nr name {prefix}0 to {prefix}{number - 1}",
                                  cr_in_lines=True))
        if len(columns[-1]) != len(predictions):
            raise InputError(f"{path}: {len(columns[-1])} lines, but {hypothesis} has "
                             f"{len(predictions)}; make both with one run of src/gpt2_decode.py")
    # Stage 5 repeats the first reference where an input has fewer; no score depends on that.
    return predictions, [list(dict.fromkeys(group)) for group in zip(*columns)]


def scores_of(predictions: list[str], references: list[list[str]],
              wanted: set[str]) -> tuple[dict[str, float | None], InputError | None]:
    """The scores by name, and why METEOR failed if it did; then its score is None."""
    from metrics import bleu, coco, ter  # here: NLTK takes its time to load

    texts = {*predictions, *(text for group in references for text in group)}
    words = {text: bleu.words(text) for text in texts}
    hypothesis_words = [words[text] for text in predictions]
    reference_words = [[words[text] for text in group] for group in references]

    scores: dict[str, float | None] = {}
    failure = None
    if "bleu" in wanted:
        scores["BLEU"] = bleu.bleu(predictions, references)
        scores["BLEU NLTK"] = bleu.bleu_nltk(hypothesis_words, reference_words)
    if "meteor" in wanted:
        try:
            scores["METEOR"], _ = coco.meteor(
                [[" ".join(text) for text in group] for group in reference_words],
                [" ".join(text) for text in hypothesis_words], coco.require())
        except InputError as error:
            scores["METEOR"], failure = None, error
    if "ter" in wanted:
        scores["TER"] = ter.document(hypothesis_words, reference_words)
    return scores, failure


def table(scores: dict[str, float | None]) -> str:
    """The scores as the original prints them: a line of headings, one of two decimals at most."""
    from tabulate import tabulate

    row = ["missing" if score is None else round(score, 2) for score in scores.values()]
    return tabulate([row], headers=list(scores), stralign="right")


def main() -> None:
    args = parse_args()
    predictions, references = load(args.reference, args.num_refs, args.hypothesis)
    note = " (METEOR takes about a minute)" if "meteor" in args.metrics else ""
    print(one_line(f"scoring {args.who or args.hypothesis}: {len(predictions)} segments, "
                   f"{args.num_refs} references each{note} ..."), file=sys.stderr)
    scores, failure = scores_of(predictions, references, args.metrics)
    print(table(scores))
    if args.json:
        write_jsonl(args.json, [{**scores, "segments": len(predictions),
                                 "references": args.num_refs}])
    if failure:
        raise failure


if __name__ == "__main__":
    run(main)
