"""Adds a line with the settings and the scores of a run to WORK_DIR/results.csv.

    python eval/e2e/record_scores.py WORK_DIR DATA SCORES PREDICTIONS

work.sh calls it after scoring. SCORES (what measure_scores.py printed) and PREDICTIONS (of
src/gpt2_beam.py) are names of files in WORK_DIR; the settings are in its finished.json.
"""

from __future__ import annotations

import csv
import io
import subprocess
import sys
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "src"))  # for runtime/

from runtime.errors import InputError  # noqa: E402
from runtime.flags import ArgumentParser  # noqa: E402
from runtime.formats import read_jsonl, read_lines, replacing  # noqa: E402
from runtime.progress import log  # noqa: E402
from runtime.script import run  # noqa: E402

METRICS = ("BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr")
COLUMNS = ("date", "data", "card", "rank", "alpha", "seed", "steps", *METRICS, "samples_per_s",
           "commit")
REMEDY = "bash work.sh makes it"


def commit() -> str:
    """The commit of this clone, with "-dirty" if files differ from it; "" if git knows none."""
    # Named, because git would else take a repository that the folder lies in.
    command = ["git", f"--git-dir={ROOT / '.git'}", f"--work-tree={ROOT}", "describe", "--always",
               "--dirty", "--exclude=*", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.strip()
    except OSError:
        return ""


def scores_in(path: Path) -> list[str]:
    """The five scores as they were printed; "" for one that is missing."""
    scores = dict(line.split(": ", 1) for line in read_lines(path, REMEDY) if ": " in line)
    if "BLEU" not in scores:
        raise InputError(f"{path}: no scores of measure_scores.py; {REMEDY}")
    return [score if score[:1].isdigit() else ""
            for score in (scores.get(metric, "") for metric in METRICS)]


def row_of(work_dir: Path, data: str, scores: str, predictions: str) -> list[object]:
    """The values of COLUMNS; "" for one that is not known."""
    path = work_dir / "finished.json"
    finished = read_jsonl(path, {"checkpoint": str}, REMEDY)[0]
    try:
        settings = [finished["settings"][name] for name in (
            "model_card", "lora_dim", "lora_alpha", "random_seed")]
        steps = int(finished["checkpoint"].split(".")[-2])
    except (LookupError, TypeError, ValueError):
        raise InputError(f"{path}: not as src/gpt2_ft.py left it; {REMEDY}") from None
    search = read_jsonl(work_dir / f"{predictions}.state", {}, REMEDY)[0]
    return [datetime.now().astimezone().isoformat(timespec="seconds"), data,
            *settings, steps, *scores_in(work_dir / scores), search.get("samples_per_s"), commit()]


def append(path: Path, row: list[object]) -> None:
    """Adds a row to a CSV file with COLUMNS, which is made if needed, as a whole or not at all."""
    def line(values) -> bytes:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(values)
        return text.getvalue().encode("utf-8", "surrogateescape")

    heading = read_lines(path)[:1] if path.exists() else []
    if heading and heading != [",".join(COLUMNS)]:
        raise InputError(f"{path}:1: other columns than {','.join(COLUMNS)}; move the file away")
    old = path.read_bytes() if heading else line(COLUMNS)
    with replacing(path) as file:
        file.write(old.removesuffix(b"\n") + b"\n" + line(row))


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("work_dir", type=Path, help="folder of the run")
    parser.add_argument("data", help="what it was trained on, for the table")
    parser.add_argument("scores", help="file of the scores")
    parser.add_argument("predictions", help="file of the predictions")
    args = parser.parse_args()
    path = args.work_dir / "results.csv"
    append(path, row_of(args.work_dir, args.data, args.scores, args.predictions))
    log(f"{path}: one more line, with {args.scores} and the settings")


if __name__ == "__main__":
    run(main)
