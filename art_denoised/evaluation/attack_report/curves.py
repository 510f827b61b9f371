"""Robust accuracy against eps, and certified accuracy against radius, on one axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from art_denoised.evaluation.attack_report.model import Model
from art_denoised.evaluation.report import draw_accuracy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's, which colour-blind readers can tell apart, but for those that vanish on a dark
# or a light page.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v")
_INK = "#7a7a7a"  # of axes: seen on light and dark pages


def look(i: int) -> tuple[str, str]:
    """Return colour and marker of the i-th model.

    Example:
        >>> look(0)
        ('#0072B2', 'o')
    """
    return COLOURS[i % len(COLOURS)], MARKERS[(i + i // len(COLOURS)) % len(MARKERS)]


def robust_figure(models: Sequence[Model], norm: str) -> Figure:
    """Return the figure of all models in a norm: no name of a model is in it.

    Points with bars are robust accuracy under all attacks on fresh noise, from clean accuracy at
    eps 0 on; steps with bands are certified accuracy, in l2.

    Args:
        models: The i-th looks as `look` says.
        norm: "linf" or "l2".

    Example:
        >>> robust_figure([], "l2").axes[0].get_ylabel()
        'accuracy (%)'
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for i, model in enumerate(models):
        colour, marker = look(i)
        if norm == "l2" and model.certified:
            draw_accuracy(axes, model.certified, colour, linestyle="--", linewidth=1.5)
        points = [(f.ball.eps, f.fresh) for f in model.headlines if f.ball.norm == norm]
        if points and model.clean:
            points.insert(0, (0.0, model.clean))
        if points:
            eps, shares = zip(*points, strict=True)
            values = [100 * share.value for share in shares]
            bars = [
                [100 * (share.value - share.low) for share in shares],
                [100 * (share.high - share.value) for share in shares],
            ]
            style: dict[str, Any] = {
                "color": colour,
                "marker": marker,
                "markersize": 5,
                "capsize": 3,
            }
            lines = axes.errorbar(eps, values, yerr=bars, linewidth=1.8, elinewidth=1, **style)
            if model.trusted is False:
                lines.lines[0].set_markerfacecolor("none")
                lines.lines[0].set_linestyle(":")
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
