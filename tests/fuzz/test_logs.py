"""Logs that were damaged, edited or written by somebody else."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cli.command import MODEL
from tests.fuzz.held import GOLDEN, damaged, fuzzed, outcome, rewritten

COMMON = ["--quiet", "--model", MODEL, "--data", "digits", "--seed", "3"]
NOISY = ["--sigma", "0.25", "--batch-size", "64", "--max", "2"]
COMMANDS = {
    "certify": ["certify", *COMMON, *NOISY, "--n", "60"],
    "radii": ["certify", *COMMON, *NOISY, "--radii", "0,0.25", "--n", "1000"],
    "predict": ["predict", *COMMON, *NOISY, "--n", "60"],
    "attack": ["attack", *COMMON, "--eps", "0.1,0.2", "--attacks", "pgd:steps=2", "--max", "3"],
}
OLD = ["fixed/certify", "radii/certify", "deadline/certify", "predict/predict", "attack/attack"]
LOGS = [*COMMANDS, *(f"{log}.jsonl" for log in OLD), "answers/answers.jsonl"]
READERS = [
    ["table"],
    ["verify"],
    ["verify", "--family-alpha", "0.05"],
    ["report", "--json"],  # its text is that of the folder, below
]


@pytest.fixture(scope="module")
def logs(tmp_path_factory) -> dict[str, Path]:
    """Logs of today's commands, and of those of an earlier version."""
    held = {name: GOLDEN / name for name in LOGS if name not in COMMANDS}
    for name, words in COMMANDS.items():
        folder = tmp_path_factory.mktemp(name)
        assert outcome([*words, "--out", folder]) == 0
        held[name] = folder / f"{words[0]}.jsonl"
    return held


def read_by_all(folder: str, name: str, content: bytes) -> None:
    path = Path(folder) / name
    path.write_bytes(content)
    for words in READERS:
        outcome([*words, path])
    outcome(["report", folder])


@pytest.mark.parametrize("log", LOGS)
@fuzzed
@given(data=st.data())
def test_a_damaged_log(logs, log, data):
    content = data.draw(damaged(logs[log].read_bytes()))
    with tempfile.TemporaryDirectory() as folder:
        read_by_all(folder, logs[log].name, content)
        if log in COMMANDS:  # what a resumed run adds can be read, or it was refused
            outcome([*COMMANDS[log], "--resume", "--out", folder])
            outcome(["report", folder])


@pytest.mark.parametrize("log", LOGS)
@fuzzed
@given(data=st.data())
def test_a_log_with_other_values(logs, log, data):
    lines = [json.loads(line) for line in logs[log].read_text().splitlines()]
    for at in data.draw(st.sets(st.integers(0, len(lines) - 1), min_size=1, max_size=2)):
        lines[at] = data.draw(rewritten(lines[at]))
    with tempfile.TemporaryDirectory() as folder:
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        read_by_all(folder, logs[log].name, text.encode())


@fuzzed
@given(data=st.data())
def test_a_table_of_somebody_else(data):
    """The TSV logs of Cohen et al., with a few accidents."""
    content = (GOLDEN.parent / "cohen_cifar10_sigma0.25.txt").read_bytes()[:1500]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.tsv"
        path.write_bytes(data.draw(damaged(content)))
        for words in (["table"], ["plot", "--out", f"{folder}/plot.svg"], ["verify"]):
            outcome([*words, path])
