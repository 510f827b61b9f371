"""Certified accuracy: tables and plots, recomputed by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from art_denoised.checks import InputError
from art_denoised.cli import main
from art_denoised.evaluation import CERTIFY, CertifyRow, Log
from art_denoised.reports import accuracy_table, certified_table, draw_certified, plot_certified
from art_denoised.reports.certified import default_radii
from art_denoised.reports.plots import certified_figure
from art_denoised.runs import Run
from art_denoised.smoothing.statistics import proportion_interval

OUTCOMES = [(1, 1, 0.5), (1, 1, 0.25), (2, 1, 0.75), (0, -1, 0.0)]
ROWS = tuple(
    CertifyRow(index=i, label=label, prediction=prediction, radius=radius, seconds=0)
    for i, (label, prediction, radius) in enumerate(OUTCOMES)
)


def log(rows=ROWS, radii=()) -> Log:
    return Log("certify", {"radii": list(radii)} if radii else None, tuple(rows))


def test_certified_accuracy_counts_right_labels_with_enough_radius():
    table = accuracy_table(ROWS, [0.0, 0.25, 0.26, 0.5, 0.6])
    assert [entry.certified_accuracy for entry in table] == [0.5, 0.5, 0.25, 0.25, 0.0]
    assert table[0][2:] == proportion_interval(2, 4)
    assert certified_table({"ours": log()}, [0.26]).to_json() == [
        {
            "radius": 0.26,
            "certified_accuracy": 0.25,
            "low": table[2].low,
            "high": table[2].high,
            "at_least": False,
        }
    ]


def test_table_shows_the_results():
    table = certified_table({"with": log(), "a longer name": log(ROWS[:2])}, [0.0, 0.5])
    lines = str(table).splitlines()
    line = next(line for line in lines if line.startswith("with"))
    assert line.split() == ["with", "4", "50.0", "25.0", "25.0%", "0.188"]
    rows = [line for line in lines if line.startswith(("with", "a longer name"))]
    assert len({len(line) for line in rows}) == 1
    assert lines[1].endswith("ACR")
    assert len(lines[1]) == len(rows[0])
    low, high = proportion_interval(2, 4)
    assert f"{100 * low:.0f}-{100 * high:.0f}" in lines[lines.index(line) + 1]


def test_default_radii_reach_the_largest_but_do_not_pass_it():
    for largest in (0.013, 0.1, 0.8, 1.0, 2.46, 40.0):
        row = CertifyRow(index=0, label=1, prediction=1, radius=largest, seconds=0)
        radii = default_radii([log([row])])
        assert radii[0] == 0
        assert 3 <= len(radii) <= 7
        assert largest / 2 < radii[-1] <= largest
    assert default_radii([]) == [0.0]


def test_radii_that_a_run_stopped_at_are_shown_and_others_are_lower_bounds():
    stopped = log(radii=[0.25, 0.5])
    table = certified_table({"ours": stopped})
    assert [entry["radius"] for entry in table.to_json()] == [0.25, 0.5]
    assert not any(entry["at_least"] for entry in table.to_json())
    assert ">=" not in str(table)
    elsewhere = certified_table({"ours": stopped, "whole": log()}, [0.0, 0.25])
    assert [entry["at_least"] for entry in elsewhere.to_json()] == [True, False, False, False]
    assert str(elsewhere).count(">=50.0") == 1
    assert ">=: a lower bound" in str(elsewhere)
    assert default_radii([stopped, log(radii=[0.7])]) == [0.25, 0.5, 0.7]


@pytest.mark.parametrize("radii", ["0.5", [[0.5]], ["a"], [float("inf")], 7])
def test_damaged_radii_end_in_one_line(radii):
    with pytest.raises(InputError, match="radii"):
        certified_table({"ours": Log("certify", {"radii": radii}, ROWS)})


def write(folder: Path, **settings) -> Path:
    with Run(folder, CERTIFY, settings) as run:
        run.append(ROWS)
    return folder


def test_commands_show_escapes_and_lower_bounds(tmp_path, capsys):
    folder = write(tmp_path / "red\x1b[31m [bold]", radii=[0.5])
    assert main(["table", str(folder)]) == 0
    out = capsys.readouterr().out
    assert r"red\x1b[31m [bold]" in out
    assert "\x1b" not in out
    assert out.splitlines()[1].split() == ["images", "r=0.5", "abstain", "ACR"]
    assert main(["table", str(folder), "--radii", "0.25", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["at_least"] is True
    assert main(["verify", str(folder)]) == 1
    out = capsys.readouterr().out
    assert r"red\x1b[31m [bold]/certify.jsonl: image 0" in out
    assert "0 of 4 rows" in out
    assert "\x1b" not in out


def test_errors_and_notices_show_escapes(tmp_path, capsys):
    path = tmp_path / "red\x1b[31m.jsonl"
    assert main(["table", str(path)]) == 2
    assert main(["report", str(path)]) == 2
    path.write_text("hello\n")
    assert main(["report", f"a\x1b[5m={path}"]) == 2
    log_file = write(tmp_path / "torn\x1b[31m") / "certify.jsonl"
    log_file.write_text(log_file.read_text() + '{"index": 9')
    assert main(["table", str(tmp_path / "torn\x1b[31m")]) == 0
    printed = capsys.readouterr()
    assert r"red\x1b[31m.jsonl" in printed.err
    assert r"torn\x1b[31m" in printed.err
    assert "\x1b" not in printed.err + printed.out


def test_curve_is_the_certified_accuracy_at_every_radius():
    """Read off the drawn step function between and at its knots."""
    axes = certified_figure({"ours": log()}, title="t").axes[0]
    x, y = axes.lines[0].get_data()
    assert axes.lines[0].get_drawstyle() == "steps-pre"
    for radius in (0.1, 0.25, 0.3, 0.5):
        drawn = y[np.searchsorted(x, radius)]  # steps-pre: y[i] holds on (x[i-1], x[i]]
        assert drawn == pytest.approx(100 * accuracy_table(ROWS, [radius])[0].certified_accuracy)
    assert (x[0], y[0]) == (0, 50)
    assert (x[-1], y[-1]) == (0.5, 0)
    assert axes.get_title() == "t"
    again = certified_figure({"other": log(ROWS[:1])}).axes[0]
    draw_certified(again, ROWS, "black")
    np.testing.assert_array_equal(again.lines[1].get_data(), (x, y))


def test_names_in_a_plot_are_no_formulas(tmp_path):
    name = r"$\frac{$ red" + "\x1b[31m"
    plot_certified({name: log(radii=[0.5])}, tmp_path / "a.svg", title=name)
    axes = certified_figure({name: log(radii=[0.5])}).axes[0]
    assert axes.get_legend_handles_labels()[1][0].endswith("(lower bound except at r = 0.5)")


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg"])
def test_plot_files(tmp_path, suffix):
    plot_certified({"ours": log(), "none right": log(ROWS[2:])}, tmp_path / f"a{suffix}")
    assert [path.name for path in tmp_path.iterdir()] == [f"a{suffix}"]
    assert (tmp_path / f"a{suffix}").stat().st_size > 1000


def test_refusals(tmp_path):
    with pytest.raises(InputError, match=r"\.png"):
        plot_certified({"ours": log()}, tmp_path / "a.doc")
    with pytest.raises(InputError, match="no rows"):
        accuracy_table([], [0.0])
    with pytest.raises(InputError, match=r"missing/a\.png cannot be written"):
        plot_certified({"ours": log()}, tmp_path / "missing" / "a.png")
    with pytest.raises(InputError, match="no rows"):
        plot_certified({"ours": log([])}, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
