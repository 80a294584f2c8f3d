"""Writes one table of all results into the READMEs.

Each document in DOCUMENTS has a place for it between two comments, which the rendered page does
not show. A run of align/run.sh that writes to align/results fills all of these places with all
results in that folder, so results from another machine become further rows.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from statistics import mean, stdev

from common import InputError, replacing
from report import FROM_FLOAT64, is_random

BEGIN, END = "<!-- align: written by align/run.sh -->", "<!-- align: end -->"
WORDS = {
    "en": {
        "strict": ["strict run", "steps", "loss: largest difference",
                   "LoRA: largest relative difference", "same token ids",
                   "BLEU, PyTorch / Jittor"],
        "paper": ["run with dropout", "seeds", "loss, last tenth: PyTorch", "Jittor",
                  "BLEU: PyTorch", "Jittor", "METEOR: PyTorch", "Jittor"],
        "bf16": ["strict run in bf16, both sides to PyTorch in float64", "steps",
                 "loss, root mean square: PyTorch", "Jittor", "LoRA, relative: PyTorch", "Jittor",
                 "same token ids: PyTorch", "Jittor", "BLEU, float64 / PyTorch / Jittor"],
        "of": "of", "size": "batch size"},
    "cn": {
        "strict": ["严格对齐", "步数", "loss 最大差", "LoRA 矩阵最大相对差", "相同的 token id",
                   "BLEU，PyTorch / Jittor"],
        "paper": ["带 dropout", "种子数", "最后 10% 步的平均 loss：PyTorch", "Jittor",
                  "BLEU：PyTorch", "Jittor", "METEOR：PyTorch", "Jittor"],
        "bf16": ["bf16 严格对齐，两侧与 PyTorch float64 比较", "步数", "loss 差的均方根：PyTorch",
                 "Jittor", "LoRA 相对差：PyTorch", "Jittor", "相同的 token id：PyTorch", "Jittor",
                 "BLEU，float64 / PyTorch / Jittor"],
        "of": "/", "size": "batch size"},
}
# document -> (path of the results relative to the document, language); the first two have
# only the strict runs in float32, without those on the demo's data and with --float64
DOCUMENTS = {"README.md": ("align/results", "en"), "README.cn.md": ("align/results", "cn"),
             "align/README.md": ("results", "en"), "align/README.cn.md": ("results", "cn")}


def publish(root: Path) -> None:
    """Fills the places of DOCUMENTS with the results in ROOT/align/results."""
    results = [json.loads(path.read_text(encoding="utf-8"))
               for path in sorted((root / "align" / "results").glob("*/results.json"))]
    for name, (folder, language) in DOCUMENTS.items():
        path = root / name
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if text.count(BEGIN) != 1 or text.split(BEGIN)[1].count(END) != 1:
            raise InputError(f"{path}: has no place for the results; put back the two lines "
                             f"{BEGIN} and {END}")
        before, rest = text.split(BEGIN)
        shown = [run for run in results if folder == "results"
                 or not run["name"].startswith("demo-") and _kind(run) == "strict"
                 and "--float64" not in shlex.split(run["command"])]
        filled = f"{before}{BEGIN}\n{tables(shown, folder, language)}{END}{rest.split(END)[1]}"
        if filled != text:
            with replacing(path) as file:
                file.write(filled.encode("utf-8"))


def tables(results: list[dict], folder: str, language: str) -> str:
    """Markdown tables of the runs of each kind, without empty tables."""
    words, text = WORDS[language], ""
    for kind, row in (("strict", _strict), ("bf16", _bf16), ("paper", _paper)):
        rows = [[f"[{run['name']}]({folder}/{run['name']}/table.md)", *row(run, words)]
                for run in results if _kind(run) == kind]
        if rows:
            text += f"\n| {' | '.join(words[kind])} |\n|---{'|---:' * (len(words[kind]) - 1)}|\n"
            text += "".join(f"| {' | '.join(cells)} |\n" for cells in rows)
    return text + "\n" if text else ""


def _kind(run: dict) -> str:
    if run.get("judged"):  # reports written before --precision lack it
        return "bf16"
    return "strict" if "--strict" in shlex.split(run["command"]) else "paper"


def _strict(run: dict, words: dict) -> list[str]:
    seeds = run["seeds"].values()
    same = [f"{count} {words['of']} {one['samples']} ({words['size']} {size})"
            for one in seeds for size, count in one["identical"].items()]
    return [", ".join(str(one["steps"]) for one in seeds),
            f"{max(one['loss']['largest'] for one in seeds):.1e}",
            f"{max(max(one['lora'].values()) for one in seeds):.1e}", ", ".join(same),
            "" if is_random(run) else " / ".join(
                f"{mean(one['scores'][side]['BLEU'] for one in seeds):.4f}"
                for side in ("torch", "jittor"))]


def _bf16(run: dict, words: dict) -> list[str]:
    seeds = run["seeds"].values()
    sides = [[one["float64"][side] for one in seeds] for side in ("torch", "jittor")]
    return [", ".join(str(one["steps"]) for one in seeds),
            *(f"{max(value(far) for far in side):.1e}" for value in FROM_FLOAT64.values()
              for side in sides),
            *(f"{sum(far['identical'] for far in side)} {words['of']} "
              f"{sum(one['samples'] for one in seeds)}" for side in sides),
            "" if is_random(run) else " / ".join(
                f"{mean(one['scores'][side]['BLEU'] for one in seeds):.4f}"
                for side in ("float64", "torch", "jittor"))]


def _paper(run: dict, _: dict) -> list[str]:
    seeds = run["seeds"].values()

    def cells(values) -> list[str]:
        numbers = {side: [values(one, side) for one in seeds] for side in ("torch", "jittor")}
        return [f"{mean(n):.4f} ± {stdev(n):.4f}" for n in numbers.values()]

    return [str(len(seeds)), *cells(lambda one, side: one["last_losses"][side]),
            *cells(lambda one, side: one["scores"][side]["BLEU"]),
            *cells(lambda one, side: one["scores"][side]["METEOR"])]
