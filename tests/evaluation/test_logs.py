"""Logs: written row by row, resumed exactly, read in every dialect."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from art_denoised.checks import InputError
from art_denoised.cli import main
from art_denoised.evaluation.logs import (
    ATTACK,
    CERTIFY,
    HEADERS,
    PREDICT,
    AttackLog,
    CertifyRow,
    LabelledRow,
    Log,
    PredictRow,
    read_log,
    read_logs,
    write_tsv,
)
from art_denoised.runs import Run
from art_denoised.smoothing.statistics import (
    Certificate,
    Looks,
    Mixture,
    Proof,
    Sequential,
    Vote,
    accuracy_rows,
)

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
        {"index": 2**53 + 1},
        {"prediction": -2},
        {"radius": -0.1},
        {"radius": 1.5e300},
        {"radius": "x"},
        {"n": 99},
        {"n0": 9},
        {"counts": {"3": 101, "7": -1}},
        {"counts": None},
        {"counts": {"3": 2**53 + 1}, "n": 2**53 + 1},
        {"counts": {"3": 100, "7": 0}},
        {"alpha": 0},
        {"alpha": 0.5},
        {"alpha": None},
        {"sigma": 0},
        {"sigma": 1.5e300},
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


def test_a_prior_alone_does_not_make_a_bound_that_holds_at_any_time():
    fixed = msgspec.structs.replace(row(0), prior=(0.5, 0.7))
    assert fixed.bound == Looks.fixed(fixed.n)


def test_the_largest_and_the_smallest_values_are_read():
    """Whole numbers up to 2^53, which every reader of JSON holds exactly."""
    record = msgspec.to_builtins(row(0), str_keys=True)
    edges = [
        {"index": 2**53, "label": 2**53, "prediction": 2**53, "n": 2**53, "counts": {"3": 2**53}},
        {"prediction": 0, "label": 0, "n": 1, "counts": {"0": 1}, "radius": 0.0, "sigma": 1e-300},
        {"prediction": -1, "radius": 1e300, "sigma": 1e300, "alpha": 0.499},
    ]
    for edge in edges:
        read = msgspec.convert(record | edge, CertifyRow, str_keys=True)
        assert msgspec.to_builtins(read, str_keys=True) == record | edge


def test_rows_take_their_fields_by_name_and_cannot_be_changed():
    rest = {"label": 3, "prediction": 3, "seconds": 1.0}
    own = {"index": 7, **rest}
    for kind, more in ((LabelledRow, {}), (CertifyRow, {"radius": 0.5}), (PredictRow, {})):
        made = kind(**own, **more)
        with pytest.raises(AttributeError):
            made.prediction = 4
        with pytest.raises(TypeError):
            kind(7, **rest, **more)
    for kind in (CertifyRow, PredictRow):
        with pytest.raises(TypeError):
            kind(0.5, **own)
    assert (made.n, made.p_value) == (0, 1.0)
    bare = CertifyRow(**own, radius=0.5)
    assert (bare.n, bare.n0, bare.drawn, bare.p_lower, bare.tv, bare.seed) == (0, 0, 0, 0.0, 0.0, 0)


def anytime(counts: dict[int, int], **changes: object) -> CertifyRow:
    c = Certificate.from_counts({1: 9}, counts, alpha=0.01, sigma=1, bound=Mixture())
    return msgspec.structs.replace(CertifyRow.of(0, 1, c), **changes)


FEW, MORE = {1: 100, 2: 1}, {1: 200, 2: 1}


@pytest.mark.parametrize(
    ("later", "goes_on"),
    [
        (anytime(MORE), True),
        (anytime({1: 100, 2: 2}), True),
        (anytime(FEW), False),
        (anytime({1: 200}), False),  # the vote for 2 is lost
        (anytime({1: 99, 2: 200}), False),
        (anytime(MORE, prior=(1.0, 1.0)), False),
        (anytime(MORE, selection_counts={1: 8}, n0=8), False),
        (CertifyRow.of(0, 1, Certificate.from_counts({1: 9}, MORE, alpha=0.01, sigma=1)), False),
        (CertifyRow(index=0, label=1, prediction=1, seconds=0.0, radius=0.1, n=300), False),
    ],
)
def test_more_votes_go_on_from_fewer_where_the_bound_allows_it(later, goes_on):
    earlier = anytime(FEW)
    assert later.replaces(earlier) is goes_on
    assert not later.replaces(msgspec.structs.replace(earlier, counts=None, selection_counts=None))
    vote = Vote.from_counts(FEW, alpha=0.01, sigma=1)
    assert not later.replaces(PredictRow.of(0, 1, vote))


def test_more_votes_replace_fewer_in_a_log(tmp_path):
    few, more = anytime(FEW), anytime(MORE)
    assert read_log(write(tmp_path / "a", few, more)).rows == (more,)
    for earlier, later in [(more, few), (row(0), row(0, 80))]:
        path = write(tmp_path / f"{earlier.mode}", earlier, later)
        with pytest.raises(InputError, match="certify.jsonl:3"):
            read_log(path)


@pytest.mark.parametrize(
    ("bound", "n", "held"),
    [
        (Looks.fixed(100), 100, {"mode": "fixed"}),
        (Looks(1, 100), 100, {"mode": "looks", "looks": (1, 100)}),
        (Mixture(0.5, 0.7), 100, {"mode": "anytime", "prior": (0.5, 0.7)}),
        (Sequential(40, 100), 43, {"mode": "sequential", "looks": (40, 100)}),
        (Sequential(10, 10), 10, {"mode": "sequential", "looks": (10, 10)}),
    ],
)
def test_a_row_holds_the_bound_of_its_certificate(bound, n, held):
    options = {"alpha": 0.01, "sigma": 0.25, "bound": bound}
    if isinstance(bound, Sequential):
        c = Certificate.from_proofs(3, {3: 9}, {3: n}, [Proof(0.1, n, n)], **options)
    else:
        c = Certificate.from_counts({3: 9}, {3: n}, **options)
    made = CertifyRow.of(0, 3, c)
    wanted = {"mode": "fixed", "looks": None, "prior": None, "seconds": 0.0} | held
    assert {name: getattr(made, name) for name in wanted} == wanted
    assert made.bound == bound
    assert made.certificate == c


def test_a_folder_may_hold_logs_of_several_kinds(tmp_path):
    write(tmp_path, row(0))
    with Run(tmp_path, ATTACK, {}):
        pass
    logs = read_logs(tmp_path, CERTIFY, PREDICT, ATTACK)
    assert {file.name: type(log) for file, log in logs.items()} == {
        "certify.jsonl": Log,
        "attack.jsonl": AttackLog,
    }
    assert list(read_logs(tmp_path / "certify.jsonl")) == [tmp_path / "certify.jsonl"]
    log = logs[tmp_path / "certify.jsonl"]
    assert dataclasses.replace(log, begun="at another time") == log


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"images": 3}, "incomplete: 2 of 3 images"),
        ({"images": 4, "shard": "1/2"}, "shard 1/2: 2 of 4 images"),
        ({"images": 2}, None),
        ({}, None),
    ],
)
def test_a_log_that_lacks_images_says_so(tmp_path, capsys, settings, said):
    """A share of a few images of a run looks like one of all in a table."""
    with Run(tmp_path, CERTIFY, settings) as run:
        run.append([row(0), row(1)])
    assert [said in notice for notice in read_log(tmp_path).notices] == [True] * (said is not None)
    for command in (["table"], ["report"], ["plot", "-o", str(tmp_path / "p.svg")]):
        assert main([*command, str(tmp_path)]) == 0
        shown = "".join(capsys.readouterr())
        assert said in shown if said else "images;" not in shown


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
    path.write_text("\n".join([HEADERS["certify"], *rows[:1], "1\t5\t5\t0.2\t0\t1.0"]) + "\n")
    (notice,) = read_log(path).notices
    assert "1 rows; recomputed" in notice


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
