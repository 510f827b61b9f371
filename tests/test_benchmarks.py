"""Every benchmark runs in its smallest size, and the documentation shows what they recorded."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

import tests.forked  # noqa: F401  its server starts the workers of benchmarks at once

ROOT = Path(__file__).parent.parent
BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))


@pytest.fixture
def run(monkeypatch):
    """Run a script of benchmarks/ as a program, with arguments."""

    def run(benchmark, *arguments):
        monkeypatch.setattr(sys, "argv", [str(benchmark), *map(str, arguments)])
        monkeypatch.delitem(sys.modules, "networks", raising=False)  # a neighbour of them
        monkeypatch.syspath_prepend(benchmark.parent)
        return runpy.run_path(str(benchmark), run_name="__main__")

    return run


@pytest.mark.filterwarnings("ignore")  # of the libraries that we are compared with
@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda path: path.name)
def test_benchmark_runs_and_records(as_program, tmp_path_factory, run, capsys, benchmark):
    file = tmp_path_factory.mktemp("results") / "results.json"
    run(benchmark, "--tiny", *([] if benchmark.name == "record.py" else ["--json", file]))
    assert capsys.readouterr().out
    assert not list(as_program.iterdir())
    if benchmark.name != "record.py":
        found = json.loads(file.read_text())
        assert found["benchmark"] == benchmark.stem
        assert found["arguments"] == ["--tiny"]
        assert found["rows"]


def test_make_bench_runs_every_benchmark():
    recipe = (ROOT / "Makefile").read_text("utf-8").partition("\nbench:")[2].partition("\n\n")[0]
    run = {line.split("benchmarks/")[1].split()[0] for line in recipe.splitlines()[1:]}
    assert run == {path.name for path in BENCHMARKS}


def test_documentation_shows_what_is_recorded(monkeypatch, run):
    made = run(ROOT / "benchmarks" / "record.py", "--tiny")
    pages = [path.read_text("utf-8") for path in made["PAGES"].glob("benchmarks*.md")]
    assert [made["page"](page) for page in pages] == pages
    shown = {name for page in pages for name, _ in made["TABLE"].findall(page)}
    recorded = {path.stem for path in made["RESULTS"].glob("*.json")}
    assert recorded
    assert recorded <= shown
