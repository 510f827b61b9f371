"""Every example runs as it stands; training runs are represented by their first steps."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
QUICK = {
    "attack_a_model.py": ["--out", "out"],
    "certify_a_paid_api.py": ["--images", "2", "--out", "out"],
    "imagenet_photos.py": [
        *("--photographs", "rocket.jpg", "--sigma", "0.25"),
        *("--n", "10", "--n0", "2", "--batch-size", "2", "--out", "out"),
    ],
    "robust_resnet.py": ["--epochs", "1", "--images", "64"],
    "train_digits.py": ["--quick", "--out", "out"],
    "train_digits_diffusion.py": ["--quick", "--out", "out"],
}


@pytest.mark.filterwarnings("ignore")  # of the libraries that they use
@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_example_runs(as_program, monkeypatch, capsys, example):
    monkeypatch.setattr(sys, "argv", [str(example), *QUICK.get(example.name, [])])
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out
    assert {path.name for path in as_program.iterdir()} <= {"out"}
