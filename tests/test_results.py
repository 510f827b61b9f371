"""What is committed under results/ can be read by today's code, logs of earlier versions too."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from art_denoised import load_classifier
from art_denoised.evaluation import read_attack_log, read_log, verify
from art_denoised.networks import load_trained

RESULTS = Path(__file__).parent.parent / "results"

CERTIFIED = sorted(RESULTS.rglob("certify.jsonl"))
ATTACKED = sorted(RESULTS.rglob("attack.jsonl"))


def name(path: Path) -> str:
    return path.relative_to(RESULTS).as_posix()


@pytest.mark.parametrize("path", CERTIFIED, ids=name)
def test_certificates_follow_from_their_votes(path):
    log = read_log(path)
    assert len(log.rows) > 0
    assert verify(log) == []


@pytest.mark.parametrize("path", ATTACKED, ids=name)
def test_attacks_are_within_their_balls(path):
    log = read_attack_log(path)
    assert len(log.rows) > 0
    assert verify(log) == []


def test_weights_fit_the_networks_beside_them(monkeypatch):
    monkeypatch.syspath_prepend(RESULTS / "cifar10")
    monkeypatch.delitem(sys.modules, "networks", raising=False)
    for factory in ("classifier", "surrogate_plain", "surrogate_resnet14"):
        assert not load_classifier(f"networks:{factory}").training
    for activation in ("relu", "softplus"):
        weights = RESULTS / "cifar10" / "robust" / f"{activation}-0" / "model.safetensors"
        network = load_trained(load_classifier("networks:small"), weights)
        assert network(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    monkeypatch.delitem(sys.modules, "networks")
