"""The commands that read logs: `table`, `plot` and `verify`; `report` is tested in its own room."""

from __future__ import annotations

import json

import numpy as np
import pytest

from art_denoised.cli import main
from art_denoised.evaluation import read_log
from tests.cli.command import DENOISER, certify, refusal, words


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of full radii with its TSV, and one of two radii."""
    folder = tmp_path_factory.mktemp("runs")
    options = {"denoiser": DENOISER, "n": 1000, "max": 20}
    assert main(certify(folder / "all", "--tsv", **options)) == 0
    assert main(certify(folder / "radii", radii="0,0.25", **options)) == 0
    return folder


def printed_json(capsys, arguments: list[str]):
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", ["certify.jsonl", "certify.tsv", ""])
def test_a_table_of_a_log_or_of_its_folder(runs, capsys, name):
    rows = read_log(runs / "all" / "certify.jsonl").rows
    table = printed_json(capsys, words("table", str(runs / "all" / name), radii="0,0.25"))
    assert {"radius", "certified_accuracy", "low", "high"} <= set(table[0])
    assert table[1]["radius"] == 0.25
    expected = np.mean([row.correct and row.radius >= 0.25 for row in rows])
    assert table[1]["certified_accuracy"] == pytest.approx(expected)


def test_several_logs_are_named(runs, capsys):
    logs = [str(runs / name) for name in ("all", "radii")]
    table = printed_json(capsys, ["table", f"ours={logs[1]}", logs[0], "--radii", "0"])
    assert [entry["log"] for entry in table] == ["ours", "all"]


def test_the_radii_of_a_run_are_the_default(runs, capsys):
    logs = [str(runs / name) for name in ("all", "radii")]
    assert [entry["radius"] for entry in printed_json(capsys, ["table", logs[1]])] == [0, 0.25]
    both = [printed_json(capsys, words("table", log, radii="0,0.25")) for log in logs]
    shares = [[entry["certified_accuracy"] for entry in table] for table in both]
    assert shares[0] == pytest.approx(shares[1], abs=0.051)


def test_other_radii_than_those_of_the_run_are_lower_bounds(runs, capsys):
    log = str(runs / "radii")
    for radii, at_least in (("0,0.5", [False, True]), ("0.25", [False])):
        table = printed_json(capsys, words("table", log, radii=radii))
        assert [entry["at_least"] for entry in table] == at_least


@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("a.pdf", b"%PDF")])
def test_plot(runs, tmp_path, name, start):
    assert main(["plot", str(runs / "all"), "-o", str(tmp_path / name), "--title", "Digits"]) == 0
    assert (tmp_path / name).read_bytes().startswith(start)


def test_a_plot_of_named_runs_beside_published_curves(runs, tmp_path, capsys):
    """What `table --csv` prints is a file of curves."""
    logs = [str(runs / name) for name in ("all", "radii")]
    assert main(["table", f"theirs={logs[0]}", "--csv"]) == 0
    (tmp_path / "theirs.csv").write_text(capsys.readouterr().out)
    out = tmp_path / "a.svg"
    options = {"names": "A,B", "size": "3,2", "published": str(tmp_path / "theirs.csv")}
    assert main([*words("plot", *logs, **options), "-o", str(out), "--ylabel", "share"]) == 0
    drawn = out.read_text()
    for text in ("A", "B", "theirs", "share", "between markers: a lower bound"):
        assert f">{text}</text>" in drawn, text


@pytest.mark.parametrize("command", ["table", "plot"])
def test_runs_of_other_images_do_not_stand_beside_each_other_without_a_word(
    runs, tmp_path, capsys, command
):
    assert main(certify(tmp_path / "few", n=100, max=15)) == 0
    logs = [f"ours={runs / 'all'}", f"few={tmp_path / 'few'}"]
    more = ["-o", str(tmp_path / "a.png")] if command == "plot" else []
    capsys.readouterr()
    assert main([command, *logs, *more]) == 0
    assert (
        "notice: ours and few: certified on other images (20 and 15, 15" in capsys.readouterr().err
    )
    assert main([command, f"ours={runs / 'all'}", f"same={runs / 'radii'}", *more]) == 0
    assert "notice" not in capsys.readouterr().err


def test_a_table_for_a_paper(runs, capsys):
    for option, first in (("--latex", "all & 20 & "), ("--markdown", "| all | 20 | ")):
        assert main(["table", str(runs / "all"), option]) == 0
        assert sum(line.startswith(first) for line in capsys.readouterr().out.splitlines()) == 1
    assert main(["report", str(runs / "all"), "--latex"]) == 0
    assert r"model & certified, l2 r=0 & " in capsys.readouterr().out


def test_pictures_of_a_certify_run(runs, tmp_path, capsys):
    out = tmp_path / "a.svg"
    arguments = ["pictures", str(runs / "all"), "-o", str(out), "--max", "1"]
    assert main([*arguments, "--denoiser", DENOISER]) == 0
    assert all(f">{stage}</text>" in out.read_text() for stage in ("clean", "noisy", "denoised"))
    message = refusal(capsys, [*arguments, "--data", "imagefolder:none"])
    assert "none" in message


def test_verify_counts_rows(runs, capsys):
    assert main(words("verify", str(runs / "all"), str(runs / "radii"), family_alpha=0.05)) == 0
    printed = capsys.readouterr().out
    assert printed.count("20 of 20 rows") == 2
    assert printed.count("0.95") == 2


def test_a_log_of_predict_has_no_radii(tmp_path, capsys):
    arguments = certify(tmp_path)
    arguments[0] = "predict"
    assert main(arguments) == 0
    message = refusal(capsys, ["table", str(tmp_path)])
    assert str(tmp_path) in message
    assert "predict" in message


@pytest.mark.parametrize(
    ("arguments", "values"),
    [
        (["table", "missing.jsonl"], ["missing.jsonl"]),
        (["table", "README.md"], ["README.md"]),
        (["table", "tests"], ["tests", "certify.jsonl"]),
        (["table", "x", "--radii", "a"], ["radii", "'a'"]),
        (["table", "x", "--radii", "-1"], ["radii", "-1"]),
        (["plot", "README.md", "-o", "a.png"], ["README.md"]),
        (["plot", "tests/golden/logs/fixed", "-o", "none/a.png"], [" none/a.png cannot"]),
        (["verify", "README.md"], ["README.md"]),
        (["verify", "missing.jsonl"], ["missing.jsonl"]),
        (["verify", "README.md", "--family-images", "9"], ["--family-alpha"]),
        (["report", "x", "--json", "--tsv"], ["--json", "--tsv"]),
        (["table", "x", "--latex", "--csv"], ["--latex", "--csv"]),
        (["plot", "x", "-o", "a.png", "--names", "A,B"], ["2 names", "1 log"]),
        (["plot", "tests/golden/logs/fixed", "-o", "a.png", "--size", "3"], ["(3.0,)"]),
        (["pictures", "missing", "-o", "a.png"], ["missing"]),
        (["pictures", "tests/golden/logs/fixed", "-o", "a.png", "--max", "0"], ["most is 0"]),
        (["pictures", "tests/golden/logs/attack", "-o", "a.png", "--crop", "9"], ["certify.jsonl"]),
        (["report", "missing"], ["missing"]),
    ],
)
def test_bad_commands(capsys, arguments, values):
    message = refusal(capsys, arguments)
    for value in values:
        assert value in message
