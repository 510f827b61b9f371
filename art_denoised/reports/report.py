"""The report on runs of attack and certify."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from art_denoised.reports import export, tables, terminal
from art_denoised.reports.reading import read_models
from art_denoised.reports.results import Model
from art_denoised.runs.journal import write_whole


@dataclass(frozen=True)
class Report:
    """Results of several models; ``str`` is the report as plain text.

    Attributes:
        models: Models, each with its results, in the order in which they were named.
        notices: Remarks on the logs.
    """

    models: tuple[Model, ...]
    notices: tuple[str, ...] = ()

    def __str__(self) -> str:
        return terminal.text(tables.report_blocks(self.models, self.notices))

    def show(self) -> None:
        """Print the report: styled on a terminal, plain elsewhere."""
        terminal.show(tables.report_blocks(self.models, self.notices))

    def comparison(self) -> str:
        """Return the models side by side as plain text: all attacks together, on fresh noise."""
        return terminal.text(tables.comparison_blocks(self.models, self.notices))

    def show_comparison(self) -> None:
        """Print the models side by side: styled on a terminal, plain elsewhere."""
        terminal.show(tables.comparison_blocks(self.models, self.notices))

    def page(self) -> str:
        """Return the report as an HTML page that loads nothing and needs no script."""
        from art_denoised.reports.page import page

        return page(self.models, self.notices)

    def write_page(self, path: Path | str) -> None:
        """Write the HTML page.

        Raises:
            InputError: The file cannot be written.
        """
        write_whole(Path(path), self.page().encode())

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON values. docs/report.md names the keys."""
        return export.to_json(self.models, self.notices)

    def to_tsv(self) -> str:
        """Return all results under attack as a table with tabs, one line for each."""
        return export.to_tsv(self.models)


def report(runs: Sequence[str | Path]) -> Report:
    """Report robust accuracy under attack beside certified accuracy.

    Args:
        runs: Runs, each a folder with ``attack.jsonl``, ``certify.jsonl`` or both, or such a file.
            "NAME=FOLDER" names the model, else it is named like the folder. Runs of one name are
            one model: other attacks on it, or other images.

    Returns:
        The report; print it, or write it as a page.

    Raises:
        InputError: There is no such log, or it is damaged; or runs of one name differ in what makes
            the model, or hold an image twice under one attack.

    Example:
        >>> import tempfile
        >>> from art_denoised.evaluation import ATTACK, AttackRow
        >>> from art_denoised.runs import Run
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with Run(folder, ATTACK, {"model": "net"}) as run:
        ...         run.append(
        ...             [AttackRow(0, 1, "pgd", "exact", "l2", 0.5, True, True, (True,), 0, 0, 0)]
        ...         )
        ...     found = report([f"ours={folder}"])
        >>> found.models[0].headlines[0].fresh.value
        1.0
        >>> print(str(found).splitlines()[0])
        ours: not checked for masking
    """
    models, notices = read_models([str(run) for run in runs])
    return Report(tuple(models), tuple(notices))
