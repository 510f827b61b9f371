"""Measure the house: its size, how far a call walks through it, and how deep users import.

    python tools/measure.py [--json]

"Code that runs" counts functions that are called, in files of the package, when the job is done a
second time: imports and caches are warm, so what is counted is the way of one image.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "art_denoised"
MODEL = "art_denoised.demo:digits_classifier"


def main() -> None:
    """Print the measurements."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    figures = {**size(), **walks(), **imports()}
    if parser.parse_args().json:
        print(json.dumps(figures, indent=2))
        return
    for name, figure in figures.items():
        print(f"{name:<44} {figure}")


def size() -> dict[str, Any]:
    """Return lines and files of the package."""
    files = list(PACKAGE.rglob("*.py"))
    lines = sum(len(path.read_text().splitlines()) for path in files)
    return {"lines of the package": lines, "files of the package": len(files)}


def walks() -> dict[str, Any]:
    """Return the files and functions that each job runs."""
    figures = {}
    for name, job in JOBS.items():
        job()
        files, functions = called(job)
        figures[f"{name}: files"], figures[f"{name}: functions"] = files, functions
    return figures


def certify_by_command() -> None:
    """Certify one image by the command line."""
    options = ["--model", MODEL, "--data", "digits", "--sigma", "0.25", "--n", "100", "--max", "1"]
    command("certify", *options, "--batch-size", "64")


def certify_in_memory() -> None:
    """Certify one image by `Smoother.certify`."""
    import torch

    import art_denoised as ad
    from art_denoised.demo import digits_classifier

    smoother = ad.Smoother(digits_classifier(), sigma=0.25)
    smoother.certify(torch.full((1, 1, 8, 8), 0.5), ad.FixedN(100))


def attack_by_command() -> None:
    """Attack one model, masking checks included, by the command line."""
    options = ["--model", MODEL, "--data", "digits", "--eps", "0.1", "--attacks", "pgd:steps=5"]
    command("attack", *options, "--max", "4")


def predict_by_rdc() -> None:
    """Classify one image with a diffusion model."""
    import torch

    import art_denoised as ad
    from art_denoised.demo import digits_diffusion

    rdc = ad.DiffusionClassifier(digits_diffusion(), levels=ad.noise_levels(4), seed=0)
    with torch.no_grad():
        rdc(torch.full((1, 1, 8, 8), 0.5))


JOBS: dict[str, Callable[[], None]] = {
    "certify by the command line": certify_by_command,
    "Smoother.certify": certify_in_memory,
    "attack by the command line": attack_by_command,
    "RDC prediction": predict_by_rdc,
}


def command(*arguments: str) -> None:
    """Run a command silently, into a folder that goes away."""
    from art_denoised.cli import main as art_denoised

    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()) as out:
        with redirect_stderr(StringIO()) as err:
            code = art_denoised([*arguments, "--out", folder])
        if code:
            raise SystemExit(out.getvalue() + err.getvalue())


def called(job: Callable[[], None]) -> tuple[int, int]:
    """Return how many files and functions of the package a job runs."""
    seen: set[tuple[str, str, int]] = set()

    def note(frame: Any, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(PACKAGE)):
            seen.add((code.co_filename, code.co_name, code.co_firstlineno))

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        job()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    functions = {one for one in seen if one[1] != "<module>"}
    return len({name for name, _, _ in functions}), len(functions)


def imports() -> dict[str, Any]:
    """Return cycles of imports in the package, and the deepest import that users are shown."""
    graph = {module_of(path): set(imported(path)) for path in PACKAGE.rglob("*.py")}
    shown = {
        name
        for place in ("README.md", "docs", "examples", "benchmarks", "results")
        for path in files_of(ROOT / place)
        for name in re.findall(r"\b(?:from|import) (art_denoised[\w.]*)", path.read_text())
    }
    deepest = max(shown, key=lambda name: name.count("."), default="none")
    return {"import cycles": cycles(graph), "deepest import shown to users": deepest}


def files_of(place: Path) -> Iterator[Path]:
    """Yield the pages, notebooks and scripts of a place."""
    if place.is_file():
        yield place
    for suffix in ("md", "py", "ipynb"):
        yield from place.rglob(f"*.{suffix}")


def module_of(path: Path) -> str:
    """Return the name of a file's module."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> Iterator[str]:
    """Yield the modules of the package that a file imports when it is imported."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("art_denoised"):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                is_module = (ROOT / full.replace(".", "/")).with_suffix(".py").is_file()
                yield full if is_module else node.module or ""
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("art_denoised"))


def cycles(graph: dict[str, set[str]]) -> int:
    """Return the number of modules that can reach themselves."""

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        todo = list(graph.get(start, ()))
        while todo:
            module = todo.pop()
            if module not in seen:
                seen.add(module)
                todo += graph.get(module, ())
        return seen

    return sum(module in reach(module) for module in graph)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
