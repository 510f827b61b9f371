"""The commands `certify`, `predict` and `demo`: real processes, real signals, real full disks."""

from __future__ import annotations

import os
import resource
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from art_denoised.cli import main
from art_denoised.evaluation import read_log
from tests.cli.command import DENOISER, MODEL, certify, refusal, words
from tests.forked import forked

DIGITS = (load_digits().images[:3, None] / 16).astype(np.float32)


def npz(path: Path, x: np.ndarray, y: np.ndarray | None = None) -> str:
    np.savez(path, x=x, y=np.zeros(len(x), int) if y is None else y)
    return f"npz:{path}"


def log_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_both_logs_hold_the_same_rows(tmp_path, capsys):
    assert main(certify(tmp_path, "--tsv", denoiser=DENOISER, max=8)) == 0
    heard = capsys.readouterr()
    assert str(tmp_path / "certify.jsonl") in heard.out
    ours, theirs = read_log(tmp_path / "certify.jsonl"), read_log(tmp_path / "certify.tsv")
    assert [(r.index, r.label, r.prediction) for r in ours.rows] == [
        (r.index, r.label, r.prediction) for r in theirs.rows
    ]
    assert [r.radius for r in ours.rows] == pytest.approx([r.radius for r in theirs.rows], abs=1e-6)
    samples = sum(row.n0 + row.drawn for row in ours.rows)
    assert f"{samples:,} samples for 8 images" in heard.out


def test_the_base_is_looked_at_first(tmp_path, capsys):
    assert main(certify(tmp_path, max=8, batch_size=None)) == 0
    assert read_log(tmp_path).settings["batch_size"] >= 1  # the fastest
    notice = capsys.readouterr().err
    assert "of the first 8 images" in notice
    assert "sigma = 0.25" in notice


def test_a_limit_takes_a_sample_of_all_images(tmp_path, capsys):
    """On data sorted by class, so that the first images are of one class."""
    x = np.concatenate([DIGITS[:1]] * 30 + [DIGITS[1:2]] * 30)
    data = npz(tmp_path / "data.npz", x, np.repeat([0, 1], 30))
    assert main(certify(tmp_path / "a", data=data, max=10)) == 0
    log = read_log(tmp_path / "a" / "certify.jsonl")
    assert {row.label for row in log.rows} == {0, 1}
    assert (log.settings["skip"], log.settings["max"]) == (1, 10)
    assert "label" not in capsys.readouterr().err
    assert main(certify(tmp_path / "b", data=data, max=20, skip=2)) == 0
    assert all(row.index % 2 == 0 for row in read_log(tmp_path / "b" / "certify.jsonl").rows)


def test_a_run_of_one_class_says_so(tmp_path, capsys):
    data = npz(tmp_path / "data.npz", DIGITS)
    assert main(certify(tmp_path / "a", data=data, max=None)) == 0
    assert "all 3 images are of class 0" in capsys.readouterr().err


def test_predict(tmp_path, capsys):
    arguments = certify(tmp_path, "--tsv")
    arguments[0] = "predict"
    assert main(arguments) == 0
    assert "of 4 images" in capsys.readouterr().out
    log = read_log(tmp_path / "predict.jsonl")
    assert log.kind == "predict"
    theirs = read_log(tmp_path / "predict.tsv").rows
    assert [r.prediction for r in log.rows] == [r.prediction for r in theirs]


@pytest.mark.parametrize("mode", [{"n": 60}, {"n": 150, "radii": "0,0.25"}], ids=str)
def test_rows_do_not_depend_on_batch_size_or_sigkill(tmp_path, mode):
    """Batch sizes 1 and 64, and a run killed half way, end in identical rows."""
    settings = {"model": "tests.nets:slow", "max": 4, "n0": 10, "denoiser": DENOISER, **mode}
    for size in (1, 64):
        assert main(certify(tmp_path / str(size), batch_size=size, **settings)) == 0
    killed = tmp_path / "killed" / "certify.jsonl"
    arguments = certify(killed.parent, batch_size=32, **settings)
    kill_at(2, killed, forked(main, arguments, environment={"SLOW_SECONDS": "0.3"}))
    assert len(read_log(killed).rows) < 4
    assert main(certify(killed.parent, "--resume", batch_size=None, **settings)) == 0
    one, many, resumed = (
        read_log(tmp_path / name / "certify.jsonl") for name in ("1", "64", "killed")
    )
    assert one.rows == many.rows == resumed.rows  # float32: no near tie among so few samples
    sizes = [log.settings["batch_size"] for log in (one, many, resumed)]
    assert sizes == [1, 64, 32]  # a resumed run keeps its own
    of_passes = {"batch_size", "near_ties"}
    assert len({str({k: v for k, v in log.settings.items() if k not in of_passes})
                for log in (one, many, resumed)}) == 1  # fmt: skip


