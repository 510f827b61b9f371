"""The command line as a user runs it: real processes, real signals, real full disks."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from art_denoised import load_denoiser, save_denoiser
from art_denoised.cli import main
from art_denoised.evaluation.logs import read_log

ROOT = Path(__file__).parent.parent
MODEL = "art_denoised.demo:digits_classifier"
DENOISER = "art_denoised.demo:digits_denoiser"


def certify_args(out: Path, **changes: object) -> list[str]:
    options: dict[str, object] = {
        "model": MODEL,
        "data": "digits",
        "sigma": 0.25,
        "n": 100,
        "max": 4,
        "out": out,
    }
    options |= changes
    given = {name: value for name, value in options.items() if value is not None}
    words = [(f"--{name.replace('_', '-')}", str(value)) for name, value in given.items()]
    return ["certify", "--quiet", *(word for pair in words for word in pair)]


def process(*arguments: str, **options: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= options.pop("env", {})  # type: ignore[arg-type]
    return subprocess.Popen(
        [sys.executable, "-m", "art_denoised", *arguments],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env=environment,
        **options,  # type: ignore[call-overload]
    )


def test_certify_writes_rows_and_table_reads_them(tmp_path, capsys):
    assert main([*certify_args(tmp_path, denoiser=DENOISER, max=8), "--tsv"]) == 0
    assert "certify.jsonl" in capsys.readouterr().out
    ours, theirs = read_log(tmp_path / "certify.jsonl"), read_log(tmp_path / "certify.tsv")
    assert [row.idx for row in ours.rows] == list(range(8))
    assert [(r.label, r.predict, r.radius) for r in ours.rows] == [
        (r.label, r.predict, r.radius) for r in theirs.rows
    ]
    assert main(["table", str(tmp_path / "certify.jsonl"), "--radii", "0,0.25", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    expected = np.mean([row.correct and row.radius >= 0.25 for row in ours.rows])
    assert [set(entry) for entry in table] == [{"radius", "certified_accuracy", "low", "high"}] * 2
    assert table[1]["radius"] == 0.25
    assert table[1]["certified_accuracy"] == pytest.approx(expected)
    assert main(["table", str(tmp_path / "certify.tsv"), "--radii", "0,0.25", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == table


def test_table_of_several_logs_names_them(tmp_path, capsys):
    for name in ("a", "b"):
        main(certify_args(tmp_path / name))
    logs = [str(tmp_path / name / "certify.jsonl") for name in ("a", "b")]
    capsys.readouterr()
    assert main(["table", *logs, "--radii", "0", "--json"]) == 0
    assert [entry["log"] for entry in json.loads(capsys.readouterr().out)] == logs


def test_skip_and_max_choose_images(tmp_path):
    assert main(certify_args(tmp_path, skip=7, max=3)) == 0
    assert [row.idx for row in read_log(tmp_path / "certify.jsonl").rows] == [0, 7, 14]


def test_predict(tmp_path, capsys):
    words = certify_args(tmp_path)
    words[0] = "predict"
    assert main([*words, "--tsv"]) == 0
    assert "4 images" in capsys.readouterr().out
    log = read_log(tmp_path / "predict.jsonl")
    assert log.kind == "predict"
    assert [r.predict for r in log.rows] == [
        r.predict for r in read_log(tmp_path / "predict.tsv").rows
    ]


def test_plot(tmp_path):
    main(certify_args(tmp_path))
    assert main(["plot", str(tmp_path / "certify.jsonl"), "-o", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("mode", [{"n": 300}, {"n": 2000, "radii": "0,0.25,0.5"}], ids=str)
def test_rows_do_not_depend_on_batch_size_or_sigkill(tmp_path, mode):
    """Batch sizes 1 and 64, and a run killed half way, end in identical rows."""
    settings = {"model": "tests.nets:slow", "max": 6, "denoiser": DENOISER, **mode}
    for size in (1, 64):
        assert main(certify_args(tmp_path / str(size), batch_size=size, **settings)) == 0
    killed = tmp_path / "killed" / "certify.jsonl"
    run = process(
        *certify_args(killed.parent, batch_size=32, **settings), env={"SLOW_SECONDS": "0.05"}
    )
    deadline = time.monotonic() + 60
    while not killed.exists() or killed.read_bytes().count(b"\n") < 3:
        assert time.monotonic() < deadline
        assert run.poll() is None, run.communicate()
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert len(read_log(killed).rows) < 6
    assert main([*certify_args(killed.parent, **settings), "--resume"]) == 0
    one, many, resumed = (
        read_log(tmp_path / name / "certify.jsonl") for name in ("1", "64", "killed")
    )
    assert one.rows == many.rows == resumed.rows
    assert one.settings == many.settings == resumed.settings


def test_a_table_of_radii_costs_a_fraction_and_says_so(tmp_path, capsys):
    options = {"denoiser": DENOISER, "n": 3000, "max": 20}
    assert main(certify_args(tmp_path / "all", **options)) == 0
    assert "62,000 samples for 20 images" in capsys.readouterr().out
    assert main(certify_args(tmp_path / "table", **options, radii="0.25,0.0")) == 0
    printed = capsys.readouterr().out
    logs = [str(tmp_path / name / "certify.jsonl") for name in ("all", "table")]
    rows = {log: read_log(log).rows for log in logs}
    drawn = sum(row.certificate.n0 + row.certificate.drawn for row in rows[logs[1]])
    assert f"{drawn:,} samples for 20 images" in printed
    assert drawn < 60_000 / 3
    assert re.search(r"images +r=0 +r=0.25 +abstain", printed)  # the radii asked for, no others
    shares = []
    for log in logs:
        assert main(["table", log, "--radii", "0,0.25", "--json"]) == 0
        shares.append([e["certified_accuracy"] for e in json.loads(capsys.readouterr().out)])
    assert shares[0] == pytest.approx(shares[1], abs=0.051)
    assert main(["table", logs[1], "--radii", "0,0.5"]) == 0
    assert "lower bounds" in capsys.readouterr().err
    assert main(["plot", logs[1], "-o", str(tmp_path / "plot.png")]) == 0
    assert "lower bounds" in capsys.readouterr().err
    for log, told in ((logs[0], False), (logs[1], True)):  # of the mean radius
        assert main(["table", log]) == 0
        assert ("A lower bound where" in capsys.readouterr().out) == told
    assert main([*certify_args(tmp_path / "one", **options), "--at-radius", "0.25"]) == 0
    one = read_log(tmp_path / "one" / "certify.jsonl")
    assert one.settings["radii"] == [0.25]
    assert sum(row.certificate.drawn for row in one.rows) <= drawn


def test_images_that_are_wrong_are_sampled_only_on_request(tmp_path):
    options = {"sigma": 0.5, "n": 500, "max": 20, "radii": "0.25"}
    main(certify_args(tmp_path / "labels", **options))
    main([*certify_args(tmp_path / "all", **options), "--all-images"])
    labels, everything = (
        read_log(tmp_path / name / "certify.jsonl").rows for name in ("labels", "all")
    )
    assert any(row.certificate.n == 0 for row in labels)
    assert all(row.certificate.n > 0 for row in everything)
    right = [(a, b) for a, b in zip(labels, everything, strict=True) if a.certificate.n]
    assert all(a == b for a, b in right)


def test_a_deadline_survives_sigkill_and_is_tightened(tmp_path, capsys):
    arguments = certify_args(tmp_path, model="tests.nets:slow", max=5, n=20000, batch_size=50)
    run = process(*arguments, "--deadline", "10m", env={"SLOW_SECONDS": "0.02"})
    log = tmp_path / "certify.jsonl"
    while not log.exists() or log.read_bytes().count(b"\n") < 8:
        assert run.poll() is None, run.communicate()
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    before = {row.idx: row for row in read_log(log).rows}
    assert main([*arguments, "--deadline", "1s", "--resume"]) == 0
    fewer = certify_args(tmp_path, model="tests.nets:slow", max=2, n=20000, batch_size=50)
    assert main([*fewer, "--deadline", "1s", "--resume"]) == 0
    assert "not reached" not in capsys.readouterr().out  # the log holds more images than asked for
    after = read_log(log).rows
    assert [row.idx for row in after] == list(range(5))
    for row in after:
        if row.idx in before:
            assert row.certificate.n >= before[row.idx].certificate.n
    assert main(["verify", str(log)]) == 0


def test_a_preview_costs_no_log(tmp_path, capsys):
    arguments = certify_args(tmp_path / "out", max=30, n=5000, radii="0.25")
    assert main([*arguments, "--preview", "--cost-per-sample", "0.01"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"30 images: about [\d,]+ samples .*fewer.*seconds, cost \d", printed)
    assert not (tmp_path / "out").exists()
    assert main([*certify_args(tmp_path / "out"), "--preview", "--deadline", "9s"]) == 2
    assert_one_line(capsys.readouterr().err)


def test_quantised_noise_and_other_types_are_recorded(tmp_path, capsys):
    x = (DIGITS * 255).round() / 255
    data = npz(tmp_path / "data.npz", x, np.array([0, 1, 2]))
    assert main(certify_args(tmp_path / "q", data=data, max=None, noise="quantised")) == 0
    assert main(["verify", str(tmp_path / "q" / "certify.jsonl")]) == 0
    assert all(
        row.certificate.noise == "quantised"
        for row in read_log(tmp_path / "q" / "certify.jsonl").rows
    )
    for dtype in ("bfloat16", "auto"):
        assert main(certify_args(tmp_path / dtype, dtype=dtype)) == 0
    assert read_log(tmp_path / "bfloat16" / "certify.jsonl").settings["dtype"] == "bfloat16"
    single = certify_args(tmp_path / "single", model="tests.nets:single_precision", dtype="auto")
    assert main(single) == 0
    assert read_log(tmp_path / "single" / "certify.jsonl").settings["dtype"] == "float32"
    capsys.readouterr()
    assert main(certify_args(tmp_path / "no", noise="quantised")) == 2  # sixteen grey levels
    message = capsys.readouterr().err
    assert_one_line(message)
    assert "multiples of 1/255" in message


def test_interrupt_keeps_rows_and_says_how_to_go_on(tmp_path):
    def listen() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where the tests run in background

    run = process(
        *certify_args(tmp_path, model="tests.nets:slow", max=50),
        env={"SLOW_SECONDS": "0.05"},
        preexec_fn=listen,
    )
    log = tmp_path / "certify.jsonl"
    while not log.exists() or log.read_bytes().count(b"\n") < 2:
        assert run.poll() is None, run.communicate()
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=30)
    assert run.returncode == 130
    assert "--resume" in errors
    assert "Traceback" not in errors
    assert read_log(log).rows


def test_full_disk_keeps_rows_and_resumes(tmp_path):
    """A file size limit stands for the full disk: write(2) fails after a few rows."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, resource.RLIM_INFINITY))

    run = process(*certify_args(tmp_path, max=10), preexec_fn=limit)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 2
    assert_one_line(errors)
    kept = read_log(tmp_path / "certify.jsonl").rows
    assert 0 < len(kept) < 10
    assert main([*certify_args(tmp_path, max=10), "--resume"]) == 0
    assert main(certify_args(tmp_path / "whole", max=10)) == 0
    whole = read_log(tmp_path / "whole" / "certify.jsonl").rows
    assert read_log(tmp_path / "certify.jsonl").rows == whole


