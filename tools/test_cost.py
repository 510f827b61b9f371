"""CPU seconds of the tests by file and by function, for whoever makes the suite faster.

    python -m pytest -p tools.test_cost --numprocesses 2 --dist worksteal

A test is charged for its fixtures, for the processes that it waited for, and for those that still
run on Linux. Not counted: imports while tests are collected.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Generator
from pathlib import Path

import pytest

SHOWN = 40
_TICKS = os.sysconf("SC_CLK_TCK")
_seen = [0.0]
_costs: dict[str, float] = defaultdict(float)


def cpu_seconds() -> float:
    """Return those of this process and its children."""
    times = os.times()
    total = times.user + times.system + times.children_user + times.children_system
    for task in Path("/proc/self/task").glob("*/children"):
        for pid in _read(task).split():
            fields = _read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
            total += sum(map(int, fields[11:15])) / _TICKS  # user, system, and of its children
    return total


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # the thread or the process ended a moment ago
        return ""


def pytest_runtest_logstart() -> None:
    _seen[0] = cpu_seconds()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Send the cost with the report, from worker to controller."""
    report = yield
    now = cpu_seconds()
    report.user_properties = [*report.user_properties, ("cpu", now - _seen[0])]
    _seen[0] = now
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    costs = [cost for name, cost in report.user_properties if name == "cpu"]
    _costs[report.nodeid] += costs[-1] if costs else 0.0


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    files, functions = Counter(), Counter()
    for test, cost in _costs.items():
        files[test.partition("::")[0]] += cost
        functions[test.partition("[")[0]] += cost
    terminalreporter.section(f"CPU seconds: {files.total():.0f}")
    for table in (files, functions):
        for name, cost in table.most_common(SHOWN):
            terminalreporter.line(f"{cost:7.1f}  {name}")
        terminalreporter.line("")
