"""Tables and plots of certified accuracy: pure functions of rows."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from art_denoised.checks import InputError
from art_denoised.evaluation.records import CertifyRow
from art_denoised.smoothing.bounds import Looks
from art_denoised.smoothing.statistics import (
    ABSTAIN,
    TableRow,
    accuracy_rows,
    average_certified_radius,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SUFFIXES = (".png", ".pdf", ".svg")
# Okabe and Ito's colours, which colour-blind readers can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")


def accuracy_table(rows: Sequence[CertifyRow], radii: Sequence[float]) -> list[TableRow]:
    """Return certified accuracy at each radius.

    Args:
        rows: Of one run.
        radii: l2 radii in image units.

    Raises:
        InputError: There are no rows.

    Example:
        >>> rows = [CertifyRow(i, label=1, predict=1, radius=i / 4, seconds=0) for i in range(4)]
        >>> [entry.certified_accuracy for entry in accuracy_table(rows, [0.0, 0.5])]
        [1.0, 0.5]
    """
    return accuracy_rows(*_columns(rows), radii)


def to_json(table: Sequence[TableRow]) -> list[dict[str, float]]:
    """Return a table as a list of {radius, certified_accuracy, low, high}.

    Example:
        >>> to_json([TableRow(0.25, 0.5, 0.4, 0.6)])
        [{'radius': 0.25, 'certified_accuracy': 0.5, 'low': 0.4, 'high': 0.6}]
    """
    return [entry._asdict() for entry in table]


def default_radii(rows: Sequence[CertifyRow]) -> list[float]:
    """Return 0 and up to six round steps that reach the largest radius.

    Example:
        >>> default_radii([CertifyRow(0, label=1, predict=1, radius=0.8, seconds=0)])
        [0.0, 0.25, 0.5, 0.75]
    """
    largest = max((row.radius for row in rows), default=0.0)
    scale = 10.0 ** math.floor(math.log10(largest)) if largest > 0 else 1.0
    steps = [scale * factor for factor in (0.25, 0.5, 1.0, 2.5)]
    step = next(step for step in steps if largest / step <= 6)
    return [round(i * step, 10) for i in range(int(largest / step) + 1)]


def format_table(named: Mapping[str, Sequence[CertifyRow]], radii: Sequence[float]) -> str:
    r"""Return a table for the terminal: one run a row, certified accuracy in percent.

    Args:
        named: Name -> rows of one run.
        radii: l2 radii in image units.

    Raises:
        InputError: A run without rows.

    Example:
        >>> rows = [CertifyRow(i, label=1, predict=1, radius=i / 4, seconds=0) for i in range(4)]
        >>> print("\n".join(format_table({"ours": rows}, [0.0, 0.5]).splitlines()[1:4]))
                images        r=0      r=0.5  abstain     ACR
        ours         4      100.0       50.0     0.0%   0.375
                           40-100       7-93
    """
    width = max(6, *(len(name) for name in named)) + 2
    indent = " " * (width + 6)
    lines = [f"{indent}{'certified accuracy (%) at l2 radius r':^{11 * len(radii)}}".rstrip()]
    heads = "".join(f"{f'r={radius:g}':>11}" for radius in radii)
    lines.append(f"{'':{width}}images{heads}  abstain     ACR")
    for name, rows in named.items():
        table = accuracy_table(rows, radii)
        acr, _ = average_certified_radius(*_columns(rows))
        abstained = sum(row.predict == ABSTAIN for row in rows) / len(rows)
        cells = "".join(f"{100 * entry.certified_accuracy:11.1f}" for entry in table)
        ranges = "".join(
            f"{f'{100 * entry.low:.0f}-{100 * entry.high:.0f}':>11}" for entry in table
        )
        lines.append(f"{name:{width}}{len(rows):6}{cells}{100 * abstained:8.1f}%{acr:8.3f}")
        lines.append(f"{indent}{ranges}")
    lines.append(
        "Below each share its 95% interval over images (Clopper-Pearson). An abstention counts as "
        "wrong.\nACR: mean certified radius, 0 where wrong; image units."
    )
    if any(_stopped_at_radii(row) for rows in named.values() for row in rows):
        lines[-1] += " A lower bound where sampling stopped at radii."
    return "\n".join(lines)


def _stopped_at_radii(row: CertifyRow) -> bool:
    bound = None if row.certificate is None else row.certificate.bound
    return isinstance(bound, Looks) and bound.first < bound.last


def plot_accuracy(
    named: Mapping[str, Sequence[CertifyRow]], path: Path | str, title: str | None = None
) -> None:
    """Draw certified accuracy against radius, each run with its 95% band, into a file.

    Args:
        named: Name -> rows of one run.
        path: A .png, .pdf or .svg file, replaced as a whole.
        title: Above the plot.

    Raises:
        InputError: Another suffix, or a run without rows.

    Example:
        >>> import tempfile
        >>> rows = [CertifyRow(i, label=1, predict=1, radius=i / 4, seconds=0) for i in range(4)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_accuracy({"ours": rows}, folder + "/a.svg")
        ...     "<svg" in Path(folder, "a.svg").read_text()
        True
    """
    path = Path(path)
    if path.suffix.lower() not in _SUFFIXES:
        raise InputError(f"plot file is {path}; give a name ending in {', '.join(_SUFFIXES)}")
    figure = accuracy_figure(named, title)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        figure.savefig(temporary, dpi=150)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def accuracy_figure(named: Mapping[str, Sequence[CertifyRow]], title: str | None = None) -> Figure:
    """Return the figure that `plot_accuracy` saves.

    Example:
        >>> rows = [CertifyRow(i, label=1, predict=1, radius=i / 4, seconds=0) for i in range(4)]
        >>> accuracy_figure({"ours": rows}).axes[0].get_xlabel()
        'certified l2 radius (image units)'
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, rows) in enumerate(named.items()):
        line = ("-", "--", "-.", ":")[i // len(_COLOURS) % 4]
        draw_accuracy(axes, rows, _COLOURS[i % len(_COLOURS)], label=name, linestyle=line)
    axes.set(xlabel="certified l2 radius (image units)", ylabel="certified accuracy (%)")
    axes.set(ylim=(0, 100), title=title)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def draw_accuracy(axes: Any, rows: Sequence[CertifyRow], colour: str, **line: Any) -> None:
    """Draw certified accuracy in percent against radius, with its 95% band, into axes.

    Args:
        axes: Of matplotlib.
        rows: Of one run.
        colour: Of line and band.
        line: Further properties of the line, such as ``label``.

    Raises:
        InputError: There are no rows.
    """
    # Accuracy is constant up to and including each certified radius, then drops.
    knots = np.unique([0.0, *(row.radius for row in rows if row.correct)])
    table = np.array(accuracy_table(rows, [*knots.tolist(), np.inf]))
    edges = np.append(knots, knots[-1])
    band: dict[str, Any] = {"step": "pre", "alpha": 0.15, "lw": 0, "color": colour}
    axes.step(edges, 100 * table[:, 1], where="pre", color=colour, **line)
    axes.fill_between(edges, 100 * table[:, 2], 100 * table[:, 3], **band)


def _columns(rows: Sequence[CertifyRow]) -> tuple[list[bool], list[float]]:
    if not rows:
        raise InputError("the log holds no rows; certify some images first")
    return [row.correct for row in rows], [row.radius for row in rows]
