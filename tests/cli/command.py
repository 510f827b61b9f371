"""How the tests call the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from art_denoised.cli import main

ROOT = Path(__file__).parent.parent.parent
MODEL = "art_denoised.demo:digits_classifier"
DENOISER = "art_denoised.demo:digits_denoiser"


def words(command: str, *flags: str, **options: object) -> list[str]:
    """The words of a command; options of None are left out."""
    given = {name.replace("_", "-"): v for name, v in options.items() if v is not None}
    pairs = [(f"--{name}", str(value)) for name, value in given.items()]
    return [command, *(word for pair in pairs for word in pair), *flags]


def certify(out: Path, *flags: str, **changes: object) -> list[str]:
    """Certify four digits in batches of 64; to find the fastest size would take longer."""
    options = {"model": MODEL, "data": "digits", "sigma": 0.25, "n": 100, "max": 4, "out": out}
    options["batch_size"] = 64
    return words("certify", "--quiet", *flags, **(options | changes))


def refusal(capsys, arguments: Iterable[str]) -> str:
    """The one line with which a command is refused."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    heard = capsys.readouterr()
    *notices, message, end = heard.err.split("\n")
    assert all(line.startswith("notice: ") for line in notices), heard.err
    assert message.startswith("art-denoised: error: ")
    assert end == ""
    return message


def process(*arguments: str, **options: object) -> subprocess.Popen[str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    environment |= options.pop("env", {})  # type: ignore[arg-type]
    return subprocess.Popen(
        [sys.executable, "-m", "art_denoised", *arguments],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env=environment,
        **options,  # type: ignore[call-overload]
    )