def test_an_optimized_network_is_certified_and_attacked(tmp_path):
    """By workers too; the header says so."""
    options = {"optimize": "fold", "dtype": "bfloat16", "denoiser": DENOISER, "batch_size": 50}
    for name, flags in (("one", ()), ("two", ("--workers", "2"))):
        assert main(certify(tmp_path / name, *flags, **options)) == 0
    one, two = (read_log(tmp_path / name) for name in ("one", "two"))
    assert {row.index: row for row in one.rows} == {row.index: row for row in two.rows}
    assert (one.settings["optimize"], one.settings["dtype"]) == ("fold", "bfloat16")
    attacked = {"data": "digits", "max": 4, "eps": 0.1, "attacks": "pgd:steps=2", "sigma": 0.25}
    model = {"model": MODEL, "denoiser": DENOISER, "optimize": "fold", "samples": 2}
    arguments = words("attack", "--quiet", "--no-checks", out=tmp_path / "a", **attacked, **model)
    assert main(arguments) == 0
    assert '"optimize": "fold"' in (tmp_path / "a" / "attack.jsonl").read_text()


def wait_for_lines(run, log: Path, lines: int) -> None:
    while log_lines(log) < lines:
        assert run.is_alive(), run.exitcode
        time.sleep(0.01)


def kill_at(lines: int, log: Path, run) -> None:
    wait_for_lines(run, log, lines)
    run.kill()
    run.join()
    assert run.exitcode == -signal.SIGKILL


def test_a_table_of_radii_costs_a_fraction_and_says_so(tmp_path, capsys):
    options = {"n": 1500, "max": 10}
    assert main(certify(tmp_path / "all", **options)) == 0
    assert "16,000 samples for 10 images" in capsys.readouterr().out
    assert main(certify(tmp_path / "table", **options, radii="0.25,0.0")) == 0
    printed = capsys.readouterr().out
    rows = read_log(tmp_path / "table" / "certify.jsonl").rows
    drawn = sum(row.n0 + row.drawn for row in rows)
    assert f"{drawn:,} samples for 10 images" in printed
    assert drawn < 16_000 / 2
    one = certify(tmp_path / "one", **options, radii="0.25")
    assert main(one) == 0
    log = read_log(tmp_path / "one" / "certify.jsonl")
    assert log.settings["radii"] == [0.25]
    assert sum(row.drawn for row in log.rows) <= drawn


def test_images_that_are_wrong_are_sampled_only_on_request(tmp_path):
    options = {"sigma": 0.5, "n": 500, "max": 20, "radii": "0.25"}
    main(certify(tmp_path / "labels", **options))
    main(certify(tmp_path / "all", "--all-images", **options))
    labels, everything = (
        read_log(tmp_path / name / "certify.jsonl").rows for name in ("labels", "all")
    )
    assert any(row.n == 0 for row in labels)
    assert all(row.n > 0 for row in everything)
    right = [(a, b) for a, b in zip(labels, everything, strict=True) if a.n]
    assert all(a == b for a, b in right)


def test_a_deadline_survives_sigkill_and_is_tightened(tmp_path):
    options = {"model": "tests.nets:slow", "max": 5, "n": 20000, "batch_size": 50}
    arguments = certify(tmp_path, **options, deadline="10m")
    log = tmp_path / "certify.jsonl"
    kill_at(8, log, forked(main, arguments, environment={"SLOW_SECONDS": "0.02"}))
    before = {row.index: row for row in read_log(log).rows}
    assert main(certify(tmp_path, "--resume", **options, deadline="1s")) == 0
    after = read_log(log).rows
    assert len(after) == 5
    for row in after:
        if row.index in before:
            assert row.n >= before[row.index].n
    assert main(["verify", str(log)]) == 0


