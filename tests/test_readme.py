"""The README's code and commands, executed as they stand, in a folder of their own."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HOME": str(folder), "PYTHONWARNINGS": "ignore"}
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)


def test_python_runs(tmp_path):
    code = "\n".join(blocks("python"))
    assert "certify" in code
    done = run([sys.executable, "-c", code], tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^\d 0\.\d+$", done.stdout, re.MULTILINE)  # labels and radii


def test_console_commands_run(tmp_path):
    commands = [
        line.removeprefix("$ ")
        for block in blocks("console")
        for line in block.splitlines()
        if line.startswith("$ ")
    ]
    assert len(commands) >= 4
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "art-denoised"
        done = run([sys.executable, "-m", "art_denoised", *arguments], tmp_path)
        assert done.returncode == 0, (command, done.stderr)
    assert (tmp_path / "runs" / "accuracy.png").exists()


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"`?make (\w+)`?", README))
    assert {"demo", "test", "bench"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))])
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} -> {target}"


def test_demo_table_is_the_one_that_the_demo_prints(tmp_path):
    """The README's table comes from `make demo`: the whole of it, run again."""
    done = run([sys.executable, "-m", "art_denoised", "demo", "--out", "out"], tmp_path)
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "out" / "table.txt").read_text(encoding="utf-8")
    shown = re.search(r"demo table: begin -->\n```\n(.*?)```\n<!-- demo table", README, re.DOTALL)
    assert shown is not None
    assert figures(shown[1]) == pytest.approx(figures(table), abs=1.0)
    assert table in done.stdout


def figures(table: str) -> list[float]:
    """The shares and ACRs: other processors may round a few votes differently."""
    lines = [line for line in table.splitlines() if "denoiser" in line]
    assert len(lines) == 4
    return [float(cell.rstrip("%")) for line in lines for cell in line.split("denoiser")[1].split()]
