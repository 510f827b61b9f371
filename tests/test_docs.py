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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_reads_in_five_minutes(page):
    """Code and tables included, at 240 words a minute (Brysbaert, 2019)."""
    assert len(page.read_text(encoding="utf-8").split()) <= 5 * 240


def test_every_page_is_in_the_navigation_and_on_the_first_page_of_its_section():
    """`make docs` also fails on a missing page; this fails at once, and needs no MkDocs."""
    navigation = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    for page in PAGES:
        assert f" {page.relative_to(DOCS)}\n" in navigation
        section = page.parent / "index.md"
        if section.exists() and page != section and page.parent != DOCS:
            assert f"]({page.name}" in section.read_text(encoding="utf-8"), page


def test_links_lead_somewhere_in_a_clone():
    """`make docs` checks those of the site, which has more pages."""
    missing = [
        (page.name, link)
        for page in [*PAGES, *DOCS.parent.glob("*.md"), *(DOCS.parent / "results").rglob("*.md")]
        for link in re.findall(r"\]\(([^)#\s]+)", BLOCK.sub("", page.read_text(encoding="utf-8")))
        if not link.startswith(("http", "mailto")) and not (page.parent / link).exists()
    ]
    assert missing == []


def test_the_gallery_shows_every_example():
    gallery = (DOCS / "gallery" / "index.md").read_text(encoding="utf-8")
    for example in (DOCS.parent / "examples").iterdir():
        notebook = example.suffix == ".ipynb"
        name = f"(../../examples/{example.name} " if notebook else f"`{example.name}`"
        assert example.name == "README.md" or name in gallery


def test_every_command_is_listed(capsys):
    assert main(["--help"]) == 0
    listed = re.findall(r"^  ([a-z][a-z-]+) +\S", capsys.readouterr().out, re.MULTILINE)
    page = (DOCS / "reference" / "command-line.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([a-z-]+)` \|", page, re.MULTILINE)) == set(listed)


def test_the_reference_names_every_room():
    """The names of each room are read from its stub when the site is built."""
    assert "<!-- names of all rooms -->" in (DOCS / "reference" / "index.md").read_text("utf-8")
    stubs = Path(art_denoised.__file__).parent.glob("*/__init__.pyi")
    lines = [line for stub in stubs for line in stub.read_text("utf-8").splitlines()]
    imports = [line for line in lines if line.startswith("from ")]
    assert len(imports) > 100
    for line in imports:  # the form that tools/site_pages.py reads
        assert re.fullmatch(r"from \.\w+ import (\w+) as \1", line)
