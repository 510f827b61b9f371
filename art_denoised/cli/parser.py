"""What all commands have in common: a parser whose errors are one line, and types of options."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Ends with one line and exit code 2 where the command line cannot be used."""

    def error(self, message: str) -> NoReturn:
        """Print one line and exit."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def add_command(commands: Any, name: str, run: Any, brief: str, **texts: str) -> Parser:
    """Add a command that calls ``run`` with the parsed arguments."""
    command: Parser = commands.add_parser(
        name, help=brief, formatter_class=argparse.RawDescriptionHelpFormatter, **texts
    )
    command.set_defaults(run=run)
    return command


def add_log_options(add: Callable[..., object]) -> None:
    """Add what runs over a data set have in common: device, choice of images, log."""
    add(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one (default: %(default)s)",
    )
    add(
        "--skip",
        type=int,
        default=1,
        metavar="K",
        help="take every K-th image of the data set (default: %(default)s)",
    )
    add("--max", type=int, metavar="M", help="take at most M images")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the log")
    add("--resume", action="store_true", help="continue the run in DIR")
    add("--quiet", action="store_true", help="no progress bar")


def radii(text: str) -> list[float]:
    """Parse "0,0.25,0.5".

    Example:
        >>> radii("0,0.25")
        [0.0, 0.25]
    """
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(0 <= number < float("inf") for number in numbers):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of radii; give numbers >= 0 joined by commas, as in 0.25,0.5"
        )
    return numbers


def duration(text: str) -> float:
    """Parse "90", "90s", "10m" or "1.5h" into seconds.

    Example:
        >>> duration("10m")
        600.0
    """
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)([smh]?)", text.strip())
    seconds = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]] if match else 0.0
    if not seconds:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no duration; give seconds, or a number with s, m or h, as in 10m"
        )
    return seconds


def batch_size(text: str) -> int | None:
    """Parse a whole number, or "auto" into None.

    Example:
        >>> batch_size("auto"), batch_size("64")
        (None, 64)
    """
    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no batch size; give a number or auto"
        ) from None


def fraction(text: str) -> float:
    """Parse a number or a fraction.

    Example:
        >>> fraction("0.5"), fraction("51/255")
        (0.5, 0.2)
    """
    above, slash, below = text.partition("/")
    try:
        number = float(above) / float(below) if slash else float(above)
    except (ValueError, ZeroDivisionError):
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number; give one, or a fraction such as 8/255"
        )
    return number
