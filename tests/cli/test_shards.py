"""Several machines and several processes: --shard, --workers and the command merge."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from art_denoised import Cluster, Workers
from art_denoised.__main__ import run as run_program
from art_denoised.cli import main
from art_denoised.cli.options import DeviceOptions, WorkerOptions
from art_denoised.evaluation import read_attack_log, read_log
from tests.cli.command import DENOISER, MODEL, ROOT, certify, refusal, words
from tests.forked import forked  # whose server has imported torch: processes start at once
from tests.runs.test_workers import alive, lines, wait


@pytest.fixture(autouse=True)
def outside_slurm(monkeypatch):
    for name in ("ID", "COUNT", "MIN", "STEP"):
        monkeypatch.delenv(f"SLURM_ARRAY_TASK_{name}", raising=False)


def test_shards_of_a_slurm_array(tmp_path, monkeypatch, capsys):
    """Tasks 4, 6 and 8 of an array."""
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "3")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "4")
    monkeypatch.setenv("SLURM_ARRAY_TASK_STEP", "2")
    runs = [tmp_path / str(task) for task in (4, 6, 8)]
    for run in runs:
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", run.name)
        assert main(certify(run, max=5, batch_size=None)) == 0
        assert "SLURM_ARRAY_TASK_ID" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "5")
    assert "SLURM_ARRAY_TASK_ID is 5" in refusal(capsys, certify(tmp_path / "no"))
    whole = ("--shard", "1/1", "--batch-size", "64")  # that of shards, unless it is given
    assert main(certify(tmp_path / "one", *whole, max=5, batch_size=None)) == 0
    assert main(["merge", str(tmp_path / "all"), *map(str, runs), "--tsv"]) == 0
    one = read_log(tmp_path / "one")
    merged = read_log(tmp_path / "all")
    assert (merged.rows, merged.settings) == (one.rows, one.settings)
    assert len(read_log(tmp_path / "all" / "certify.tsv").rows) == 5
    assert main(["table", str(tmp_path / "all")]) == 0
    assert main(["verify", str(tmp_path / "all")]) == 0


def test_gaps_need_partial(tmp_path, capsys):
    assert main(certify(tmp_path / "1", "--shard", "1/2")) == 0
    command = ["merge", str(tmp_path / "all"), str(tmp_path / "1")]
    assert refusal(capsys, command).endswith("(pass --partial)")
    assert main([*command, "--partial"]) == 0
    assert "shard 2/2 of certify is missing" in capsys.readouterr().err


def test_masking_checks_are_made_after_the_merge(tmp_path, capsys):
    options = {"model": MODEL, "data": "digits", "eps": 0.1, "attacks": "pgd:steps=2", "max": 4}
    options["batch_size"] = 2
    for part in (1, 2):
        run = tmp_path / str(part)
        flags = ("--quiet", "--shard", f"{part}/2")
        assert main(words("attack", *flags, **options, out=run)) == 0
        assert "masking checks need all shards" in capsys.readouterr().err
    runs = [str(tmp_path / "1"), str(tmp_path / "2")]
    assert main(["merge", str(tmp_path / "all"), *runs]) == 0
    assert "--resume --out" in capsys.readouterr().err
    assert main(words("attack", "--quiet", "--resume", **options, out=tmp_path / "all")) == 0
    assert len(read_attack_log(tmp_path / "all").checks) >= 10


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "1/0"])
def test_there_is_no_such_shard(tmp_path, text, capsys):
    assert "give I/N" in refusal(capsys, certify(tmp_path, "--shard", text))


def test_workers_write_the_same_rows(tmp_path):
    """In any order."""
    assert main(certify(tmp_path / "one", denoiser=DENOISER)) == 0
    assert main(certify(tmp_path / "two", "--workers", "2", denoiser=DENOISER)) == 0
    one, two = (sorted(lines(tmp_path / name / "certify.jsonl")) for name in ("one", "two"))
    assert one == two


ASLEEP = """
import os, time
from multiprocessing import current_process
from pathlib import Path
from torch import nn

class Asleep(nn.Flatten):
    def forward(self, x):
        if current_process().daemon:  # a worker
            Path(__file__).with_name(f"{os.getpid()}.pid").touch()
            time.sleep(0.2)
        return super().forward(x)

