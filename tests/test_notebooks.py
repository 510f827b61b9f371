"""Every notebook runs from top to bottom, its assertions hold, and it is committed with outputs."""

from __future__ import annotations

import gc
import os
import sys
import warnings
from pathlib import Path

import nbformat
import pytest
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
# One thread, as conftest.py has it. tqdm.auto, which diffusers imports, asks for ipywidgets.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "PYTHONWARNINGS": "ignore:IProgress not found",
}


class ThisInterpreter(AsyncKernelManager):
    """Starts a kernel of the interpreter that runs the tests, whatever kernels are registered."""

    @property
    def kernel_spec(self) -> KernelSpec:
        words = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=words, display_name="Python 3", language="python")


def executed(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Run all cells in ``folder``; a cell that raises ends in an AssertionError."""
    failure = ""
    with warnings.catch_warnings():
        # nbclient leaves sockets of zmq to the garbage collector, which warns: here, not later.
        warnings.simplefilter("ignore", ResourceWarning)
        try:
            NotebookClient(
                notebook,
                km=ThisInterpreter(),
                timeout=300,
                record_timing=False,
                resources={"metadata": {"path": str(folder)}},
            ).execute(env={**os.environ, **ENVIRONMENT})
        except CellExecutionError as error:
            failure = str(error)
        gc.collect()
    assert not failure, failure


def test_there_are_notebooks():
    assert len(NOTEBOOKS) == 4


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(tmp_path, path):
    notebook = nbformat.read(path, as_version=4)
    executed(notebook, tmp_path)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not [one for one in outputs if one.get("name") == "stderr"]
    assert all(one["text"].strip() for one in outputs if one.output_type == "stream")
    assert any("image/png" in one.get("data", ()) for one in outputs)
    assert not list(tmp_path.iterdir())  # a reader's folder stays clean


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_executed_and_small(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not any(cell.metadata for cell in notebook.cells)  # neither timings nor folded cells
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert path.stat().st_size < 150_000
    text = path.read_text(encoding="utf-8")
    assert not [words for words in ("/home/", "/tmp/", "site-packages", "Warning") if words in text]


def test_a_failing_cell_fails(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("assert 1 > 2")])
    with pytest.raises(AssertionError, match="assert 1 > 2"):
        executed(notebook, tmp_path)
