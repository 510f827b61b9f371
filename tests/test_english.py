"""Sentences that readers stumbled over must not come back to docs, docstrings or messages."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EVERYWHERE = [
    "make a classifier of",
    "a log of other settings",
    "in the way of",
    "left its ball",
    "what was done is kept",
    "again and again",
    "costs money and fails",
    "uses what is there for more",
    "is done without",
    "was left as wrong",
    "would not be heeded",
    "rows follow from their votes",
    "who knows better",
    "what attacks left",
    "not to be trusted",
    "be believed",
    "on the wire",
    "had a say",
    "is no success of",
    "what falls short",
    "if it is certain radii",
    "; so has eps",
    "what fresh blocks do",
]
# Words of measurements, which belong to results/ and benchmarks.
IN_GUIDES = ["falls short", "fall short"]
GUIDES = [ROOT / "README.md", ROOT / "examples" / "README.md", *(ROOT / "docs").rglob("*.md")]


@cache
def prose(path: Path) -> str:
    """The text of a page, or the docstrings and other strings of a module, in one line."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        strings = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Constant)]
        text = "\n".join(n.value for n in strings if isinstance(n.value, str))
    return re.sub(r"\s+", " ", text).lower()


@cache
def package() -> list[Path]:
    found = (ROOT / "art_denoised").rglob("*")
    return [path for path in found if path.suffix in (".py", ".html", ".md")]


@pytest.mark.parametrize("phrase", EVERYWHERE)
def test_riddles_do_not_return(phrase):
    places = [p for p in [*GUIDES, *package()] if phrase in prose(p)]
    assert [str(p.relative_to(ROOT)) for p in places] == []


@pytest.mark.parametrize("phrase", IN_GUIDES)
def test_guides_do_not_discuss_shortcomings_of_measurements(phrase):
    pages = [page for page in GUIDES if not page.name.startswith("benchmarks")]
    assert [page.name for page in pages if phrase in prose(page)] == []


def docstrings(path: Path) -> str:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return "\n".join(ast.get_docstring(n) or "" for n in nodes if isinstance(n, kinds))


def test_a_parameter_is_described_by_a_noun_phrase():
    """Neither "As for `OtherClass`" nor "Of the run": each entry says what the parameter is."""
    wrong = re.compile(r"\bas for\b|^\s+\w+: (Of|As) ", re.IGNORECASE | re.MULTILINE)
    found = [
        f"{path.relative_to(ROOT)}: {match[0].strip()}"
        for path in package()
        if path.suffix == ".py"
        for match in wrong.finditer(docstrings(path))
    ]
    assert found == []