def network():
    return Asleep().eval()
"""


def import_from(folder: str) -> None:
    sys.path.insert(0, folder)


def program(arguments: list[str]) -> None:
    sys.argv[1:] = arguments
    run_program()


@pytest.mark.parametrize("command", ["certify", "predict", "attack"])
def test_an_interrupt_ends_all_workers(tmp_path, command):
    (tmp_path / "asleep.py").write_text(ASLEEP)
    errors = tmp_path / "errors"
    options = {"model": "asleep:network", "data": "digits", "out": tmp_path / "run", "workers": 2}
    attack = {"eps": 0.1, "attacks": "pgd", "batch_size": 4}
    options |= attack if command == "attack" else {"sigma": 0.25, "n": 100_000}
    driver = forked(
        program,
        words(command, "--quiet", **options),
        errors=errors,
        prepare=partial(import_from, str(tmp_path)),
    )
    try:
        wait(lambda: len(list(tmp_path.glob("*.pid"))) == 2 or driver.exitcode is not None)
        os.kill(driver.pid, signal.SIGINT)
        driver.join(timeout=60)
    finally:
        driver.kill()
    assert driver.exitcode == 130, errors.read_text()
    assert errors.read_text().splitlines()[-1].endswith("pass --resume to continue")
    wait(lambda: not any(alive(int(path.stem)) for path in tmp_path.glob("*.pid")))


def test_gpus_are_shared_by_workers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    device, two = DeviceOptions(device="cpu"), ("cuda:0", "cuda:1")
    for options, found in (
        ({"gpus": "all"}, Workers(2, list, two)),
        ({"gpus": (1,), "workers": 3}, Workers(3, list, two[1:])),
        ({"workers": 3, "allow_mixed": True}, Workers(3, list, (), allow_mixed=True)),
        ({"workers": 1}, None),
        ({"cluster": "auto", "workers": 4}, Cluster("auto", 4, list)),
    ):
        assert WorkerOptions(**options).place(list, device) == found
    assert "--gpus is 0,2" in refusal(capsys, certify(tmp_path, "--gpus", "0,2"))
    assert "'a,b' are no GPUs" in refusal(capsys, certify(tmp_path, "--gpus", "a,b"))
    assert "--cluster" in refusal(capsys, certify(tmp_path, "--gpus", "0", "--cluster", "auto"))


CALLS = """#!/bin/sh
line=$(printf '%s\\037' "$@")
echo "$line" >> "$CALLS"
"""


def commands(script: str, folder: Path, **environment: str) -> list[list[str]]:
    """The words with which a script of a shell calls the program."""
    program = folder / "bin" / "art-denoised"
    program.parent.mkdir(exist_ok=True)
    program.write_text(CALLS)
    program.chmod(0o755)
    calls = folder / "calls"
    calls.write_text("")
    path = os.pathsep.join([str(program.parent), os.environ["PATH"]])
    known = {**os.environ, "PATH": path, "CALLS": str(calls), **environment}
    subprocess.run(["bash", "-eu", "-c", script], check=True, env=known, cwd=folder)
    return [line.split("\037")[:-1] for line in calls.read_text().splitlines()]


def test_the_scripts_of_the_guide_work(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "how-to" / "many-machines.md").read_text(encoding="utf-8")
    loop, array, attack, _ = re.findall(r"```sh\n(.*?)```", page, re.S)
    monkeypatch.chdir(tmp_path)
    for script in (loop, attack):
        words = commands(script, tmp_path)
        assert "merge" in [command for command, *_ in words]
        assert [main(command) for command in words] == [0] * len(words)
    assert len(read_log("runs/certified").rows) == 12
    assert len(read_attack_log("runs/pgd").checks) >= 10
    tasks = [commands(array, tmp_path, SLURM_ARRAY_TASK_ID=str(task)) for task in range(1, 9)]
    assert all(main(command) == 0 for ((command),) in tasks)
    assert main(["merge", "runs/again", *(f"runs/array/{task}" for task in range(1, 9))]) == 0
    assert read_log("runs/again").rows == read_log("runs/certified").rows
