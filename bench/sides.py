"""The programs that are measured side by side, each in the precisions that it has."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass

from shared import InputError, log
from workers import Worker

PRECISIONS = ("float32", "bf16", "int8")


@dataclass(frozen=True)
class Program:
    """A side's script: PROGRAM.load(..., precision=..., **options)."""

    title: str
    script: str  # in bench/
    precisions: tuple[str, ...] = ("float32",)
    options: tuple[tuple[str, object], ...] = ()  # further arguments of ``load``
    converter: str = ""  # the script in bench/ that converts the model to a folder, which it loads
    batches: bool = True  # it searches several contexts at the same time


TRAINING = {
    "ours": Program("ours (Jittor)", "side_jittor.py", ("float32", "bf16")),
    "align": Program("PyTorch (align)", "side_align.py"),
    "peft": Program("transformers + peft", "side_transformers.py", ("float32", "bf16")),
    "torch": Program("minimal PyTorch", "side_minimal.py", ("float32", "bf16")),
    "compiled": Program("minimal PyTorch, compiled", "side_minimal.py", ("float32", "bf16"),
                        (("compiled", True),)),
}
SEARCH = {
    "ours": Program("ours (Jittor)", "side_jittor.py", PRECISIONS),
    "ctranslate2": Program("CTranslate2", "side_ctranslate2.py", PRECISIONS,
                           converter="side_transformers.py"),
    "openvino": Program("OpenVINO", "side_openvino.py", PRECISIONS,
                        converter="convert_openvino.py"),
    "compiled": Program("minimal PyTorch, compiled", "side_minimal.py", ("float32", "bf16"),
                        (("compiled", True),)),
    "generate": Program("transformers `generate`", "side_transformers.py", batches=False),
    "align": Program("PyTorch (align)", "side_align.py", batches=False),
}


def some_of(names: Iterable[str]) -> Callable[[str], list[str]]:
    """An argparse type: a list such as "float32,bf16" of some of ``names``."""
    def parse(text: str) -> list[str]:
        for item in text.split(","):
            if item not in names:
                raise argparse.ArgumentTypeError(f"{item} is not one of {', '.join(names)}")
        return text.split(",")
    return parse


@dataclass(frozen=True)
class Side:
    """A program in one precision."""

    program: Program
    precision: str

    @property
    def title(self) -> str:
        return f"{self.program.title}, {self.precision}"


def choose(programs: dict[str, Program], names: list[str],
           precisions: list[str]) -> dict[str, Side]:
    """The sides by key, such as "ours bf16"; ours in float32 is the first of them, always."""
    chosen = {"ours float32": Side(programs["ours"], "float32")}
    for name, program in programs.items():
        for precision in program.precisions:
            if name in names and precision in precisions:
                chosen[f"{name} {precision}"] = Side(program, precision)
    return chosen


def ours(sides: Iterable[str]) -> list[str]:
    """Those keys of ``sides`` that are this project's."""
    return [key for key in sides if key.split()[0] == "ours"]


class Team:
    """The sides that run: one worker each. Those that fail at the start are left out."""

    def __init__(self, stack: ExitStack, sides: dict[str, Side]):
        self.stack, self.sides = stack, sides
        self.workers: dict[str, Worker] = {}
        self.starts: list[dict] = []  # what their ``start`` returned
        self.left_out: dict[str, str] = {}  # title: reason

    def start(self, device: str, prepare: Callable[[str, Worker], None]) -> None:
        """Starts every side; ``prepare`` loads the model and warms up.

        A side whose packages are missing, or that cannot do the task, costs a line of the log.
        Raises InputError if it is ours in float32.
        """
        for key, side in self.sides.items():
            log(f"{side.title}: loading the model, then warming up")
            with ExitStack() as attempt:
                worker = attempt.enter_context(Worker(side.program.script))
                try:
                    start = worker.ask("start", device=device)
                    prepare(key, worker)
                except InputError as error:
                    if key == "ours float32":
                        raise
                    log(f"{side.title}: left out ({error})")
                    self.left_out[side.title] = str(error)
                    continue
                self.workers[key] = worker
                self.starts.append(start)
                self.stack.enter_context(attempt.pop_all())

    @property
    def pids(self) -> dict[str, int]:
        return {key: worker.process.pid for key, worker in self.workers.items()}
