"""Adds a line with the settings and the scores of a run to WORK_DIR/results.csv.

    python eval/record_scores.py WORK_DIR DATA PREDICTIONS SCORES [SCORES ...]

work.sh calls it after scoring. PREDICTIONS (of src/gpt2_beam.py) and SCORES are names of files in
WORK_DIR; the settings are in its finished.json. SCORES is what e2e/measure_scores.py printed, or,
with a name in .json, what eval_m.py wrote. The table has a column for each score in it: of
scores.json "BLEU" and so on, of scores.seen.json "BLEU seen".
"""

from __future__ import annotations

import csv
import io
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))  # for runtime/

from runtime.errors import InputError  # noqa: E402
from runtime.flags import ArgumentParser  # noqa: E402
from runtime.formats import read_jsonl, read_lines, replacing  # noqa: E402
from runtime.progress import log  # noqa: E402
from runtime.script import run  # noqa: E402

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


def scores_in(path: Path) -> dict[str, object]:
    """The scores in a file by the names of their columns, see above; "" for one that is missing."""
    if path.suffix == ".json":
        scores = read_jsonl(path, {"segments": int, "references": int}, REMEDY)[0]
        scores = {name: score for name, score in scores.items()
                  if name not in ("segments", "references")}
    else:
        scores = dict(match.groups() for line in read_lines(path, REMEDY)
                      if (match := re.fullmatch(r"(\w+): ([\d.]+|missing)", line)))
    if not scores or any(type(score) not in (str, int, float, type(None))
                         for score in scores.values()):
        raise InputError(f"{path}: no scores of measure_scores.py or eval_m.py; {REMEDY}")
    part = Path(path.stem).suffix.replace(".", " ")  # " seen" of scores.seen.json
    return {f"{name}{part}": "" if score in (None, "missing") else score
            for name, score in scores.items()}


def row_of(work_dir: Path, data: str, predictions: str, scores: list[str]) -> dict[str, object]:
    """A line of the table by column; "" or None for what is not known."""
    path = work_dir / "finished.json"
    finished = read_jsonl(path, {"checkpoint": str}, REMEDY)[0]
    try:
        card, rank, alpha, seed = (finished["settings"][name] for name in (
            "model_card", "lora_dim", "lora_alpha", "random_seed"))
        steps = int(finished["checkpoint"].split(".")[-2])
    except (LookupError, TypeError, ValueError):
        raise InputError(f"{path}: not as src/gpt2_ft.py left it; {REMEDY}") from None
    row = {"date": datetime.now().astimezone().isoformat(timespec="seconds"), "data": data,
           "card": card, "rank": rank, "alpha": alpha, "seed": seed, "steps": steps}
    for path in (work_dir / name for name in scores):
        columns = scores_in(path)
        if row.keys() & columns.keys():
            raise InputError(f"{path}: scores with the names of others; call one file "
                             "scores.NAME.json")
        row.update(columns)
    search = read_jsonl(work_dir / f"{predictions}.state", {}, REMEDY)[0]
    return {**row, "samples_per_s": search.get("samples_per_s"), "commit": commit()}


def append(path: Path, row: dict[str, object]) -> None:
    """Adds a row to a CSV file of its columns, which is made if needed, whole or not at all."""
    def line(values) -> bytes:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(values)
        return text.getvalue().encode("utf-8", "surrogateescape")

    heading = read_lines(path)[:1] if path.exists() else []
    if heading and heading != [",".join(row)]:
        raise InputError(f"{path}:1: other columns than {','.join(row)}; move the file away")
    old = path.read_bytes() if heading else line(row)
    with replacing(path) as file:
        file.write(old.removesuffix(b"\n") + b"\n" + line(row.values()))


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("work_dir", type=Path, help="folder of the run")
    parser.add_argument("data", help="what it was trained on, for the table")
    parser.add_argument("predictions", help="file of the predictions")
    parser.add_argument("scores", nargs="+", help="files of the scores")
    args = parser.parse_args()
    path = args.work_dir / "results.csv"
    append(path, row_of(args.work_dir, args.data, args.predictions, args.scores))
    log(f"{path}: one more line, with {', '.join(args.scores)} and the settings")


if __name__ == "__main__":
    run(main)
