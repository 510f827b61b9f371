"""Logs: written row by row, resumed exactly, read in every dialect."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from art_denoised.checks import InputError
from art_denoised.evaluation.rows import (
    CERTIFY,
    HEADERS,
    CertifyRow,
    Log,
    PredictRow,
    read_log,
    write_tsv,
)
from art_denoised.runs import Run
from art_denoised.smoothing.bounds import Mixture
from art_denoised.smoothing.statistics import Certificate, Vote, accuracy_rows

SETTINGS = {"sigma": 0.25, "n": 100, "model": "a:b", "denoiser": None}


def certificate(k: int = 90) -> Certificate:
    return Certificate.from_counts(
        {3: 8, 5: 2}, {3: k, 7: 100 - k}, alpha=0.01, sigma=0.25, seed=1, dtype="float32"
    )


def row(index: int, k: int = 90) -> CertifyRow:
    return CertifyRow.of(index, 3, certificate(k), seconds=0.5)


COUNTS = st.dictionaries(st.integers(0, 999), st.integers(1, 10**6), min_size=1, max_size=5)


@given(COUNTS, COUNTS, st.floats(1e-6, 0.4), st.integers(0, 2**63))
def test_rows_survive_json(selection, counts, alpha, seed):
    options = {"alpha": alpha, "sigma": 0.25, "seed": seed, "dtype": "bfloat16"}
    c = Certificate.from_counts(selection, counts, **options)
    v = Vote.from_counts(counts, **options)
    for written in (CertifyRow.of(4, 2, c, 0.1), PredictRow.of(4, 2, v, 0.1)):
        builtins = msgspec.to_builtins(written, str_keys=True)
        read = msgspec.convert(json.loads(json.dumps(builtins)), type(written), str_keys=True)
        assert read == written
    assert CertifyRow.of(4, 2, c).certificate == c
    assert PredictRow.of(4, 2, v).vote == v


def write(folder: Path, *rows: CertifyRow, **options) -> Path:
    with Run(folder, CERTIFY, SETTINGS, **options) as run:
        run.append(rows)
    return run.path


def test_written_rows_are_read_back_by_index(tmp_path):
    path = write(tmp_path, row(9, 99), row(0), row(3, 40))
    for place in (path, tmp_path):
        log = read_log(place)
        assert log.rows == (row(0), row(3, 40), row(9, 99))
        assert (log.kind, log.settings, log.notices) == ("certify", SETTINGS, ())


def test_time_takes_no_part_in_comparisons():
    assert row(0) == msgspec.structs.replace(row(0), seconds=9.0)
    assert row(0) != row(1)


@pytest.mark.parametrize(
    "changes",
    [
        {"index": 2.7},
        {"index": 10**400},
        {"radius": -0.1},
        {"radius": "x"},
        {"n": 99},
        {"n0": 9},
        {"counts": {"3": 101, "7": -1}},
        {"counts": None},
        {"alpha": 0},
        {"alpha": None},
        {"sigma": -1},
        {"mode": "other"},
        {"mode": "looks", "looks": [200, 100]},
        {"mode": "anytime", "prior": [-0.5, 1.0]},
    ],
)
def test_values_that_none_can_be_are_damage(tmp_path, changes):
    path = write(tmp_path, row(0))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], json.dumps(json.loads(lines[1]) | changes)]) + "\n")
    with pytest.raises(InputError, match="certify.jsonl:2"):
        read_log(path)


def anytime(n: int, index: int = 0) -> CertifyRow:
    c = Certificate.from_counts({1: 9}, {1: n}, alpha=0.01, sigma=1, bound=Mixture())
    return CertifyRow.of(index, 1, c)


def test_more_votes_replace_fewer_where_the_bound_allows_it(tmp_path):
    assert read_log(write(tmp_path / "a", anytime(100), anytime(200))).rows == (anytime(200),)
    for earlier, later in [(anytime(200), anytime(100)), (row(0), row(0, 80))]:
        path = write(tmp_path / f"{earlier.mode}", earlier, later)
        with pytest.raises(InputError, match="certify.jsonl:3"):
            read_log(path)


def test_logs_of_the_first_version_are_read(tmp_path):
    """As they are under results/: `idx`, `predict`, and a `correct` that is never believed."""
    path = write(tmp_path, row(0))
    header, line = map(json.loads, path.read_text().splitlines())
    line |= {"idx": line.pop("index"), "predict": line.pop("prediction"), "correct": False}
    path.write_text(json.dumps(header | {"version": 1}) + "\n" + json.dumps(line) + "\n")
    assert read_log(path).rows == (row(0),)
    assert read_log(path).rows[0].correct


CERTIFY_DIALECTS = {
    "timedelta": ["0:02:32.717239", "0:00:15", "1 day, 0:00:01"],
    "seconds": ["152.717239", "15.0", "86401.0"],
}


@pytest.mark.parametrize("dialect", CERTIFY_DIALECTS)
def test_tsv_dialects(tmp_path, dialect):
    times = CERTIFY_DIALECTS[dialect]
    path = tmp_path / "log"  # the field's logs have no suffix
    cells = ["0\t3\t3\t0.451\t1", "20\t5\t-1\t0.0\t0", "40\t8\t1\t0.12\t0"]
    lines = [f"{cell}\t{time}" for cell, time in zip(cells, times, strict=True)]
    path.write_text("\n".join([HEADERS["certify"], *lines, "", ""]))
    log = read_log(path)
    assert [r.index for r in log.rows] == [0, 20, 40]
    assert [r.correct for r in log.rows] == [True, False, False]
    assert [r.radius for r in log.rows] == [0.451, 0.0, 0.12]
    assert [r.seconds for r in log.rows] == [152.717239, 15.0, 86401.0]
    right, radii = [r.correct for r in log.rows], [r.radius for r in log.rows]
    shares = [entry.certified_accuracy for entry in accuracy_rows(right, radii, [0.0, 0.45, 0.46])]
    assert shares == pytest.approx([1 / 3, 1 / 3, 0])
    assert log.notices == ()


def test_running_totals_are_recomputed_and_reported(tmp_path):
    path = tmp_path / "a.tsv"
    rows = ["0\t3\t3\t0.4\t1\t1.0", "1\t5\t5\t0.2\t2\t1.0", "2\t5\t4\t0.2\t2\t1.0"]
    path.write_text("\n".join([HEADERS["certify"], *rows]) + "\n")
    log = read_log(path)
    assert [r.correct for r in log.rows] == [True, True, False]
    assert len(log.notices) == 1
    assert "2 rows" in log.notices[0]
    assert "running total" in log.notices[0]


def test_predict_tsv(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text(HEADERS["predict"] + "\n0\t3\t3\t1\t0:00:02\n")
    log = read_log(path)
    assert log.kind == "predict"
    assert log.rows == (PredictRow(index=0, label=3, prediction=3, seconds=2.0),)


@pytest.mark.parametrize(
    "line",
    [
        "0\t3\t3\t-0.1\t1\t1",
        "0\t3\t3\tnan\t1\t1",
        "0\tcat\t3\t0.1\t1\t1",
        "0\t3\t-2\t1\t1\t1",
        "0\t3\t3\t0.1\tinf\t1",
        "0\t3\t3\t0.1\t1\tnan",
    ],
)
def test_damaged_tsv_lines_are_named_and_a_torn_last_one_dropped(tmp_path, line):
    path = tmp_path / "a.tsv"
    good = "1\t3\t3\t0.1\t1\t1.0"
    path.write_text(f"{HEADERS['certify']}\n{line}\n{good}\n")
    with pytest.raises(InputError, match=r"a.tsv:2"):
        read_log(path)
    path.write_text(f"{HEADERS['certify']}\n{good}\n{line[:6]}")
    log = read_log(path)
    assert [r.index for r in log.rows] == [1]
    assert "torn" in log.notices[0]


def test_a_tsv_that_was_written_is_read_back(tmp_path):
    write_tsv(Log("certify", SETTINGS, (row(0), row(1, 99))), tmp_path / "a.tsv")
    log = read_log(tmp_path / "a.tsv")
    assert [(r.index, r.prediction, r.radius) for r in log.rows] == [
        (r.index, r.prediction, r.radius) for r in (row(0), row(1, 99))
    ]


def test_an_image_that_is_twice_in_a_tsv_is_refused(tmp_path):
    """Counted twice it would make the intervals too narrow."""
    line = "0\t3\t3\t0.4\t1\t1.0"
    (tmp_path / "a.tsv").write_text("\n".join([HEADERS["certify"], line, line]) + "\n")
    with pytest.raises(InputError, match="a.tsv:3"):
        read_log(tmp_path / "a.tsv")


def test_a_tsv_with_a_byte_order_mark_and_a_blank_last_line_is_read(tmp_path):
    text = "\ufeff" + HEADERS["certify"] + "\n0\t3\t3\t0.4\t1\t1.0\n\n"
    (tmp_path / "a.tsv").write_text(text, encoding="utf-8")
    assert [r.index for r in read_log(tmp_path / "a.tsv").rows] == [0]