def test_a_preview_costs_no_log(tmp_path, capsys):
    options = {"max": 30, "n": 5000, "radii": "0.25"}
    assert main(certify(tmp_path / "out", "--preview", **options)) == 0
    printed = capsys.readouterr().out
    for value in ("30 images", "samples", "100 an image"):
        assert value in printed
    assert not (tmp_path / "out").exists()


def test_quantised_noise_and_other_types_are_recorded(tmp_path, capsys):
    x = (DIGITS * 255).round() / 255
    data = npz(tmp_path / "data.npz", x, np.array([0, 1, 2]))
    assert main(certify(tmp_path / "q", data=data, max=None, noise="quantised")) == 0
    assert main(["verify", str(tmp_path / "q" / "certify.jsonl")]) == 0
    rows = read_log(tmp_path / "q" / "certify.jsonl").rows
    assert all(row.noise == "quantised" for row in rows)
    assert main(certify(tmp_path / "b", dtype="bfloat16")) == 0
    assert read_log(tmp_path / "b" / "certify.jsonl").settings["dtype"] == "bfloat16"
    message = refusal(capsys, certify(tmp_path / "no", noise="quantised"))  # sixteen grey levels
    assert "1/255" in message


def test_interrupt_keeps_rows_and_says_how_to_continue(tmp_path):
    log, errors = tmp_path / "out" / "certify.jsonl", tmp_path / "errors"
    arguments = certify(log.parent, model="tests.nets:slow", max=50)
    run = forked(main, arguments, environment={"SLOW_SECONDS": "0.05"}, errors=errors)
    wait_for_lines(run, log, 2)
    os.kill(run.pid, signal.SIGINT)
    run.join(timeout=30)
    assert run.exitcode == 130
    assert "--resume" in errors.read_text()
    assert "Traceback" not in errors.read_text()
    assert read_log(log).rows


def test_full_disk_keeps_rows_and_resumes(tmp_path):
    """A file size limit stands for the full disk: write(2) fails after a few rows."""
    out, errors, limit = tmp_path / "out", tmp_path / "errors", (4000, resource.RLIM_INFINITY)
    restrict = partial(resource.setrlimit, resource.RLIMIT_FSIZE, limit)
    run = forked(main, certify(out, max=20), errors=errors, prepare=restrict)
    run.join(timeout=60)
    assert run.exitcode == 2
    assert "Traceback" not in errors.read_text()
    assert str(out / "certify.jsonl") in errors.read_text().splitlines()[-1]
    kept = read_log(out / "certify.jsonl").rows
    assert 0 < len(kept) < 20
    assert main(certify(out, "--resume", max=20)) == 0
    assert main(certify(tmp_path / "whole", max=20)) == 0
    whole = read_log(tmp_path / "whole" / "certify.jsonl").rows
    assert read_log(out / "certify.jsonl").rows == whole


