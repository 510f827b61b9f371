"""Certified accuracy: tables and plots, recomputed by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from art_denoised.checks import InputError
from art_denoised.cli import main
from art_denoised.evaluation import CERTIFY, CertifyRow, Log
from art_denoised.reports import certified_table, read_curves
from art_denoised.reports.certified import accuracy_table, default_radii, images_apart
from art_denoised.reports.terminal import latex, markdown
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


def test_a_table_for_papers():
    found = certified_table({"50% & [more]": log(radii=[0.5])}, [0.25, 0.5])
    lines = latex(found.block()).splitlines()
    row = next(line for line in lines if line.startswith("50"))
    cells = [cell.strip() for cell in row.split(" & ")]
    assert row.startswith(r"50\% \& [more] & 4 & ")
    assert cells[2].startswith(r"$\geq$50.0 {\scriptsize ")
    assert lines[-1] == r"\end{tabular}"
    assert r"\begin{tabular}{lrrrrr}" in lines
    rows = [line for line in markdown(found.block()).splitlines() if line.startswith("|")]
    assert [line.count(" | ") for line in rows] == [5, 5, 5]
    assert rows[2].startswith(r"| 50% &#38; \[more\] | 4 | &#62;=50.0 (")


def test_a_csv_holds_the_shares_and_is_a_file_of_curves(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(certified_table({"ours": log(), "b, c": log(ROWS[:2])}, [0.5, 0.0]).to_csv())
    first, second = read_curves(path)
    assert (first.name, first.radii, first.accuracy) == ("ours", (0.0, 0.5), (0.5, 0.25))
    assert (second.name, second.accuracy) == ("b, c", (1.0, 0.5))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("name,radius,certified_accuracy\na,0.5,61\n", "61"),  # percent
        ("name,radius,certified_accuracy\na,-1,0.5\n", "-1"),
        ("name,radius,certified_accuracy\na,x,0.5\n", ":2"),
        ("name,radius\na,0.5\n", ":2"),
        ("name,radius,certified_accuracy\n", "no curves"),
    ],
)
def test_curves_that_are_not_shares_are_refused(tmp_path, text, value):
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=value):
        read_curves(path)


def test_refusals():
    with pytest.raises(InputError, match="no rows"):
        accuracy_table([], [0.0])


def of(rows=ROWS, **settings) -> Log:
    return Log("certify", settings, tuple(rows))


@pytest.mark.parametrize(
    ("logs", "words"),
    [
        ([of(pixels="p", indices="0:4"), of(pixels="q", indices="0:4")], "a and b: other pixels"),
        # The first tells nothing.
        (
            [of(), of(pixels="p", indices="0:4"), of(pixels="q", indices="0:4")],
            "b and c: other pix",
        ),
        ([of(data="cifar10"), of(data="digits")], "other data (cifar10 and digits)"),
        ([of(), of(ROWS[1:])], "certified on other images (4 and 3, 3 in common)"),
        # Equal pixels, however the path is spelt.
        (
            [
                of(data="npz:a", pixels="p", indices="0:4"),
                of(data="./a", pixels="p", indices="0:4"),
            ],
            "",
        ),
        ([of(), of(), of(data="digits", pixels="p", indices="0:4")], ""),
    ],
)
def test_logs_of_other_images_are_named(logs, words):
    found = images_apart(dict(zip("abc", logs, strict=False)))
    assert [words in text for text in found] == [True] * bool(words)
