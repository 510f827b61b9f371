"""What a benchmark writes: its figures with machine and versions, as JSON, and lines on the screen.

    python benchmarks/record.py [FILE.json ...]    # prints results
    python benchmarks/record.py --page             # writes the tables of the documentation

Results that are committed are in benchmarks/results/. A file says nothing of whose machine it was.
In docs/project/benchmarks*.md, `<!-- table FILE SECTION -->` and `<!-- end -->` enclose what
``--page`` writes: the rows of one section of benchmarks/results/FILE.json, if it exists.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

RESULTS = Path(__file__).parent / "results"
PAGES = Path(__file__).parent.parent / "docs" / "project"
TABLE = re.compile(r"<!-- table (\S+) (.+?) -->\n.*?<!-- end -->", re.DOTALL)


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


def options(doc: str) -> argparse.ArgumentParser:
    """Return a parser with the two options that every benchmark takes."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--tiny", action="store_true", help="smallest size, to try the script")
    return parser


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


def ratio(taken: Sequence[float], unit: Sequence[float]) -> dict[str, float]:
    """Return the median of the ratios of each round, with the lowest and the highest."""
    found = sorted(a / b for a, b in zip(taken, unit, strict=True))
    return {"ratio": statistics.median(found), "low": found[0], "high": found[-1]}


def rise(task: Callable[[], object]) -> float | None:
    """Return by how many MiB the resident set rises in a task; None where Linux does not tell."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free must not hide the rise
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except OSError:
        task()
        return None
    before = _resident("VmRSS")
    task()
    return _resident("VmHWM") - before


def held(task: Callable[[], object]) -> float:
    """Return how many MiB the tensors of a task take at most, on the CPU.

    The resident set holds freed memory besides, as the allocator of C likes.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        task()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate(size for _, size in changes)) / 2**20


def _resident(name: str) -> float:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024 if found else float("nan")


def number(value: Any) -> str:
    """Return a figure as text."""
    if isinstance(value, float) and abs(value) < 100:
        return f"{value:.3g}"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, list):
        return ", ".join(map(number, value))
    return "" if value is None else f"{value:,.0f}"


def title(name: str) -> str:
    """Return the name of a figure as text: best_s is best (s)."""
    return re.sub(r"_(s|ms|MiB|GiB|percent)$", r" (\1)", name).replace("_", " ")


def shown(figures: Mapping[str, Any]) -> str:
    """Return figures on one line."""
    return ", ".join(f"{title(name)} {number(value)}" for name, value in figures.items())


def about(content: Mapping[str, Any]) -> str:
    """Return on one line how and where a run was made."""
    machine = {name: value for name, value in content["machine"].items() if value is not None}
    on = ", ".join(
        machine[name] if name in ("cpu", "gpu") else f"{name} {machine[name]}" for name in machine
    )
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    command = " ".join(["python", f"benchmarks/{content['benchmark']}.py", *content["arguments"]])
    return f"`{command}`, {content['date']}. {on}; {versions}."


def table(content: Mapping[str, Any], section: str) -> str:
    """Return a section of a result as a table in Markdown."""
    rows = [row for row in content["rows"] if row["section"] == section]
    if not rows:
        raise SystemExit(f"{content['benchmark']} has no section {section!r}")
    columns = list(dict.fromkeys(name for row in rows for name in row if name != "section"))
    cells = [["", *map(title, columns[1:])], ["---", *("---:" for _ in columns[1:])]]
    cells += [[number(row.get(name)) for name in columns] for row in rows]
    return "\n".join(f"|{'|'.join(line)}|" for line in cells)


def page(text: str) -> str:
    """Return a page with its tables as benchmarks/results/ has them now."""

    def made(found: re.Match[str]) -> str:
        file = RESULTS / f"{found[1]}.json"
        content = json.loads(file.read_text()) if file.exists() else None
        body = f"{table(content, found[2])}\n\n{about(content)}" if content else "Not recorded yet."
        return f"<!-- table {found[1]} {found[2]} -->\n\n{body}\n\n<!-- end -->"

    return TABLE.sub(made, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="by default all that are committed")
    parser.add_argument("--page", action="store_true", help="write the tables of docs/project")
    parser.add_argument("--tiny", action="store_true", help="print what this machine is, alone")
    arguments = parser.parse_args()
    if arguments.tiny:
        print(json.dumps(machine()))
        return
    if arguments.page:
        for path in PAGES.glob("benchmarks*.md"):
            path.write_text(page(path.read_text("utf-8")), "utf-8")
        return
    for path in arguments.files or sorted(RESULTS.glob("*.json")):
        content = json.loads(path.read_text())
        print(about(content))
        for row in content["rows"]:
            figures = {k: v for k, v in row.items() if k not in ("section", "name")}
            print(f"{row['section']:10} {row['name']:44} {shown(figures)}")


if __name__ == "__main__":
    main()