def test_other_settings_are_refused_not_mixed(tmp_path, capsys):
    main(certify_args(tmp_path))
    before = (tmp_path / "certify.jsonl").read_bytes()
    assert main(certify_args(tmp_path)) == 2
    assert "--resume" in capsys.readouterr().err
    for change in ({"sigma": 0.5}, {"seed": 1}, {"n": 200}, {"model": "tests.nets:slow"}):
        assert main([*certify_args(tmp_path, **change), "--resume"]) == 2
        message = capsys.readouterr().err
        assert_one_line(message)
        assert next(iter(change)) in message
    assert (tmp_path / "certify.jsonl").read_bytes() == before


def npz(path: Path, x: np.ndarray, y: np.ndarray | None = None) -> str:
    np.savez(path, x=x, y=np.zeros(len(x), int) if y is None else y)
    return f"npz:{path}"


DIGITS = (load_digits().images[:3, None] / 16).astype(np.float32)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sigma": -1}, ["sigma", "-1", "positive"]),
        ({"sigma": "nan"}, ["sigma", "nan"]),
        ({"sigma": 64}, ["sigma", "64", "image units"]),
        ({"alpha": 0}, ["alpha", "0.001"]),
        ({"alpha": 0.7}, ["alpha", "0.7"]),
        ({"n": 5}, ["n is 5", "10 samples"]),
        ({"n0": 0}, ["n0", "0"]),
        ({"seed": -1}, ["seed", "-1"]),
        ({"batch_size": 0}, ["batch_size", "0"]),
        ({"skip": 0}, ["skip", "0"]),
        ({"max": 0}, ["max", "0"]),
        ({"n": "many"}, ["--n", "many"]),
        ({"model": "tests.nets"}, ["tests.nets", "package.module:factory"]),
        ({"model": "tests.nets:absent"}, ["absent"]),
        ({"model": "no_such_package:net"}, ["no_such_package"]),
        ({"model": "tests.nets:fails"}, ["no such weights"]),
        ({"model": ".nets:net"}, [".nets:net"]),
        ({"model": "tests.nets:not_a_module"}, ["str", "nn.Module"]),
        ({"model": "tests.nets:training"}, ["training mode", "model.eval()"]),
        ({"model": "tests.nets:colour"}, ["(1, 8, 8)"]),
        ({"model": "tests.nets:nan"}, ["NaN"]),
        ({"model": "tests.nets:three_classes"}, ["label", "out of range", "0 to 2"]),
        ({"denoiser": "missing.safetensors"}, ["missing.safetensors"]),
        ({"data": "digit"}, ["digit", "imagefolder:DIR"]),
        ({"data": "npz:missing.npz"}, ["missing.npz", "does not exist"]),
        ({"data": "imagefolder:missing"}, ["missing", "does not exist"]),
        ({"data": "torchvision:NoSuch:tests"}, ["NoSuch"]),
        ({"data": "torchvision:CIFAR10:tests"}, ["CIFAR10", "tests"]),
        ({"device": "abacus"}, ["abacus"]),
        ({"device": "meta"}, ["meta"]),
        ({"model": "tests.nets:colour", "dtype": "auto"}, ["(1, 8, 8)"]),
        ({"model": "tests.nets:training", "dtype": "auto"}, ["training mode"]),
        ({"noise": "laplace"}, ["laplace", "quantised"]),
        ({"dtype": "float8"}, ["float8", "bfloat16"]),
        ({"at_radius": -0.5}, ["-0.5"]),
        ({"at_radius": "nan"}, ["nan"]),
        ({"radii": "0,-1"}, ["0,-1"]),
        ({"radii": "0", "at_radius": 1}, ["--at-radius", "--radii"]),
        ({"deadline": "soon"}, ["soon", "10m"]),
        ({"deadline": "0s"}, ["0s"]),
        ({"batch_size": "big"}, ["big", "auto"]),
    ],
    ids=lambda value: (
        "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else ""
    ),
)
def test_bad_options(tmp_path, capsys, changes, words):
    assert exit_code(certify_args(tmp_path / "out", **changes)) == 2
    message = capsys.readouterr().err
    assert_one_line(message)
    for word in words:
        assert word in message
    log = tmp_path / "out" / "certify.jsonl"  # the next try must not find a run of this one
    assert not log.exists() or "label" in message


