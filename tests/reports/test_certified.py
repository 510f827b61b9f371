"""Tables and plots, recomputed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from art_denoised.checks import InputError
from art_denoised.evaluation.records import CertifyRow
from art_denoised.evaluation.report import (
    accuracy_figure,
    accuracy_table,
    default_radii,
    format_table,
    plot_accuracy,
    to_json,
)
from art_denoised.smoothing.statistics import proportion_interval

OUTCOMES = [(1, 1, 0.5), (1, 1, 0.25), (2, 1, 0.75), (0, -1, 0.0)]
ROWS = [
    CertifyRow(i, label, predict, radius, seconds=0)
    for i, (label, predict, radius) in enumerate(OUTCOMES)
]


def test_certified_accuracy_counts_right_labels_with_enough_radius():
    table = accuracy_table(ROWS, [0.0, 0.25, 0.26, 0.5, 0.6])
    assert [entry.certified_accuracy for entry in table] == [0.5, 0.5, 0.25, 0.25, 0.0]
    assert table[0][2:] == proportion_interval(2, 4)
    assert to_json(table)[2] == {
        "radius": 0.26,
        "certified_accuracy": 0.25,
        "low": table[2].low,
        "high": table[2].high,
    }


def test_terminal_table_shows_the_figures():
    text = format_table({"with": ROWS, "a longer name": ROWS[:2]}, [0.0, 0.5])
    line = next(line for line in text.splitlines() if line.startswith("with"))
    assert line.split() == ["with", "4", "50.0", "25.0", "25.0%", "0.188"]
    rows = [line for line in text.splitlines() if line.startswith(("with", "a longer name"))]
    assert len({len(line) for line in rows}) == 1
    assert text.splitlines()[1].endswith("ACR")
    assert len(text.splitlines()[1]) == len(rows[0])


def test_default_radii_reach_the_largest_but_do_not_pass_it():
    for largest in (0.013, 0.1, 0.8, 1.0, 2.46, 40.0):
        radii = default_radii([CertifyRow(0, 1, 1, largest, 0)])
        assert radii[0] == 0
        assert 3 <= len(radii) <= 7
        assert largest / 2 < radii[-1] <= largest
    assert default_radii([]) == [0.0]


def test_curve_is_the_certified_accuracy_at_every_radius():
    """Read off the drawn step function between and at its knots."""
    axes = accuracy_figure({"ours": ROWS}, title="t").axes[0]
    x, y = axes.lines[0].get_data()
    drawstyle = axes.lines[0].get_drawstyle()
    assert drawstyle == "steps-pre"
    for radius in (0.1, 0.25, 0.3, 0.5):
        drawn = y[np.searchsorted(x, radius)]  # steps-pre: y[i] holds on (x[i-1], x[i]]
        assert drawn == pytest.approx(100 * accuracy_table(ROWS, [radius])[0].certified_accuracy)
    assert (x[0], y[0]) == (0, 50)
    assert (x[-1], y[-1]) == (0.5, 0)
    assert axes.get_title() == "t"


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg"])
def test_plot_files(tmp_path, suffix):
    plot_accuracy({"ours": ROWS, "none right": ROWS[2:]}, tmp_path / f"a{suffix}")
    assert [path.name for path in tmp_path.iterdir()] == [f"a{suffix}"]
    assert (tmp_path / f"a{suffix}").stat().st_size > 1000


def test_refusals(tmp_path):
    with pytest.raises(InputError, match=r"\.png"):
        plot_accuracy({"ours": ROWS}, tmp_path / "a.doc")
    with pytest.raises(InputError, match="no rows"):
        accuracy_table([], [0.0])
    with pytest.raises(InputError, match="no rows"):
        plot_accuracy({"ours": []}, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
