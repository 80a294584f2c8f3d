"""Medians and quartiles, and the files that a benchmark writes to bench/results/."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from shared import RESULTS, log, replacing


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median and quartiles."""
    q1, median, q3 = np.percentile(list(values), [25, 50, 75])
    return {"median": float(median), "q1": float(q1), "q3": float(q3)}


def ratio(blocks: list[list[float]], other: list[list[float]]) -> dict[str, float]:
    """The ratio of one side's figures, given block by block, to those of another side.

    ``of_medians`` is the ratio of the medians of all figures. The median and the quartiles are
    those of the ratios of single blocks, each a ratio of two medians.
    """
    return {"of_medians": float(np.median(np.concatenate(blocks))
                                / np.median(np.concatenate(other))),
            **spread(np.median(a) / np.median(b) for a, b in zip(blocks, other))}


def inverse(values: dict[str, float] | None) -> dict[str, float] | None:
    """Of a :func:`ratio` of speeds, the ratio of times, in which the quartiles change places."""
    swapped = {"q1": "q3", "q3": "q1"}
    return values and {swapped.get(name, name): 1 / value for name, value in values.items()}


def setting(starts: Iterable[dict], device: str) -> dict:
    """The conditions of a result; ``starts`` holds what the sides' ``start`` returned."""
    starts = list(starts)
    versions = {"python": platform.python_version()}
    for start in starts:
        versions.update(start["versions"])
    return {"command": f"bash bench/run.sh {Path(sys.argv[0]).stem.removeprefix('bench_')} "
                       + shlex.join(sys.argv[1:]),
            "machine": machine(device), "device": device, "versions": versions,
            "threads": sorted({start["threads"] for start in starts}), "dtype": "float32"}


def machine(device: str) -> str:
    """A description of processor, cores and memory, and of the GPU if it was used."""
    cpu = platform.processor() or platform.machine()
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2 ** 30
    words = f"{cpu}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB"
    if device == "cuda" and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        words += ", " + subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return words


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def table(head: list[str], rows: Iterable[Iterable[object]]) -> list[str]:
    """A Markdown table (the first column is text, the others are numbers) and an empty line."""
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    return [*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows), ""]


def cell(values: dict | None, digits: int) -> str:
    """A :func:`spread` or :func:`ratio` in a table: the figure and, in brackets, the quartiles."""
    if values is None:
        return ""
    figure = values.get("of_medians", values["median"])
    return f"{figure:.{digits}f} [{values['q1']:.{digits}f}, {values['q3']:.{digits}f}]"


def introduction(title: str, results: dict) -> list[str]:
    """The head of a report."""
    return [f"# {title}", "", f"    {results['command']}", "",
            f"Machine: {results['machine']}; {'/'.join(map(str, results['threads']))} threads per "
            f"side, {results['dtype']}, device {results['device']}. Versions: " + ", ".join(
                f"{name} {version}" for name, version in results["versions"].items()) + ".", "",
            "A ratio is our time / their time: below 1, ours is faster.", ""]


def write(name: str, results: dict, lines: list[str], picture: bytes | None = None) -> None:
    """Writes bench/results/NAME.{json,md,png} and shows the report."""
    text = "\n".join(lines)
    files = {"json": json.dumps(results, indent=1).encode() + b"\n", "md": text.encode()}
    if picture:
        files["png"] = picture
    for ending, content in files.items():
        with replacing(RESULTS / f"{name}.{ending}") as file:
            file.write(content)
    for line in lines:
        log(line)
    log(f"saved {RESULTS / name}.{{{','.join(files)}}}")
