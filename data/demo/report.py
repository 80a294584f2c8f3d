"""Prints a table of scores and a few samples at the end of the demo.

    python data/demo/report.py TEST_FORMATTED WORK_DIR

Reads what work.sh wrote to WORK_DIR: ref.txt, {base,lora}.txt and {base,lora}_scores.txt.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from runtime.errors import InputError  # noqa: E402
from runtime.flags import ArgumentParser  # noqa: E402
from runtime.formats import read_jsonl, read_lines  # noqa: E402
from runtime.script import run  # noqa: E402

METRICS = ("BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr")
SAMPLES = 3


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("test_formatted", help="the test samples as text (.jsonl)")
    parser.add_argument("work_dir", type=Path, help="folder with the results of work.sh demo")
    args = parser.parse_args()

    remedy = "bash work.sh demo makes it"
    print(f"\n{'':24}" + "".join(f"{metric:>9}" for metric in METRICS))
    for name, title in (("base", "frozen base alone"), ("lora", "with LoRA")):
        path = args.work_dir / f"{name}_scores.txt"
        scores = dict(line.split(": ") for line in read_lines(path, remedy) if ": " in line)
        if "BLEU" not in scores:  # METEOR may be missing, see measure_scores.py
            raise InputError(f"{path}: no scores of measure_scores.py; {remedy}")
        print(f"{title:24}" + "".join(f"{scores.get(metric, 'missing'):>9}" for metric in METRICS))

    references: dict[str, list[str]] = {}
    for record in read_jsonl(args.test_formatted, {"context": str, "completion": str}, remedy):
        references.setdefault(record["context"], []).append(record["completion"])
    base, lora = (read_lines(args.work_dir / f"{name}.txt", remedy) for name in ("base", "lora"))
    every = max(1, len(references) // SAMPLES)
    for index, (context, texts) in list(enumerate(references.items()))[::every][:SAMPLES]:
        print(f"\ninput      {context}")
        print("\n".join(f"reference  {text}" for text in texts))
        print(f"base       {base[index]}\nLoRA       {lora[index]}")
    print(f"\nloss curve of LoRA: {args.work_dir / 'loss.png'}, of the base: "
          f"{args.work_dir / 'base' / 'loss.png'}")


if __name__ == "__main__":
    run(main)
