"""Every benchmark runs in its smallest size."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

import tests.forked  # noqa: F401  its server starts the workers of benchmarks at once

ROOT = Path(__file__).parent.parent
BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))


@pytest.mark.filterwarnings("ignore")  # of the libraries that we are compared with
@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda path: path.name)
def test_benchmark_runs(as_program, monkeypatch, capsys, benchmark):
    monkeypatch.setattr(sys, "argv", [str(benchmark), "--tiny"])
    monkeypatch.delitem(sys.modules, "networks", raising=False)  # a neighbour of the benchmarks
    sys.path.insert(0, str(benchmark.parent))
    runpy.run_path(str(benchmark), run_name="__main__")
    assert capsys.readouterr().out
    assert not list(as_program.iterdir())


def test_make_bench_runs_every_benchmark():
    recipe = (ROOT / "Makefile").read_text("utf-8").partition("\nbench:")[2].partition("\n\n")[0]
    run = {line.split("benchmarks/")[1].split()[0] for line in recipe.splitlines()[1:]}
    assert run == {path.name for path in BENCHMARKS}
