"""Types of flags for argparse, flags that several scripts have, and files of flags."""

from __future__ import annotations

import argparse
import configparser
import math
import os
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any, Callable, Collection, NoReturn, TypeVar

from runtime.digests import sha256
from runtime.errors import InputError, one_line
from runtime.formats import read_lines

Number = TypeVar("Number", int, float, Decimal)


def _checked(kind: Callable[[str], Number], accepts: Callable[[Number], bool],
             wanted: str) -> Callable[[str], Number]:
    def parse(text: str) -> Number:
        try:
            value = kind(text)
            accepted = accepts(value)
        except ArithmeticError:  # Decimal raises it where others raise ValueError
            raise ValueError from None
        if not accepted:
            raise argparse.ArgumentTypeError(f"{text} is not {wanted}")
        return value

    parse.__name__ = kind.__name__  # argparse prints it: "invalid int value: ..."
    return parse


def at_least(least: float, kind: Callable = int) -> Callable[[str], Any]:
    """An argparse type: a finite number of ``kind`` from ``least`` on."""
    return _checked(kind, lambda value: least <= value < math.inf,
                    f"a finite number from {least} on")


def between(least: float, most: float) -> Callable[[str], float]:
    """An argparse type: a number from ``least`` to ``most``, both included."""
    return _checked(float, lambda value: least <= value <= most, f"in [{least}, {most}]")


def number(text: str) -> int | float:
    """A number; an int if it is whole, however it is written."""
    value = float(text)
    return int(value) if value.is_integer() else value


seed = _checked(int, lambda value: 0 <= value < 2**31, "in [0, 2**31)")
share = _checked(float, lambda value: 0 <= value < 1, "in [0, 1)")
# Decimal, so that 0.01 is a hundredth exactly
fraction = _checked(Decimal, lambda value: 0 < value <= 1, "above 0 and up to 1")


def add_conversion_flags(parser: argparse.ArgumentParser, raw: str, seed: int) -> None:
    """Adds what the converters take: IN (e.g. ``raw``), OUT, ``--fraction`` and ``--seed``."""
    formatted = Path(raw).with_name("train_formatted.jsonl")
    parser.add_argument("input", metavar="IN", help=f"raw file, e.g. {raw}")
    parser.add_argument("output", metavar="OUT", help=f"JSON lines, e.g. {formatted}")
    parser.add_argument("--fraction", type=fraction, default="0.01",
                        help="share of the examples to draw; 1 takes all of them in their order")
    parser.add_argument("--seed", type=int, default=seed, help="seed of the draw")


def add_device_flag(parser: argparse.ArgumentParser) -> None:
    """Adds ``--device auto|cpu|cuda``; runtime.backend.start takes its value."""
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto",
                        help="where to compute; auto: CUDA if a GPU and its toolkit are usable, "
                             "else the CPU")


def add_resume_flag(parser: argparse.ArgumentParser, what: str) -> None:
    """Adds ``--resume [no|yes|auto]``; ``what`` it continues is for the help."""
    parser.add_argument("--resume", nargs="?", choices=["no", "yes", "auto"], const="yes",
                        default="no", help=f"continue {what}, and do nothing if it has ended; "
                                           "auto: begin anew if it had other settings")


# Flags that older versions lacked, by the values with which a run is as theirs were: these are left
# out of its settings, so that it can continue one of theirs.
LATER_FLAGS = {"precision": "float32"}


def settings_of(args: argparse.Namespace, free: Collection[str], files: Collection[str],
                digest: Callable[[Path], str] = sha256) -> dict[str, object]:
    """What a run must share with the one that it continues, by flag; for a file its digest.

    ``free`` are the flags that may differ, ``files`` those that name a file or a folder, of which
    ``digest`` gives the digest.
    """
    return {name: digest(Path(value)) if name in files and value
            and (Path(value).is_file() or Path(value).is_dir())
            else value for name, value in vars(args).items()
            if name not in free and (name, value) not in LATER_FLAGS.items()}


def read_flags(path: str | os.PathLike, section: str) -> dict[str, str | None]:
    """The flags that a file holds for a script, by name: those of [DEFAULT] and of ``section``.

    The file is in INI format, ``lr = 0.0002``; a flag without a value stands alone on its line.
    Raises InputError where the file is missing, malformed, or has no such section.
    """
    ini = configparser.ConfigParser(allow_no_value=True, interpolation=None)
    try:
        ini.read_string("\n".join(read_lines(path)), source=str(path))
    except configparser.Error as error:  # some name a line, others list (line, text)
        line = getattr(error, "lineno", None) or getattr(error, "errors")[0][0]  # noqa: B009
        raise InputError(f"{path}:{line}: not a [section], nor 'flag = value' of a new flag in "
                         "one; see data/experiment.ini") from None
    if section not in ini:
        raise InputError(f"{path}: no section [{section}]; see data/experiment.ini")
    return dict(ini[section])


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something."""

    def _get_help_string(self, action):
        if action.default in (None, "") or action.default is False:  # 0 is a value
            return action.help
        return super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """A parser whose ``--help`` shows the first line of a script's docstring and the defaults.

    A mistake in the flags ends with one line and exit code 2. ``prog`` is the command in the help,
    where that is not the script. If the parser has a ``section``, it replaces the word ``@FILE`` by
    the flags in that section of FILE; flags after ``@FILE`` override those in it. If the section is
    ``borrowed`` from another script, flags in it that the parser lacks go to ``left_out`` instead.
    """

    def __init__(self, doc: str | None, section: str | None = None,  # no doc under python -OO
                 prog: str | None = None, borrowed: bool = False):
        super().__init__(prog=prog, description=(doc or "").partition("\n")[0],
                         formatter_class=_HelpFormatter,
                         epilog=section and f"@FILE stands for the flags in section [{section}] of "
                                            "a file, e.g. @data/experiment.ini")
        self.section, self.borrowed = section, borrowed
        self.left_out: list[str] = []

    def parse_args(self, args=None, namespace=None):
        words: list[str] = []
        for word in sys.argv[1:] if args is None else args:
            if not self.section or not word.startswith("@"):
                words.append(word)
                continue
            for name, value in read_flags(word[1:], self.section).items():
                if self.borrowed and f"--{name}" not in self._option_string_actions:
                    self.left_out.append(f"--{name}")
                    continue
                words += [f"--{name}"] if value is None else [f"--{name}", value]
        return super().parse_args(words, namespace)

    def error(self, message) -> NoReturn:
        # The message may hold words of a file. argparse would print the usage before it.
        self.exit(2, f"error: {one_line(message)}; --help lists the flags\n")


def wrong(message: str) -> NoReturn:
    """Ends a script as a mistake in its flags does, with one line and exit code 2."""
    ArgumentParser(None).error(message)
