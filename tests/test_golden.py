"""The commands write what they wrote before the redesign (`tests/golden/cases.py`).

Votes, counts, radii and outcomes are compared exactly, weights and logits with a tolerance: other
processors round them differently.
"""

from __future__ import annotations

import json

import pytest

from art_denoised.cli import main
from tests.golden.cases import CASES, HERE


def compare(found, frozen, where=""):
    """Compare JSON values, floats with a relative and an absolute tolerance."""
    if isinstance(frozen, dict):
        assert set(frozen) <= set(found), where  # more may be said today
        for name in frozen:
            compare(found[name], frozen[name], f"{where}/{name}")
    elif isinstance(frozen, list):
        assert len(found) == len(frozen), where
        for i, (one, other) in enumerate(zip(found, frozen, strict=True)):
            compare(one, other, f"{where}/{i}")
    elif isinstance(frozen, float):
        assert found == pytest.approx(frozen, rel=1e-3, abs=2e-3), where
    else:
        assert found == frozen, where


@pytest.mark.parametrize("name", CASES)
def test_commands_write_what_they_wrote(name):
    found = json.loads(json.dumps(CASES[name]()))
    frozen = json.loads((HERE / f"{name}.json").read_text())
    if name.startswith(("certify", "predict")):
        assert found == frozen
    else:
        compare(found, frozen)


LOGS = HERE / "logs"


@pytest.mark.parametrize("name", ["fixed", "radii", "deadline", "union-bound"])
def test_earlier_logs_are_read(name, capsys):
    """Written at commit d691b95, and by the last version with a union bound over looks.

    `table` and `verify` say of them what they said then.
    """
    log = LOGS / name / "certify.jsonl"
    assert main(["table", str(log), "--json"]) == 0
    compare(
        json.loads(capsys.readouterr().out), json.loads((LOGS / name / "table.json").read_text())
    )
    assert main(["verify", str(log)]) == 0


def test_an_attack_log_of_the_first_version_is_read(capsys):
    assert main(["report", str(LOGS / "attack"), "--json"]) == 0
    (model,) = json.loads(capsys.readouterr().out)["models"]
    assert model["clean"]["value"] == 1.0
    assert [figure["counted"]["value"] for figure in model["figures"]] == [
        0.5,
        0.5,
    ]  # pgd, and all attacks together