@pytest.mark.parametrize(
    ("source", "words"),
    [("def net(:", ["SyntaxError"]), ("1 / 0", ["ZeroDivisionError"]), ("open('gone')", ["gone"])],
)
def test_modules_that_fail_when_imported(tmp_path, monkeypatch, capsys, source, words):
    name = f"broken_{words[0].lower()}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert exit_code(certify_args(tmp_path / "out", model=f"{name}:net")) == 2
    message = capsys.readouterr().err
    assert_one_line(message)
    for word in [name, "cannot be imported", *words]:
        assert word in message


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (DIGITS * 255, None, ["255", "divide by 255"]),
        ((DIGITS * 255).astype(np.uint8), None, ["uint8", "255"]),
        (np.where(DIGITS > 0.9, np.nan, DIGITS), None, ["NaN"]),
        (DIGITS[:, 0], None, ["(3, 8, 8)"]),
        (DIGITS[:0], None, ["no images"]),
        (DIGITS, np.array([0, 1, 10]), ["image 2", "label 10", "0 to 9"]),
        (DIGITS, np.array([0, 1, -1]), ["label -1"]),
        (DIGITS, np.eye(3), ["labels", "one integer"]),
        (DIGITS, np.zeros(2, int), ["3 images", "2 labels"]),
        (DIGITS.astype(object), None, ["pickle"]),
    ],
    ids=[
        "0..255",
        "uint8",
        "nan",
        "3d",
        "empty",
        "label",
        "negative",
        "one-hot",
        "count",
        "object",
    ],
)
def test_bad_data(tmp_path, capsys, x, y, words):
    data = npz(tmp_path / "data.npz", x, y)
    assert main(certify_args(tmp_path / "out", data=data)) == 2
    message = capsys.readouterr().err
    assert_one_line(message)
    for word in words:
        assert word in message


