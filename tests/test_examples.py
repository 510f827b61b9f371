"""Every example runs as it stands; training runs are represented by their first steps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
QUICK = {
    "robust_resnet.py": ["--epochs", "1", "--images", "128"],
    "train_digits.py": ["--quick"],
    "train_digits_diffusion.py": ["--quick"],
}


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_example_runs(tmp_path, example):
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    words = [sys.executable, str(example), *QUICK.get(example.name, [])]
    if "--quick" in words:
        words += ["--out", str(tmp_path)]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout
