"""The tool that plants errors in the mathematics."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tools import mutants

ROOT = Path(__file__).parent.parent


def test_planted_errors_are_killed_by_tests_that_pass_without_them(tmp_path):
    """All errors of a small class."""
    results = tmp_path / "results.jsonl"
    command = [sys.executable, "tools/mutants.py", "--quick", "--rate", "1"]
    command += ["--only", "attacks/purification.py BPDA", "--results", str(results)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert run.stdout.splitlines()[-2:] == [
        "4 of 4 killed: 100.0%",
        "0 harmless, 0 without a reason",
    ], run.stdout + run.stderr
    assert run.returncode == 0
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    killers = {row["mutant"].partition(": ")[2]: row["killer"] for row in rows}
    shape = "stand_in.shape != value.shape -> stand_in.shape == value.shape"
    own = ("tests/attacks/test_purification_bpda.py", "art_denoised/attacks/purification.py")
    file, _, test = killers[shape].partition("::")
    assert file.endswith(own)
    assert test  # in a fork, and not only when all is imported again


def test_a_survivor_needs_a_reason(capsys):
    known = next(iter(json.loads(mutants.SURVIVORS.read_text())))
    assert mutants.judge({"seen": "a test", known: None}) == 0
    assert "1 of 2 killed: 50.0%\n1 harmless, 0 without a reason" in capsys.readouterr().out
    assert mutants.judge({"seen": "a test", "unseen": None}) == 1
    assert "0 harmless, 1 without a reason" in capsys.readouterr().out
