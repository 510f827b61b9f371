"""The README's code and commands, run as they stand, in a folder of their own."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from art_denoised.cli import main
from art_denoised.evaluation import read_log
from art_denoised.reports import certified_table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.filterwarnings("default")
def test_python_runs(as_program, capsys):
    code = "\n".join(blocks("python"))
    assert "certify" in code
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    assert re.search(r"^\(\d, 0\.\d+\)$", capsys.readouterr().out, re.MULTILINE)  # labels and radii


def test_console_commands_run(as_program, capsys):
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
        assert main(arguments) == 0, (command, capsys.readouterr().err)
    assert (as_program / "runs" / "accuracy.png").exists()


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"`?make (\w+)`?", README))
    assert {"demo", "test", "bench"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "examples/README.md"]
)
def test_links_lead_somewhere(page):
    """Those of the site are checked by `make docs`."""
    page = ROOT / page
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} -> {target}"


def test_badges_are_true():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    python = re.search(r"badge/python-3\.(\d+)_to_3\.(\d+)-", README)
    assert python is not None
    first, last = map(int, python.groups())
    versions = [f"Programming Language :: Python :: 3.{minor}" for minor in range(first, last + 1)]
    assert [c for c in project["classifiers"] if "Python :: 3." in c] == versions
    assert project["requires-python"] == f">=3.{first}"
    assert f"badge/licence-{project['license']}-" in README


def test_it_fits_a_screen():
    """The long parts are on the site."""
    assert len(README.split()) < 500


RUNS = {
    f"sigma {sigma}, {how} denoiser": f"sigma-{sigma}-{how}-denoiser"
    for sigma in ("0.25", "0.5")
    for how in ("without", "with")
}
LOGS = ROOT / "tests" / "golden" / "demo"


def test_demo_table_is_that_of_the_frozen_logs():
    """Those of the whole of `make demo`; the next test says that the demo still writes them."""
    named = {name: read_log(LOGS / f"{run}.tsv") for name, run in RUNS.items()}
    page = (ROOT / "docs" / "how-to" / "install.md").read_text(encoding="utf-8")
    shown = re.search(r"demo table: begin -->\n```\n(.*?)\n```\n<!-- demo table", page, re.DOTALL)
    assert shown is not None
    assert shown[1] == str(certified_table(named, [0.0, 0.25, 0.5, 0.75, 1.0]))


def test_demo_writes_the_frozen_logs(as_program, capsys):
    """The rows of its first images, which are the same however many images there are."""
    demo = ["demo", "--images", "10", "--out", "out"]
    assert main(demo) == 0
    assert (as_program / "out" / "table.txt").read_text("utf-8") in capsys.readouterr().out
    assert (as_program / "out" / "certified_accuracy.png").exists()
    assert main(demo) == 2  # it would mix runs: --resume continues one
    for run in RUNS.values():
        rows = read_log(as_program / "out" / run / "certify.tsv").rows
        frozen = read_log(LOGS / f"{run}.tsv").rows[:10]
        assert [(row.index, row.prediction) for row in rows] == [
            (row.index, row.prediction) for row in frozen
        ]
        # Other processors may round a few votes differently.
        assert [row.radius for row in rows] == pytest.approx([r.radius for r in frozen], abs=0.01)
