"""A run as one file: what --save-config writes, --config runs again; mistakes are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from art_denoised.cli import build_app, main
from art_denoised.cli.config import read_config, write_config
from tests.cli.command import MODEL, certify, refusal

RUN = f"""\
command: certify
model: {MODEL}
data: digits
sigma: 0.25
n: 100
max: 4
out: OUT
quiet: true
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"

    def write(text: str = RUN) -> Path:
        path.write_text(text.replace("OUT", str(tmp_path / "out")))
        return path

    return write


def test_a_saved_run_is_repeated_from_its_file(tmp_path, capsys):
    saved, logs = tmp_path / "run.yaml", []
    command = certify(tmp_path / "a", "--json", seed=3, batch_size=32)
    assert main([*command, "--save-config", str(saved)]) == 0
    logs.append(json.loads(capsys.readouterr().out))
    assert main(["--config", str(saved), "--out", str(tmp_path / "b")]) == 0
    logs.append(json.loads(capsys.readouterr().out))
    assert logs[0]["table"] == logs[1]["table"]
    rows = [(tmp_path / run / "certify.jsonl").read_text().splitlines() for run in "ab"]
    settings = [{**json.loads(lines[0]), "begun": None} for lines in rows]
    assert settings[0] == settings[1]
    held = yaml.safe_load(saved.read_text())
    assert (held["command"], held["seed"], held["quiet"]) == ("certify", 3, True)
    assert held["alpha"] == 0.001  # a default


def test_words_of_the_command_line_replace_those_of_the_file(config):
    path, app = config(RUN + "radii: [0.1, 0.25]\nheader: [a]\n"), build_app()
    found = read_config(path, app, ["--radii=0.5", "--max", "9"])
    assert found[0] == "certify"
    assert "--sigma=0.25" in found
    assert "--quiet" in found
    assert "--header=a" in found
    assert not any(word.startswith(("--radii=0.1", "--max=")) for word in found)
    assert found[-3:] == ["--radii=0.5", "--max", "9"]
    assert "--radii=0.1,0.25" in read_config(path, app, ["certify"])


def test_values_are_read_as_they_would_be_typed(config):
    """YAML would make 8, False and 90 of them, and nothing of null."""
    text = "command: certify\nn: 010\nmodel: no\ndeadline: 1:30\ndenoiser: null\ndtype: ''\n"
    found = read_config(config(text), build_app(), [])
    assert found == ["certify", "--n=010", "--model=no", "--deadline=1:30", "--dtype="]


def test_what_is_written_is_read_again(tmp_path):
    app, path = build_app(), tmp_path / "new" / "run.yaml"
    command = ["table", "a: b.jsonl", "--radii", "0,0.25", "--json"]
    write_config(path, app, command)
    found = read_config(path, app, [])
    assert found[0] == "table"
    assert set(found[1:]) == {"a: b.jsonl", "--radii=0,0.25", "--json"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (RUN.replace("sigma", "sgima"), ["sgima", "sigma"]),
        (RUN.replace("certify", "certfy"), ["certfy"]),
        (RUN.replace("command: certify\n", ""), ["command"]),
        (RUN.replace("quiet: true", "quiet: yes please"), ["quiet", "yes please"]),
        (RUN + "sigma: 0.5\n", ["sigma", "twice"]),
        (RUN.replace("certify", "[certify, attack]"), ["2 commands"]),
        (RUN + 'device: ""\n', ["device", "empty"]),
        (RUN + "mean: {a: 1}\n", ["line 9"]),
        ("- a\n- b\n", ["no options"]),
        ("a: [", ["no YAML"]),
        ("a: !!python/object/apply:os.system [echo]\n", ["command"]),
        ("[" * 400, ["no YAML"]),
    ],
    ids=lambda value: str(value)[-20:],
)
def test_mistakes_in_a_file_are_named(config, capsys, text, said):
    message = refusal(capsys, ["--config", str(config(text))])
    assert all(word in message for word in said), message


def test_a_config_is_of_one_command(config, capsys):
    message = refusal(capsys, ["predict", "--config", str(config())])
    assert "config of certify" in message


def test_nothing_is_saved_of_a_command_line_that_is_wrong(tmp_path, capsys):
    refusal(capsys, ["certify", "--sgima", "1", "--save-config", str(tmp_path / "run.yaml")])
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("shell", ["bash"])
def test_shells_complete_commands_and_options(shell):
    script = build_app().generate_completion(shell=shell)
    assert "certify" in script
    assert "sigma" in script