def test_bad_image_in_the_middle_keeps_the_rows_before_it(tmp_path, capsys):
    data = npz(tmp_path / "data.npz", DIGITS, np.array([0, 1, 12]))
    assert main(certify_args(tmp_path / "out", data=data)) == 2
    assert len(read_log(tmp_path / "out" / "certify.jsonl").rows) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["table", "missing.jsonl"], ["missing.jsonl"]),
        (["table", "README.md"], ["README.md"]),
        (["table", "x", "--radii", "a"], ["radii", "'a'"]),
        (["table", "x", "--radii", "-1"], ["radii"]),
        (["plot", "README.md", "-o", "a.png"], ["README.md"]),
        (["verify", "README.md"], ["README.md"]),
        (["verify", "missing.jsonl"], ["missing.jsonl"]),
        (["verify", "README.md", "--family-images", "9"], ["--family-alpha", "both"]),
        (["frobnicate"], ["frobnicate"]),
        (["certify"], ["--model"]),
        (["demo", "--images", "0"], ["images"]),
    ],
)
def test_bad_commands(capsys, arguments, words):
    assert exit_code(arguments) == 2
    message = capsys.readouterr().err
    assert_one_line(message)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "command",
    [
        "certify",
        "predict",
        "train-denoiser",
        "train-diffusion",
        "train-robust",
        "table",
        "plot",
        "verify",
        "demo",
        None,
    ],
)
def test_help_is_a_page(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"] if command else ["--help"])
    assert stop.value.code == 0
    assert len(capsys.readouterr().out) > 400


def test_demo_shows_what_the_denoiser_is_for(tmp_path, capsys):
    """A small demo; the packaged one (200 images) is run by the README test."""
    assert main(["demo", "--out", str(tmp_path), "--images", "25", "--n", "100"]) == 0
    assert "with denoiser" in capsys.readouterr().out

    def accuracy(how: str, sigma: str) -> float:
        rows = read_log(tmp_path / f"sigma-{sigma}-{how}-denoiser" / "certify.jsonl").rows
        return float(np.mean([row.correct for row in rows]))

    for sigma in ("0.25", "0.5"):
        assert accuracy("with", sigma) > accuracy("without", sigma) + 0.2
    assert (tmp_path / "certified_accuracy.png").exists()
    assert (tmp_path / "table.txt").exists()
    assert main(["demo", "--out", str(tmp_path), "--images", "25", "--n", "100"]) == 2


def exit_code(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)


def assert_one_line(message: str) -> None:
    assert message.startswith("art-denoised")
    assert message.count("\n") == 1
    assert "Traceback" not in message


def train_args(out: Path, **changes: object) -> list[str]:
    options: dict[str, object] = {
        "objective": "stability",
        "classifier": MODEL,
        "data": "digits",
        "sigma": 0.25,
        "architecture": "dncnn:4:12",
        "epochs": 2,
        "augment": "crop",
        "out": out,
    }
    options |= changes
    given = {name: value for name, value in options.items() if value is not None}
    words = [(f"--{name.replace('_', '-')}", str(value)) for name, value in given.items()]
    return ["train-denoiser", "--quiet", *(word for pair in words for word in pair)]


def test_a_denoiser_is_trained_and_certified_with(tmp_path, capsys):
    arguments = train_args(tmp_path, holdout="digits", epochs=6, rate=0.005, average=0.9)
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert re.search(r"epoch 6, loss [\d.]+, mse [\d.]+, accuracy 0\.\d+", printed)
    denoiser = tmp_path / "denoiser.safetensors"
    first = denoiser.read_bytes()
    log = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in log[1:]] == [1, 2, 3, 4, 5, 6]
    assert log[0]["settings"]["objective"] == "stability"
    assert main([*arguments, "--resume"]) == 0
    assert denoiser.read_bytes() == first
    assert main(certify_args(tmp_path / "with", denoiser=denoiser, max=30)) == 0
    assert main(certify_args(tmp_path / "without", max=30)) == 0
    accuracy = [
        sum(row.correct for row in read_log(tmp_path / run / "certify.jsonl").rows)
        for run in ("with", "without")
    ]
    assert accuracy[0] > accuracy[1]


