"""Medians and quartiles, and the files that a benchmark writes to bench/results/."""

from __future__ import annotations

import argparse
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

# The vector instructions on which speed depends, as /proc/cpuinfo names them.
INSTRUCTIONS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_bf16",
                "amx_int8")


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median and quartiles."""
    q1, median, q3 = np.percentile(list(values), [25, 50, 75])
    return {"median": float(median), "q1": float(q1), "q3": float(q3)}


def ratio(blocks: list[list[float]], other: list[list[float]]) -> dict[str, float]:
    """Median and quartiles of the ratios of one side's figures to another's, block by block.

    The ratio of two blocks is that of their medians.
    """
    return spread(np.median(a) / np.median(b) for a, b in zip(blocks, other))


def inverse(values: dict[str, float] | None) -> dict[str, float] | None:
    """Of a :func:`ratio` of speeds, the ratio of times, in which the quartiles change places."""
    swapped = {"q1": "q3", "q3": "q1"}
    return values and {swapped.get(name, name): 1 / value for name, value in values.items()}


def setting(starts: Iterable[dict], args: argparse.Namespace) -> dict:
    """The conditions of a result; ``starts`` holds what the sides' ``start`` returned."""
    starts = list(starts)
    versions = {"python": platform.python_version()}
    for start in starts:
        versions.update(start["versions"])
    return {"command": f"bash bench/run.sh {Path(sys.argv[0]).stem.removeprefix('bench_')} "
                       + shlex.join(sys.argv[1:]),
            "machine": machine(args.device) + (", limited to AVX2" if args.isa == "avx2" else ""),
            "device": args.device, "versions": versions,
            "threads": sorted({start["threads"] for start in starts})}


def machine(device: str) -> str:
    """A description of processor, cores and memory, and of the GPU if it was used."""
    cpu, flags = platform.processor() or platform.machine(), []
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
        if line.startswith("flags"):
            flags = [flag for flag in INSTRUCTIONS if flag in line.split()]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2 ** 30
    words = (f"{cpu} ({', '.join(flags) or 'no AVX2'}), {len(os.sched_getaffinity(0))} cores, "
             f"{memory:.0f} GiB")
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
    """A :func:`spread` or :func:`ratio` in a table: the median and, in brackets, the quartiles."""
    if values is None:
        return ""
    return f"{values['median']:.{digits}f} [{values['q1']:.{digits}f}, {values['q3']:.{digits}f}]"


def percent(share: float | None) -> str:
    """A share in a table."""
    return "" if share is None else f"{share:.1%}"


def whole(number: float | None) -> str:
    """A number without decimals in a table."""
    return "" if number is None else f"{number:.0f}"


def ratio_heads(results: dict) -> list[str]:
    """The heads of the columns of ratios, one for each precision of ours."""
    return [f"our time / their time, ours {own.split()[1]} [over rounds]"
            for own in results["ours"]]


def introduction(title: str, results: dict) -> list[str]:
    """The head of a report."""
    return [f"# {title}", "", f"    {results['command']}", "",
            f"Machine: {results['machine']}; {'/'.join(map(str, results['threads']))} threads per "
            f"side, device {results['device']}. Versions: " + ", ".join(
                f"{name} {version}" for name, version in results["versions"].items()) + ".", "",
            "A ratio is our time / their time: below 1, ours is faster.", "", *_quiet(results),
            *(line for title, reason in results.get("left_out", {}).items()
              for line in (f"Left out: {title} ({reason}).", ""))]


def _quiet(results: dict) -> list[str]:
    """What the watch of quiet.py dropped; a result from before it has none."""
    found = results.get("quiet")
    if not found:
        return []
    return [f"Rounds: {found['kept']} count; {found['dropped']} were dropped and measured again, "
            f"in which other programs took more than {found['limit']:.0%} of the processors during "
            "the turn of a side.", ""]


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
