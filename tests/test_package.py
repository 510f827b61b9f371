"""The package as a whole: imports, names, help, the layers."""

from __future__ import annotations

import subprocess
import sys

import pytest

import art_denoised


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_cheap():
    """Nothing heavy beyond torch, so no time to measure: the modules loaded tell."""
    code = (
        "import torch, sys; n = len(sys.modules); import art_denoised;print(*list(sys.modules)[n:])"
    )
    assert [name for name in python(code).split() if not name.startswith("art_denoised")] == []


def test_import_takes_under_half_a_second_beyond_torch():
    code = (
        "import torch, time; start = time.perf_counter(); import art_denoised;"
        "print(time.perf_counter() - start)"
    )
    assert min(float(python(code)) for _ in range(3)) < 0.5


def test_the_torch_side_does_not_import_art():
    code = (
        "import sys, art_denoised.cli, art_denoised.evaluation.run, art_denoised.demo.run;"
        "from art_denoised import SmoothedClassifier, certify, load_denoiser;"
        "print('art' in sys.modules, 'matplotlib' in sys.modules)"
    )
    assert python(code).split() == ["False", "False"]


@pytest.mark.parametrize("name", art_denoised.__all__)
def test_public_names_resolve_and_are_documented(name):
    assert name in dir(art_denoised)
    thing = getattr(art_denoised, name)
    if name not in ("__version__", "InputError"):
        assert ">>>" in (thing.__doc__ or "") + getattr(thing, "from_counts", thing).__doc__


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = art_denoised.no_such_name  # type: ignore[attr-defined]
