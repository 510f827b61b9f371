"""Every benchmark runs in its smallest size, all in this process: importing torch takes longest."""

from __future__ import annotations

import gc
import logging
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))


@pytest.fixture
def as_program(monkeypatch, tmp_path) -> Iterator[pytest.MonkeyPatch]:
    """Undo what a program does to its process."""
    threads = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # of its child processes
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "networks", raising=False)
    yield monkeypatch
    sys.modules.pop("networks", None)
    logging.disable(logging.NOTSET)
    torch.set_num_threads(threads)
    gc.unfreeze()


@pytest.mark.filterwarnings("ignore")  # of the libraries that we are compared with
@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda path: path.name)
def test_benchmark_runs(as_program, tmp_path, capsys, benchmark):
    as_program.setattr(sys, "argv", [str(benchmark), "--tiny"])
    sys.path.insert(0, str(benchmark.parent))
    runpy.run_path(str(benchmark), run_name="__main__")
    assert capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_make_bench_runs_every_benchmark():
    recipe = (ROOT / "Makefile").read_text("utf-8").partition("\nbench:")[2].partition("\n\n")[0]
    run = {line.split("benchmarks/")[1].split()[0] for line in recipe.splitlines()[1:]}
    assert run == {path.name for path in BENCHMARKS}