def test_hybrid_and_surrogates_from_the_command_line(tmp_path, capsys):
    half = tmp_path / "half.safetensors"
    surrogates = ["--surrogate", "tests.nets:surrogate", "--surrogate", "tests.nets:three_classes"]
    arguments = train_args(tmp_path, objective="hybrid", epochs=1, fine_epochs=1, sigma="0.1,0.5")
    assert main([*arguments, *surrogates]) == 0
    assert (tmp_path / "mse" / "train.jsonl").exists()
    settings = json.loads((tmp_path / "stability" / "train.jsonl").read_text().splitlines()[0])
    assert len(settings["settings"]["classifiers"]) == 2
    save_denoiser(load_denoiser(tmp_path / "denoiser.safetensors").half(), half)
    again = train_args(tmp_path / "2", architecture=half, epochs=1, bf16="off")
    assert main(again) == 0  # go on from a checkpoint, in float32
    trained = tmp_path / "2" / "denoiser.safetensors"
    assert next(load_denoiser(trained).parameters()).dtype == torch.float32
    before = trained.read_bytes()
    capsys.readouterr()
    assert main(train_args(tmp_path / "2", objective="hybrid", epochs=1)) == 2
    assert "denoiser.safetensors already exists; pass --resume" in capsys.readouterr().err
    assert trained.read_bytes() == before
    blind = train_args(tmp_path / "blind", classifier=None, epochs=1, bf16="off")
    assert main([*blind, *surrogates[:2], "--holdout", "digits", "--holdout-max", "9"]) == 0
    assert "accuracy is that of the first surrogate" in capsys.readouterr().err
    assert main([*train_args(tmp_path / "3"), "--surrogate", MODEL]) == 2
    message = capsys.readouterr().err
    assert_one_line(message)
    assert "among the surrogates" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objective": "l1"}, "objective is 'l1'"),
        ({"classifier": None}, "needs a classifier"),
        ({"classifier": "tests.nets:training"}, "training mode"),
        ({"sigma": "0.5,0.1"}, "lower one first"),
        ({"sigma": "a"}, "no noise level"),
        ({"architecture": "dncnn:a:b"}, "--architecture"),
        ({"architecture": "unet.bin"}, "unet.bin"),
        ({"architecture": "tests.nets:plain_denoiser"}, "_Plain is not DnCNN, MemNet"),
        ({"architecture": "tests.nets:colour_denoiser"}, "denoiser failed on an image of shape"),
        ({"classifier": "tests.nets:colour"}, "model failed on an image of shape (1, 8, 8)"),
        ({"classifier": "tests.nets:three_classes", "objective": "classification"}, "0 to 2"),
        ({"seed": 2**64}, "below 2^64"),
        ({"fine_epochs": -3}, "leave it out"),
        ({"bf16": "yes"}, "'yes' is no setting; give auto, on or off"),
        ({"epochs": 0}, "epochs is 0"),
        ({"schedule": "linear"}, "schedule is 'linear'"),
        ({"data": "mnist"}, "mnist"),
    ],
)
def test_bad_trainings(tmp_path, capsys, changes, words):
    try:
        code = main(train_args(tmp_path / "out", **changes))
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    message = capsys.readouterr().err
    assert_one_line(message)
    assert words in message


