"""What tells one model from another."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from art_denoised.demo import digits_classifier
from art_denoised.runs import differences, identity
from art_denoised.runs.journal import describe
from tests.forked import forked


class Extra(nn.Linear):
    def __init__(self, extra: object) -> None:
        super().__init__(2, 2)
        self._extra = extra
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def get_extra_state(self) -> object:
        return self._extra

    def set_extra_state(self, state: object) -> None:
        self._extra = state


def test_extra_state_counts_among_the_weights():
    states = [{"a": 1}, {"a": 2}, {"a": torch.zeros(2)}, {"b": torch.zeros(2)}, "text", None, [1]]
    prints = [identity(Extra(state))["weights"] for state in states]
    assert len(set(prints)) == len(states)
    assert prints == [identity(Extra(state))["weights"] for state in states]


def sloping(slope: float = 0.1, **attributes: object) -> nn.Module:
    net = nn.Sequential(nn.LeakyReLU(slope), nn.Dropout(0.5))
    for name, value in attributes.items():
        setattr(net, name, value)
    return net


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (sloping(0.2), "structure"),
        (sloping(note=3), "attributes"),
        (sloping(note=np.ones(2)), "attributes"),
        (nn.Sequential(nn.LeakyReLU(0.1), nn.Identity()), "structure"),
        (sloping().append(nn.Linear(2, 2).double()), "dtype"),
    ],
)
def test_each_change_of_a_model_is_named(other, name):
    assert name in differences(identity(sloping()), identity(other))


def test_the_training_mode_and_private_attributes_are_no_difference():
    net = sloping().eval()
    net._cache = 3
    assert differences(identity(sloping()), identity(net)) == ""


def test_buffers_that_are_not_persistent_count_among_the_weights():
    def make(mean: float) -> nn.Module:
        net = nn.Identity()
        net.register_buffer("mean", torch.tensor(mean), persistent=False)
        return net

    assert differences(identity(make(0.5)), identity(make(0.5))) == ""
    assert differences(identity(make(0.5)), identity(make(0.4))) == "weights differs"


def test_a_part_may_hold_the_whole():
    def make(note: int) -> nn.Module:
        net = sloping()
        net[0].parents, net[1].note = [net], note
        return net

    assert differences(identity(make(1)), identity(make(1))) == ""
    assert differences(identity(make(1)), identity(make(2))) == "attributes differs"


def test_functions_are_told_by_what_they_hold():
    def make(shift):
        return lambda x: x + shift

    assert identity(make(1)) == identity(make(1))
    assert identity(make(1)) != identity(make(2))
    assert describe(functools.partial(make, 1)) != describe(functools.partial(make, 2))


NET = sloping()


def by_global(x: torch.Tensor) -> torch.Tensor:
    return NET(x)


def test_functions_are_told_by_the_network_that_they_call(monkeypatch):
    assert identity(sloping().forward) == identity(sloping().forward)
    assert identity(sloping().forward) != identity(sloping(0.2).forward)
    before = identity(by_global)
    assert before == identity(by_global)
    monkeypatch.setitem(globals(), "NET", sloping(0.2))
    assert before != identity(by_global)


def test_identities_are_equal_in_every_process(tmp_path):
    process = forked(write_identity, tmp_path / "there.json")
    process.join()
    there = json.loads((tmp_path / "there.json").read_text())
    assert there == identity(digits_classifier())
    assert "weights" in there


def write_identity(file: Path) -> None:
    file.write_text(json.dumps(identity(digits_classifier())))


def test_differences_are_one_line():
    old = {"n": 1000, "weights": "a" * 16, "deep": {"a": 1, "b": {}}, "gone": None, "net": {"a": 1}}
    new = {"n": 500, "weights": "b" * 16, "deep": {"a": 2, "b": {}}}
    assert differences(old, new) == (
        "n is 1000, not 500, weights differs, deep.a is 1, not 2, net differs"
    )
