"""What a benchmark writes: its figures with machine and versions, as JSON, and lines on the screen.

    python benchmarks/record.py [FILE.json ...]    # prints results as tables

Results that are committed are in benchmarks/results/. A file says nothing of whose machine it was.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Return what figures depend on, without names of hosts."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    cpu = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    cores, load = len(os.sched_getaffinity(0)), round(os.getloadavg()[0], 1)
    return {
        "cpu": cpu,
        "cores": cores,
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "load": load,  # before the run; a busy machine says little about time
    }


class Record:
    """The figures of one run of a benchmark.

    Args:
        name: Name of the benchmark.
        path: JSON file to write after each figure; None: none.
        libraries: Packages whose versions matter, beside our own.
    """

    def __init__(self, name: str, path: Path | None = None, *libraries: str) -> None:
        self.path, self.rows = path, list[dict[str, Any]]()
        names = ("art-denoised", "torch", "numpy", *libraries)
        versions = {"python": platform.python_version(), **{name: version(name) for name in names}}
        about = {"machine": machine(), "versions": versions}
        given = [word for word in sys.argv[1:] if word not in ("--json", str(path))]
        run = {"benchmark": name, "arguments": given, "date": datetime.now(UTC).date().isoformat()}
        self.content = {**run, **about, "rows": self.rows}
        print(json.dumps(about))

    def add(self, section: str, name: str, **figures: Any) -> None:
        """Print a figure and write the file, so that a run that is cut off leaves what it has."""
        row = {"section": section, "name": name, **figures}
        self.rows.append(row)
        print(f"{section:10} {name:44} " + shown(figures), flush=True)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.content, indent=1) + "\n")


def shown(figures: Mapping[str, Any]) -> str:
    """Return figures on one line."""
    parts = ((k, f"{v:.4g}" if isinstance(v, float) else str(v)) for k, v in figures.items())
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in parts)


def turns(
    tasks: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] | None = None
) -> dict[str, list[float]]:
    """Return the seconds of each task in each round; in a round every task runs once."""

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return (clock or time.perf_counter)()

    for task in tasks.values():
        task()  # warm up
    taken: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, task in tasks.items():
            start = now()
            task()
            taken[name].append(now() - start)
    return taken


def ratio(taken: list[float], unit: list[float]) -> dict[str, float]:
    """Return the median of the ratios of each round, with the lowest and the highest."""
    found = sorted(a / b for a, b in zip(taken, unit, strict=True))
    return {"ratio": statistics.median(found), "low": found[0], "high": found[-1]}


def table(content: Mapping[str, Any]) -> str:
    """Return a result as text."""
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    about = ", ".join(f"{k} {v}" for k, v in content["machine"].items() if v)
    lines = [f"{content['benchmark']}: {about}; {versions}"]
    for row in content["rows"]:
        figures = {k: v for k, v in row.items() if k not in ("section", "name")}
        lines.append(f"{row['section']:10} {row['name']:44} {shown(figures)}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="by default all that are committed")
    parser.add_argument("--tiny", action="store_true", help="print what this machine is, alone")
    arguments = parser.parse_args()
    if arguments.tiny:
        print(json.dumps(machine()))
        return
    for path in arguments.files or sorted(RESULTS.glob("*.json")):
        print(table(json.loads(path.read_text())), end="\n\n")


if __name__ == "__main__":
    main()
