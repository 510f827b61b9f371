"""The package as a whole: what an import costs, public names, and where users import from."""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import art_denoised
from tests.forked import forked

ROOT = Path(__file__).parent.parent
ROOMS = sorted(m.name for m in pkgutil.iter_modules(art_denoised.__path__) if m.ispkg)
PUBLIC = [room for room in ROOMS if room not in ("cli", "demo")]


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("modules", ["art_denoised", "art_denoised, art_denoised.cli"])
def test_an_import_loads_nothing_heavy(modules):
    code = f"import {modules}, sys; print(*sys.modules)"
    heavy = {"torch", "numpy", "scipy", "art", "matplotlib", "sklearn", "diffusers"}
    assert heavy & set(python(code).split()) == set()


def test_the_torch_side_does_not_import_art():
    process = forked(import_the_torch_side)
    process.join()
    assert process.exitcode == 0


def import_the_torch_side() -> int:
    """Return 0 if neither of two heavy packages has been imported by the end."""
    importlib.import_module("art_denoised.evaluation.certify")
    importlib.import_module("art_denoised.demo.run")
    for name in ("SmoothedClassifier", "Smoother", "load_denoiser"):
        getattr(art_denoised, name)
    return int("torch" not in sys.modules or not {"art", "matplotlib"}.isdisjoint(sys.modules))


def test_every_room_says_what_is_public():
    for room in PUBLIC:
        module = importlib.import_module(f"art_denoised.{room}")
        assert module.__all__, room
        for name in module.__all__:
            assert getattr(module, name) is not None, f"{room}.{name}"


@pytest.mark.parametrize("name", art_denoised.__all__)
def test_public_names_resolve_and_are_documented(name):
    assert name in dir(art_denoised)
    thing = getattr(art_denoised, name)
    documented = isinstance(thing, type) or callable(thing)
    if documented and not issubclass(type(thing), type(re.compile(""))):
        assert thing.__doc__, name


def test_public_functions_and_classes_show_an_example():
    without = [
        name
        for name in art_denoised.__all__
        if callable(getattr(art_denoised, name))
        and ">>>" not in (getattr(art_denoised, name).__doc__ or "")
    ]
    # Results of other calls, whose examples show them.
    assert set(without) <= {"Certificate", "Vote", "InputError"}


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = art_denoised.no_such_name  # type: ignore[attr-defined]


def shown() -> list[tuple[str, str]]:
    """Every import of the package in what users read, with its place."""
    places = [ROOT / "README.md"]
    for folder in ("docs", "examples", "benchmarks", "results"):
        places += [p for s in ("md", "py", "ipynb") for p in (ROOT / folder).rglob(f"*.{s}")]
    found = []
    for place in places:
        for name in re.findall(r"(?:from|import) (art_denoised[\w.]*)", place.read_text("utf-8")):
            found.append((str(place.relative_to(ROOT)), name))
    return found


def test_users_import_from_the_top_or_from_a_room():
    deep = [(place, name) for place, name in shown() if name.count(".") > 1]
    assert deep == []
    rooms = {name.split(".")[1] for _, name in shown() if "." in name}
    assert rooms <= set(ROOMS)


def test_nothing_is_imported_that_one_system_alone_has():
    """Windows has no `fcntl`."""
    alone = "(?:from|import) (fcntl|grp|msvcrt|pwd|resource|termios|winreg)"
    files = (ROOT / "art_denoised").rglob("*.py")
    assert [f.name for f in files if re.search(alone, f.read_text("utf-8"))] == []