def test_a_diffusion_model_is_trained_and_loaded(tmp_path, capsys):
    from art_denoised import DiffusionClassifier, load_diffusion
    from art_denoised.data import digits
    from art_denoised.diffusion.weights import noise_levels

    words = [
        "train-diffusion",
        "--quiet",
        "--data",
        "digits",
        "--augment",
        "none",
        "--rate",
        "0.004",
    ]
    words += ["--widths", "16,32", "--average", "0.95", "--out"]
    options = ["--classes", "10", "--epochs", "8", "--batch-size", "64"]
    assert main([*words, str(tmp_path / "a"), *options]) == 0
    assert "loss 0." in capsys.readouterr().out
    model = load_diffusion(tmp_path / "a", classes=10)
    classifier = DiffusionClassifier(model, levels=noise_levels(4), seed=0)
    data = [digits(train=False)[i] for i in range(100)]
    x, y = torch.stack([x for x, _ in data]), torch.tensor([y for _, y in data])
    with torch.no_grad():
        assert (classifier(x).argmax(1) == y).double().mean() > 0.5
    more = ["--init", str(tmp_path / "a"), "--rate", "1e-9", "--classes", "10", "--epochs", "1"]
    assert main([*words, str(tmp_path / "more"), *more]) == 0
    again = load_diffusion(tmp_path / "more", classes=10)
    assert torch.allclose(again(x, 0.5, y), model(x, 0.5, y), atol=1e-4)
    assert main([*words, str(tmp_path / "b"), "--epochs", "1"]) == 0  # unconditional: a denoiser
    assert main(certify_args(tmp_path / "c", denoiser=tmp_path / "b", max=1, n=20)) == 0
    oblong = npz(tmp_path / "oblong.npz", np.zeros((8, 1, 8, 6)))
    capsys.readouterr()
    assert main([*words, str(tmp_path / "e"), "--data", oblong, "--epochs", "1"]) == 2
    assert "the images are 8 x 6; the U-Net takes square ones" in capsys.readouterr().err
    for bad in (["--widths", "12"], ["--widths", "8,8,8,8,8"], ["--drop", "1"], ["--widths", "a"]):
        capsys.readouterr()
        try:
            code = main([*words, str(tmp_path / "d"), *bad, "--epochs", "1"])
        except SystemExit as stop:
            code = stop.code
        assert code == 2
        assert_one_line(capsys.readouterr().err)
