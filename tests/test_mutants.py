"""The tool that plants errors in the mathematics."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_planted_errors_are_killed_by_tests_that_pass_without_them(tmp_path):
    """Three lie within functions; the default of an argument is computed on import."""
    results = tmp_path / "results.jsonl"
    command = [sys.executable, "tools/mutants.py", "--quick", "--rate", "0.05"]
    command += ["--only", "smoothing/statistics.py", "--results", str(results)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.stdout.splitlines()[-2:] == [
        "4 of 4 killed: 100.0%",
        "0 harmless, 0 without a reason",
    ], run.stdout + run.stderr
    assert run.returncode == 0
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    killers = {row["mutant"]: row["killer"] for row in rows}
    mean = "smoothing/statistics.py average_certified_radius: values.mean -> values.sum"
    assert "average_certified_radius" in killers[mean] or "accuracy_over_images" in killers[mean]
    default = "smoothing/statistics.py proportion_interval: 0.95 -> 1.9"
    assert killers[default]
