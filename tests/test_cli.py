"""The command line as a user runs it: real processes, real signals, real full disks."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

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


def test_rows_do_not_depend_on_batch_size_or_sigkill(tmp_path):
    """Batch sizes 1 and 64, and a run killed half way, end in identical rows."""
    settings = {"model": "tests.nets:slow", "n": 300, "max": 6, "denoiser": DENOISER}
    for size in (1, 64):
        assert main(certify_args(tmp_path / str(size), batch_size=size, **settings)) == 0
    killed = tmp_path / "killed" / "certify.jsonl"
    run = process(*certify_args(killed.parent, **settings), env={"SLOW_SECONDS": "0.05"})
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


@pytest.mark.parametrize("command", ["certify", "predict", "table", "plot", "demo", None])
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