def test_other_settings_are_refused_not_mixed(tmp_path, capsys):
    main(certify(tmp_path))
    before = (tmp_path / "certify.jsonl").read_bytes()
    # Known before the network is looked for.
    assert "--resume" in refusal(capsys, certify(tmp_path, model="no.such:network"))
    for change in ({"sigma": 0.5}, {"seed": 1}, {"n": 200}, {"model": "tests.nets:slow"}):
        message = refusal(capsys, certify(tmp_path, "--resume", **change))
        assert next(iter(change)) in message
    assert (tmp_path / "certify.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "values"),
    [
        ({"sigma": -1}, ["sigma", "-1"]),
        ({"sigma": "nan"}, ["sigma", "nan"]),
        ({"sigma": 64}, ["sigma", "64", "64/255"]),
        ({"alpha": 0}, ["alpha", "0.001"]),
        ({"alpha": 0.7}, ["alpha", "0.7"]),
        ({"n": 5}, ["n is 5", "10 samples"]),
        ({"n": 0}, ["n is 0"]),
        ({"n": 120.5}, ["--n", "120.5"]),
        ({"workers": 1.5}, ["--workers", "1.5"]),
        ({"batch_size": 1.5}, ["--batch-size", "1.5"]),
        ({"n0": 0}, ["n0", "0"]),
        ({"seed": -1}, ["seed", "-1"]),
        ({"batch_size": 0}, ["batch_size", "0"]),
        ({"skip": 0}, ["skip", "0"]),
        ({"max": 0}, ["max", "0"]),
        ({"n": "many"}, ["--n", "many"]),
        ({"model": "tests.nets"}, ["tests.nets", "package.module:function"]),
        ({"model": "tests.nets:absent"}, ["absent"]),
        ({"model": "no_such_package:net"}, ["no_such_package"]),
        ({"model": "tests.nets:fails"}, ["no such weights"]),
        ({"model": ".nets:net"}, [".nets:net"]),
        ({"model": "tests.nets:not_a_module"}, ["str"]),
        ({"model": "tests.nets:training"}, ["model.eval()"]),
        ({"model": "tests.nets:colour"}, ["(1, 8, 8)"]),
        ({"model": "tests.nets:nan"}, ["NaN"]),
        ({"model": "tests.nets:three_classes"}, ["label", "0 to 2"]),
        ({"denoiser": "missing.safetensors"}, ["missing.safetensors"]),
        ({"data": "digit"}, ["digit", "imagefolder:DIR"]),
        ({"data": "npz:missing.npz"}, ["missing.npz"]),
        ({"data": "imagefolder:missing"}, ["missing"]),
        ({"data": "torchvision:NoSuch:tests"}, ["NoSuch"]),
        ({"data": "torchvision:CIFAR10:tests"}, ["CIFAR10", "tests"]),
        ({"device": "abacus"}, ["abacus"]),
        ({"device": "meta"}, ["meta"]),
        ({"noise": "laplace"}, ["laplace", "quantised"]),
        ({"dtype": "float8"}, ["float8", "bfloat16"]),
        ({"dtype": "auto"}, ["auto", "bfloat16"]),
        ({"radii": "0,-1"}, ["--radii", "-1"]),
        ({"radii": "0", "deadline": "9s"}, ["--radii", "--deadline"]),
        ({"deadline": "soon"}, ["soon", "10m"]),
        ({"deadline": "0s"}, ["0s"]),
        ({"batch_size": "big"}, ["big", "auto"]),
        ({"at_radius": "0.5"}, ["--at-radius"]),
    ],
    ids=str,
)
def test_bad_options(tmp_path, capsys, changes, values):
    message = refusal(capsys, certify(tmp_path / "out", **changes))
    for value in values:
        assert value in message
    log = tmp_path / "out" / "certify.jsonl"  # the next try must not find a run of this one
    assert not log.exists() or "label" in message


@pytest.mark.parametrize("out", ["/proc/self", "/dev/null", "/proc/none"])
def test_folders_that_cannot_be_written(capsys, out):
    message = refusal(capsys, certify(Path(out)))
    assert out in message
    assert "choose another folder" in message
    assert "process" not in message


def test_a_preview_needs_no_deadline(tmp_path, capsys):
    message = refusal(capsys, certify(tmp_path, "--preview", deadline="9s"))
    assert "--preview" in message


@pytest.mark.parametrize(
    ("source", "values"),
    [("def net(:", ["SyntaxError"]), ("1 / 0", ["ZeroDivisionError"]), ("open('gone')", ["gone"])],
)
def test_modules_that_fail_when_imported(tmp_path, monkeypatch, capsys, source, values):
    name = f"broken_{values[0].lower()}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    message = refusal(capsys, certify(tmp_path / "out", model=f"{name}:net"))
    for value in [name, *values]:
        assert value in message


@pytest.mark.parametrize(
    ("x", "y", "values"),
    [
        (DIGITS * 255, None, ["255"]),
        (np.where(DIGITS > 0.9, np.nan, DIGITS), None, ["NaN"]),
        (DIGITS[:, 0], None, ["(3, 8, 8)"]),
        (DIGITS[:0], None, ["no images"]),
        (DIGITS, np.array([0, 1, 10]), ["image 2", "10", "0 to 9"]),
        (DIGITS, np.array([0, 1, -1]), ["label -1"]),
        (DIGITS, np.eye(3), ["labels"]),
        (DIGITS, np.zeros(2, int), ["3 images", "2 labels"]),
        (DIGITS.astype(object), None, ["pickle"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, list) else "",
)
def test_bad_data(tmp_path, capsys, x, y, values):
    data = npz(tmp_path / "data.npz", x, y)
    message = refusal(capsys, certify(tmp_path / "out", data=data))
    for value in values:
        assert value in message
