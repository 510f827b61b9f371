"""The command line as a whole: help pages, exit codes, and what is said of a bad command line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib

import pytest

from art_denoised import __version__
from art_denoised.checks import InputError
from art_denoised.cli import build_app, main, tools
from tests.cli.command import ROOT, certify, process, refusal

COMMANDS = [
    *("demo", "doctor", "certify", "predict", "attack", "train-denoiser", "train-diffusion"),
    *("train-robust", "table", "plot", "report", "verify", "merge", "models", "convert"),
    *("submit", "leaderboard", "pictures"),
]


def test_all_commands_are_on_the_first_page(capsys):
    assert main(["--help"]) == 0
    page = capsys.readouterr().out
    shown = " ".join(page.split())
    app = build_app()
    for command in COMMANDS:
        first_line = app[command].default_command.__doc__.splitlines()[0]
        assert f" {command} {first_line} " in shown


def test_the_first_steps_are_commands_that_exist(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out.replace("\\\n", "")
    steps = [line.split() for line in printed.splitlines() if line.startswith("  art-denoised ")]
    assert len(steps) == 4
    app = build_app()
    for _, command, *rest in steps:
        app[command].parse_args(rest, exit_on_error=False, print_error=False)


def test_doctor_names_versions_devices_and_extras(capsys, monkeypatch):
    real = tools.metadata.version

    def version(name: str) -> str:
        if name == "torchattacks":
            raise tools.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(tools.metadata, "version", version)
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    lines = {line.split()[0]: line for line in printed.splitlines() if line}
    assert lines["torch"].split()[1] == real("torch")
    assert "threads" in lines["cpu"]
    assert "not installed" in lines["torchattacks"]
    assert "pip install '.[attacks]'" in printed


def test_doctor_prints_json(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["torch"] == tools.metadata.version("torch")
    assert "cpu" in found["devices"]
    assert found["optional"]["httpx"]["extra"] == "[api]"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_prints_json(capsys, command):
    collection = build_app()[command].assemble_argument_collection(parse_docstring=True)
    assert "--json" in {name for argument in collection for name in argument.names}


def test_doctor_knows_the_extras_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name, extra, _ in tools.OPTIONAL:
        assert any(one.startswith(name) for one in project["optional-dependencies"][extra])
    for name in tools.NEEDED[1:]:
        assert any(one.startswith(name) for one in project["dependencies"])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained(capsys, command):
    assert main([command, "--help-all"]) == 0
    page = capsys.readouterr().out
    collection = build_app()[command].assemble_argument_collection(parse_docstring=True)
    for argument in collection.filter_by(show=True):
        assert argument.parameter.help, argument.name
        assert argument.name.lstrip("-") in page
    assert max(map(len, page.splitlines())) <= 80
    assert "None" not in page  # a default that says nothing
    assert "\x1b" not in page  # plain where it is no terminal
    assert "`" not in page


def test_a_help_page_is_short_and_names_the_options_that_few_runs_need(capsys):
    assert main(["certify", "-h"]) == 0
    short = capsys.readouterr().out
    assert main(["certify", "--help-all"]) == 0
    everything = capsys.readouterr().out
    named = set(re.findall(r"(?<!\w)--[a-z][\w-]*", everything))
    assert named <= set(re.findall(r"(?<!\w)--[a-z][\w-]*", short))
    assert len(short.splitlines()) <= 80
    assert len(short) < 0.75 * len(everything)
    assert max(map(len, short.splitlines())) <= 80


def test_help_needs_no_torch():
    code = (
        "import sys; from art_denoised.cli import main;"
        "[main([*command.split(), '--help']) for command in sys.argv[1:]];"
        "assert not {'torch', 'numpy', 'scipy', 'art', 'matplotlib'} & set(sys.modules)"
    )
    words = [sys.executable, "-c", code, "", *COMMANDS]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"\nart-denoised {command}" in done.stdout for command in COMMANDS)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "values"),
    [
        (["frobnicate"], ["frobnicate"]),
        (["certfy"], ["certfy", '"certify"']),
        (["certify"], ["--data"]),
        (["predict"], ["--model"]),
        (["predict", "--modle", "x"], ["--modle", "--model"]),
        (["certify", "--data=x", "--sigma=1", "--out=x", "--modle=x"], ["--modle", "--model"]),
        (["table", "x", "--radi", "0"], ["--radi", "--radii"]),
        (["table", "--radii", "0"], ["LOG"]),
        (["demo", "--images", "0"], ["images", "0"]),
        (["demo", "--images", "many"], ["--images", "many"]),
        (["demo", "extra", "words"], ["extra"]),
        (["report", "a", "--json", "--tsv"], ["--json", "art-denoised report --help"]),
        (["demo", "--out", ""], ["--out", "empty"]),
        (["demo", "--out="], ["--out", "empty"]),
        (["table", ""], ["empty"]),
        (["table"], ["LOG is missing", "table --help"]),
        (["demo", "--out"], ["--out requires"]),
        (["certify", "--model a:b --weights c.pth"], ["'--model a:b --weights c.pth' is one word"]),
    ],
)
def test_bad_command_lines(capsys, arguments, values):
    message = refusal(capsys, arguments)
    for value in values:
        assert value in message


@pytest.mark.parametrize("option", ["model", "denoiser", "data", "sigma", "radii", "noise", "max"])
def test_an_unset_variable_of_the_shell_is_refused(tmp_path, capsys, option):
    message = refusal(capsys, certify(tmp_path, **{option: ""}))
    assert f"--{option} is empty" in message
    assert not any(tmp_path.iterdir())


def test_the_last_of_a_repeated_option_counts(capsys):
    message = refusal(capsys, ["table", "x.jsonl", "--radii", "0", "--radii", "a"])
    assert "'a'" in message


def test_errors_of_the_library_name_the_option_that_mends_them(capsys, monkeypatch):
    def fail(*arguments: object, **options: object) -> None:
        raise InputError("a is b", resume=True, batch_size=3)

    monkeypatch.setattr("art_denoised.demo.run.run_demo", fail)
    assert "a is b (pass --resume --batch-size 3)" in refusal(capsys, ["demo"])


def test_more_images_than_the_demo_has_are_refused(capsys, tmp_path):
    message = refusal(capsys, ["demo", "--images", "9999", "--out", str(tmp_path / "out")])
    assert "images is 9999" in message
    assert "500" in message
    assert not (tmp_path / "out").exists()


def test_bugs_are_not_hidden(monkeypatch):
    def fail(*arguments: object, **options: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr("art_denoised.demo.run.run_demo", fail)
    with pytest.raises(ValueError, match="a bug"):
        main(["demo"])


def test_a_reader_that_has_gone_is_no_error():
    log = ROOT / "results" / "cifar10" / "none-0.25" / "certify.jsonl"
    with process("table", str(log)) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        run.stdout.close()
        waits = run.stderr.read().splitlines()  # a busy machine makes the command say that it waits
    assert all(line.startswith("notice: ") for line in waits)
    assert run.returncode == 0


def test_the_module_is_the_program():
    run = process("frobnicate")  # known before torch is imported
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 2
    assert errors.splitlines()[-1].startswith('art-denoised: error: Unknown command "frobnicate"')
