"""Code and commands of the documentation.

Python blocks of a page run one after another, as a reader would type them. A block after
`<!-- not run: reason -->` is only parsed. Blocks of the language `console` run as they stand; the
options of every other command are compared with its help page.
"""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest

import art_denoised
from art_denoised.cli import main

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
BLOCK = re.compile(r"(<!-- not run: [^\n]*-->\n+)?```(\w*)\n(.*?)```", re.DOTALL)


class Block(NamedTuple):
    page: Path
    runs: bool
    language: str
    text: str


BLOCKS = [
    Block(page, not mark, language, text)
    for page in PAGES
    for mark, language, text in BLOCK.findall(page.read_text(encoding="utf-8"))
]


def commands(*languages: str) -> list[str]:
    """Commands of this package, with continued lines joined."""
    found = []
    for block in BLOCKS:
        if block.language in languages:
            for line in block.text.replace("\\\n", " ").splitlines():
                command = line.removeprefix("$ ").partition("#")[0].strip()
                if command.startswith("art-denoised "):
                    found.append(command.removeprefix("art-denoised "))
    return found


def names(page: Path) -> list[Block]:
    return [b for b in BLOCKS if b.page == page and b.language == "python"]


@pytest.mark.parametrize("page", [p for p in PAGES if names(p)], ids=lambda page: page.stem)
@pytest.mark.filterwarnings("default")
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reader: dict[str, object] = {"__name__": "__main__"}
    ran = 0
    for block in names(page):
        code = compile(block.text, str(page), "exec", ast.PyCF_ONLY_AST)
        if block.runs:
            exec(compile(code, str(page), "exec"), reader)
        ran += block.runs
    assert ran > 0, f"{page.name} shows nothing that runs"


def test_console_commands_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shown = commands("console")
    assert {command.split()[0] for command in shown} >= {"certify", "predict", "attack", "report"}
    for command in shown:
        words = shlex.split(command)
        if words[0] in ("certify", "predict", "attack"):
            words.append("--quiet")
        assert main(words) == 0, (command, capsys.readouterr().err)


def test_options_of_all_commands_exist(capsys):
    known: dict[str, set[str]] = {}
    checked = 0
    for command in commands("", "console"):
        name, *words = shlex.split(command)
        if name not in known:
            assert main([name, "--help"]) == 0
            known[name] = set(re.findall(r"(?<!\w)--?[a-z][\w-]*", capsys.readouterr().out))
        for word in words:
            if re.match(r"--?[a-z]", word):
                assert word.partition("=")[0] in known[name], command
                checked += 1
    assert checked > 50


def test_the_reference_has_every_public_name():
    page = (DOCS / "reference" / "index.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"`(\w+)`", page))
    assert set(art_denoised.__all__) - listed <= {"__version__"}


def test_the_reference_has_the_names_of_each_room():
    page = (DOCS / "reference" / "index.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## `art_denoised\.(\w+)`\n(.*?)(?=^## |\Z)", page, re.M | re.S)
    stubs = Path(art_denoised.__file__).parent.glob("*/__init__.pyi")
    assert {name for name, _ in sections} == {stub.parent.name for stub in stubs}
    for room, text in sections:
        rows = re.findall(r"^\| ([^|]+) \|", text, re.M)
        listed = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
        stub = Path(art_denoised.__file__).parent / room / "__init__.pyi"
        public = set(re.findall(r" as (\w+)$", stub.read_text(encoding="utf-8"), re.M))
        assert listed == public, room
