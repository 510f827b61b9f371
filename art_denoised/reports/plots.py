"""Plots: certified accuracy against radius, robust accuracy against eps."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from art_denoised.checks import InputError
from art_denoised.evaluation.rows import CertifyRow, Log
from art_denoised.reports.certified import accuracy_table, asked_radii
from art_denoised.reports.results import Model
from art_denoised.reports.terminal import escaped
from art_denoised.runs.journal import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SUFFIXES = (".png", ".pdf", ".svg")
# Okabe and Ito's colours, which colour-blind readers can tell apart. The page goes without the last
# two, which vanish on a light or a dark page.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_ON_PAGE = _COLOURS[:5]
_MARKERS = ("o", "s", "^", "D", "v")
_INK = "#7a7a7a"  # of axes: seen on light and dark pages


def plot_certified(logs: Mapping[str, Log], path: Path | str, title: str | None = None) -> None:
    """Plot certified accuracy against radius into a file, each run with its 95% band.

    Args:
        logs: Name -> log of certify.
        path: A .png, .pdf or .svg file; replaced as a whole.
        title: Title above the plot.

    Raises:
        InputError: Another suffix, a log without rows, or a file that cannot be written.

    Example:
        >>> import tempfile
        >>> rows = [
        ...     CertifyRow(index=i, label=1, prediction=1, radius=i / 4, seconds=0)
        ...     for i in range(4)
        ... ]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_certified({"ours": Log("certify", None, tuple(rows))}, folder + "/a.svg")
        ...     "<svg" in Path(folder, "a.svg").read_text()
        True
    """
    path = Path(path)
    if path.suffix.lower() not in _SUFFIXES:
        raise InputError(f"plot file is {path}; give a name ending in {', '.join(_SUFFIXES)}")
    buffer = io.BytesIO()
    certified_figure(logs, title).savefig(buffer, format=path.suffix[1:].lower(), dpi=150)
    write_whole(path, buffer.getvalue())


def certified_figure(logs: Mapping[str, Log], title: str | None = None) -> Figure:
    """Return the figure that `plot_certified` saves."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, log) in enumerate(logs.items()):
        line = ("-", "--", "-.", ":")[i // len(_COLOURS) % 4]
        asked = ", ".join(f"{radius:g}" for radius in asked_radii(log.settings))
        label = _literal(name) + (f" (lower bound except at r = {asked})" if asked else "")
        draw_certified(axes, log.rows, _COLOURS[i % len(_COLOURS)], label=label, linestyle=line)
    axes.set(xlabel="certified l2 radius (image units)", ylabel="certified accuracy (%)")
    axes.set(ylim=(0, 100), title=_literal(title or ""))
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def draw_certified(axes: Any, rows: Sequence[CertifyRow], colour: str, **line: Any) -> None:
    """Draw certified accuracy in percent against radius, with its 95% band.

    Args:
        axes: Axes of matplotlib.
        rows: Rows of one run.
        colour: Colour of line and band.
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


def look(i: int) -> tuple[str, str]:
    """Return colour and marker of the i-th model of a page."""
    n = len(_ON_PAGE)
    return _ON_PAGE[i % n], _MARKERS[(i + i // n) % n]


def robust_figure(models: Sequence[Model], norm: str) -> Figure:
    """Return the figure of all models in one norm, without their names.

    Points with bars are robust accuracy under all attacks on fresh noise, from clean accuracy at
    eps 0 on. Steps with bands are certified accuracy, in l2. `look` says how the i-th is drawn.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for i, model in enumerate(models):
        if norm == "l2" and model.certified:
            draw_certified(axes, model.certified, look(i)[0], linestyle="--", linewidth=1.5)
        _draw_robust(axes, model, norm, *look(i))
    certified = norm == "l2" and any(model.certified for model in models)
    where = "l2 eps and certified radius" if certified else f"{norm} eps"
    axes.set(xlabel=f"{where} (image units)", ylabel="accuracy (%)", ylim=(-3, 103))
    axes.set_xlim(left=-0.03 * axes.get_xlim()[1])  # so that points on the edge are whole
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.grid(alpha=0.25, color=_INK)
    axes.tick_params(color=_INK)
    for side, spine in axes.spines.items():
        spine.set(color=_INK, visible=side in ("left", "bottom"))
    return figure


def _draw_robust(axes: Any, model: Model, norm: str, colour: str, marker: str) -> None:
    points = [(result.eps, result.fresh) for result in model.headlines if result.norm == norm]
    if not points:
        return
    if model.clean:
        points.insert(0, (0.0, model.clean))
    eps, shares = zip(*points, strict=True)
    values = [100 * share.value for share in shares]
    bars = [
        [100 * (share.value - share.low) for share in shares],
        [100 * (share.high - share.value) for share in shares],
    ]
    style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 5, "capsize": 3}
    lines = axes.errorbar(eps, values, yerr=bars, linewidth=1.8, elinewidth=1, **style)
    if model.trusted is False:
        lines.lines[0].set_markerfacecolor("none")
        lines.lines[0].set_linestyle(":")


def _literal(words: str) -> str:
    """Return words that matplotlib shows as they are: no formulas."""
    return escaped(words).replace("$", r"\$")
