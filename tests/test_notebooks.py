"""Every notebook runs from top to bottom, its assertions hold, and it is committed with outputs."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "examples").glob("*.ipynb"))


def run(notebook: nbformat.NotebookNode) -> None:
    """Run all cells of code, one after another, in one namespace."""
    names: dict[str, object] = {"__name__": "__main__"}
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            exec(compile(cell.source, f"cell {number}", "exec"), names)


def test_there_are_notebooks():
    assert len(NOTEBOOKS) == 6


@pytest.mark.filterwarnings("default")  # those of libraries
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(as_program, capsys, path):
    plt.switch_backend("agg")
    run(nbformat.read(path, as_version=4))
    printed = capsys.readouterr()
    assert printed.out.strip()
    assert not printed.err
    assert plt.get_fignums()
    plt.close("all")
    assert not list(as_program.iterdir())  # a reader's folder stays clean


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_executed_and_small(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not any(cell.metadata for cell in notebook.cells)  # neither timings nor folded cells
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert any("image/png" in one.get("data", ()) for cell in code for one in cell.outputs)
    assert path.stat().st_size < 150_000
    text = path.read_text(encoding="utf-8")
    assert not [words for words in ("/home/", "/tmp/", "site-packages", "Warning") if words in text]
