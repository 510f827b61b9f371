"""The tool that plants errors in the mathematics."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_a_planted_error_is_killed_by_tests_that_pass_without_it():
    mutant = "smoothing/statistics.py certified_radius: 0.5 -> 1.0"
    command = [sys.executable, "tools/mutants.py", "--quick", "--rate", "1", "--only", mutant]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.stdout.splitlines()[-2:] == [
        "1 of 1 killed: 100.0%",
        "0 harmless, 0 without a reason",
    ]
    assert run.returncode == 0
