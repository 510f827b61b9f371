"""Logs: written row by row, resumed exactly, read in every dialect."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from art_denoised.checks import InputError
from art_denoised.data import load_data
from art_denoised.demo import digits_classifier
from art_denoised.evaluation.logs import LogWriter, read_log
from art_denoised.evaluation.records import CertifyRow, PredictRow, from_json, to_json
from art_denoised.reports import accuracy_table
from art_denoised.evaluation.run import certify_data
from art_denoised.evaluation.tsv import HEADERS, TsvWriter
from art_denoised.smoothing.statistics import Certificate, Vote

SETTINGS = {"sigma": 0.25, "n": 100, "model": "a:b", "denoiser": None}


def certificate(k: int = 90) -> Certificate:
    return Certificate.from_counts(
        {3: 8, 5: 2}, {3: k, 7: 100 - k}, alpha=0.01, sigma=0.25, seed=1, dtype="float32"
    )


def row(idx: int, k: int = 90) -> CertifyRow:
    c = certificate(k)
    return CertifyRow(idx, 3, c.label, c.radius, seconds=0.5, certificate=c)


def write(path: Path, rows, **options) -> None:
    with LogWriter(path, "certify", SETTINGS, **options) as log:
        for each in rows:
            log.append(each)


COUNTS = st.dictionaries(st.integers(0, 999), st.integers(1, 10**6), min_size=1, max_size=5)


@given(COUNTS, COUNTS, st.floats(1e-6, 0.4), st.integers(0, 2**63))
def test_rows_survive_json(selection, counts, alpha, seed):
    options = {"alpha": alpha, "sigma": 0.25, "seed": seed, "dtype": "bfloat16"}
    c = Certificate.from_counts(selection, counts, **options)
    certified = CertifyRow(4, 2, c.label, c.radius, 0.1, c)
    assert from_json("certify", to_json(certified)) == certified
    v = Vote.from_counts(counts, **options)
    voted = PredictRow(4, 2, v.label, 0.1, v)
    assert from_json("predict", to_json(voted)) == voted


def test_written_rows_are_read_back(tmp_path):
    rows = [row(0), row(3, 40), row(9, 99)]
    write(tmp_path / "a.jsonl", rows)
    log = read_log(tmp_path / "a.jsonl")
    assert log.rows == tuple(rows)
    assert log.settings == SETTINGS
    assert (log.kind, log.notices) == ("certify", ())


def test_a_torn_last_line_is_dropped_wherever_it_is_torn(tmp_path):
    path = tmp_path / "a.jsonl"
    write(path, [row(0), row(1)])
    whole = path.read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    for cut in range(start + 1, len(whole)):
        path.write_bytes(whole[:cut])
        log = read_log(path)
        assert log.rows == (row(0),)
        assert len(log.notices) == 1
        write(path, [row(1)], resume=True)
        assert path.read_bytes() == whole


def test_a_torn_header_starts_again(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"art_den')
    with LogWriter(path, "certify", SETTINGS, resume=True) as log:
        assert len(log.notices) == 1
        log.append(row(0))
    assert read_log(path).rows == (row(0),)


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda lines: [lines[0], lines[1][:-5] + "\n", lines[2]], "a.jsonl:2"),
        (lambda lines: [lines[0], lines[1], lines[1]], "image 0 a second time"),
        (lambda lines: lines[1:], "header"),
        (lambda lines: [lines[0], lines[1].replace("0.", "-0.", 1)], "radius"),
        (lambda lines: ["hello\n"], "no log"),
    ],
)
def test_damage_before_the_last_line_is_refused(tmp_path, damage, word):
    path = tmp_path / "a.jsonl"
    write(path, [row(0), row(1)])
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(damage(lines)))
    with pytest.raises(InputError, match=word):
        read_log(path)


def test_other_runs_are_not_mixed(tmp_path):
    path = tmp_path / "a.jsonl"
    write(path, [row(0)])
    before = path.read_bytes()
    with pytest.raises(InputError, match="--resume"):
        LogWriter(path, "certify", SETTINGS)
    with pytest.raises(InputError, match=r"sigma 0.25 -> 0.5"):
        LogWriter(path, "certify", SETTINGS | {"sigma": 0.5}, resume=True)
    with pytest.raises(InputError, match="a certify log, not a predict log"):
        LogWriter(path, "predict", SETTINGS, resume=True)
    assert path.read_bytes() == before


def hold(path: Path, ready, done) -> None:
    with LogWriter(path, "certify", SETTINGS):
        ready.set()
        done.wait()


def test_two_processes_cannot_write_one_log(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path / "a.jsonl", ready, done))
    other.start()
    assert ready.wait(60)
    with pytest.raises(InputError, match="another process"):
        LogWriter(tmp_path / "a.jsonl", "certify", SETTINGS, resume=True)
    done.set()
    other.join(60)
    write(tmp_path / "a.jsonl", [row(0)], resume=True)


def test_what_is_no_file_is_refused(tmp_path):
    (tmp_path / "a.jsonl").symlink_to("/dev/null")
    with pytest.raises(InputError, match="not a regular file"):
        LogWriter(tmp_path / "a.jsonl", "certify", SETTINGS)


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
    assert [r.idx for r in log.rows] == [0, 20, 40]
    assert [r.correct for r in log.rows] == [True, False, False]
    assert [r.radius for r in log.rows] == [0.451, 0.0, 0.12]
    assert [r.seconds for r in log.rows] == [152.717239, 15.0, 86401.0]
    shares = [entry.certified_accuracy for entry in accuracy_table(log.rows, [0.0, 0.45, 0.46])]
    assert shares == pytest.approx([1 / 3, 1 / 3, 0])
    assert log.notices == ()


def test_running_totals_are_recomputed_and_reported(tmp_path):
    path = tmp_path / "a.tsv"
    rows = ["0\t3\t3\t0.4\t1\t1.0", "1\t5\t5\t0.2\t2\t1.0", "2\t5\t4\t0.2\t2\t1.0"]
    path.write_text("\n".join([HEADERS["certify"], *rows]) + "\n")
    log = read_log(path)
    assert [r.correct for r in log.rows] == [True, True, False]
    assert accuracy_table(log.rows, [0.0])[0].certified_accuracy == pytest.approx(2 / 3)
    assert len(log.notices) == 1
    assert "2 rows" in log.notices[0]
    assert "running total" in log.notices[0]


def test_predict_tsv(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text(HEADERS["predict"] + "\n0\t3\t3\t1\t0:00:02\n")
    log = read_log(path)
    assert log.kind == "predict"
    assert log.rows == (PredictRow(0, 3, 3, seconds=2.0),)


@pytest.mark.parametrize(
    "line",
    ["0\t3\t3\t-0.1\t1\t1", "0\t3\t3\tnan\t1\t1", "0\tcat\t3\t0.1\t1\t1", "0\t3\t-2\t1\t1\t1"],
)
def test_damaged_tsv_lines_are_named_and_a_torn_last_one_dropped(tmp_path, line):
    path = tmp_path / "a.tsv"
    good = "1\t3\t3\t0.1\t1\t1.0"
    path.write_text(f"{HEADERS['certify']}\n{line}\n{good}\n")
    with pytest.raises(InputError, match=r"a.tsv:2"):
        read_log(path)
    path.write_text(f"{HEADERS['certify']}\n{good}\n{line[:6]}")
    log = read_log(path)
    assert [r.idx for r in log.rows] == [1]
    assert "torn" in log.notices[0]


def test_tsv_begins_with_the_rows_of_a_resumed_run(tmp_path):
    path = tmp_path / "a.tsv"
    with TsvWriter(path, "certify", [row(0)]) as table:
        table.append(row(1))
    log = read_log(path)
    assert [(r.idx, r.predict, r.radius) for r in log.rows] == [
        (r.idx, r.predict, r.radius) for r in (row(0), row(1))
    ]


def test_a_model_of_the_same_weights_is_not_the_same_model(tmp_path):
    """What tells them apart is no weight: rows of both would stand in one log."""

    def sloping(slope: float) -> nn.Module:
        return nn.Sequential(nn.LeakyReLU(slope), digits_classifier()).eval()

    options = {"sigma": 0.25, "n": 100, "progress": False}
    certify_data(sloping(0.1), load_data("digits"), tmp_path, indices=[0], **options)
    with pytest.raises(InputError, match="structure"):
        certify_data(
            sloping(0.2), load_data("digits"), tmp_path, indices=[0, 1], resume=True, **options
        )
