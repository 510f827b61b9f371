"""AutoAttack: its counts, its flags from both packages, and models with few classes."""

from __future__ import annotations

import importlib.util
import logging
import sys

import pyautoattack
import pytest
import torch
from pyautoattack import checks as autoattack_checks
from torch import nn

from art_denoised.attacks import AutoAttack
from art_denoised.attacks.suites import contained
from art_denoised.checks import InputError
from art_denoised.demo import digits_classifier
from tests.evaluation.defects import Defect

EPS = 0.2


@pytest.fixture(scope="module")
def data(digits):
    return digits[0][:8], digits[1][:8]


class Dynamic(Defect):
    """Takes a gradient in its forward pass."""

    def forward(self, x):
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (step,) = torch.autograd.grad(self.net(leaf).logsumexp(1).sum(), leaf)
        return self.net(x + 0.01 * step)


class Noisy(Defect):
    def forward(self, x):
        return self.net(x + 0.2 * torch.randn(x.shape))


class Probabilities(Defect):
    def forward(self, x):
        return self.net(x).softmax(1)


def test_autoattack_counts_and_flags(data):
    (x, y), trace, logger = data, sys.gettrace(), logging.getLogger("auto-attack")
    before = (list(logger.handlers), logger.propagate, logger.level)
    attack = AutoAttack(0.05, parts=("apgd-ce",), steps=3)
    with contained(dynamic := Dynamic(), 0):
        found = attack.run(dynamic, x, y)
    assert [flag for flag in found.flags if "dynamic" in flag]
    assert sum(autoattack_checks.funcs.values()) == 0
    assert sys.gettrace() is trace
    assert (list(logger.handlers), logger.propagate, logger.level) == before
    plain = attack.run(digits_classifier(), x, y)
    assert plain.flags == ()
    with torch.no_grad():
        assert torch.equal(plain.counted, digits_classifier()(plain.x_adv).argmax(1) == y)


@pytest.mark.parametrize("classes", [4, 6])
def test_autoattack_takes_models_with_few_classes(classes, data):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, classes)).eval()
    x, y = data[0], torch.arange(len(data[0])) % classes
    AutoAttack(EPS, steps=3, queries=5)(model, x, y)


def test_autoattack_refuses_too_few_classes_in_one_line(data):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval()
    x, y = data[0], torch.arange(len(data[0])) % 3
    with pytest.raises(InputError, match=r"apgd-t of AutoAttack needs 4 classes.*has 3.*fab-t"):
        AutoAttack(EPS)(model, x, y)
    AutoAttack(EPS, parts=("apgd-ce", "apgd-dlr", "fab-t", "square"), steps=3, queries=5)(
        model, x, y
    )


class Printing:
    """The logger of the official package: it prints, and warnings begin with "Warning: "."""

    def log(self, words: str) -> None:
        print(words)

    def warning(self, words: str) -> None:
        self.log(f"Warning: {words}")

    def debug(self, words: str) -> None:
        self.log(words)


class Official(pyautoattack.AutoAttack):
    """The official signatures and log over the packaged engine, which is the same code."""

    def __init__(
        self, model, norm="Linf", eps=0.3, seed=None, verbose=True, attacks_to_run=(),
        version="standard", is_tf_model=False, device="cuda", log_path=None,
    ):  # fmt: skip
        parts = list(attacks_to_run) or None
        super().__init__(
            model, norm=norm, eps=eps, seed=seed, version=version, device=device, attacks=parts
        )
        self.verbose = verbose
        self.logger = self.apgd.logger = self.apgd_targeted.logger = Printing()

    def run_standard_evaluation(self, x_orig, y_orig, bs=250, return_labels=False, state_path=None):
        self.logger.log("initial accuracy: 100.00%")
        found = super().run_standard_evaluation(x_orig, y_orig, batch_size=bs)
        return found if return_labels else found[0]


@pytest.fixture
def official(monkeypatch):
    """Make the official package the one that is installed, when it is called."""
    package, find = type(sys)("autoattack"), importlib.util.find_spec
    package.AutoAttack = Official
    monkeypatch.setitem(sys.modules, "autoattack", package)
    monkeypatch.setitem(sys.modules, "autoattack.checks", autoattack_checks)

    def install():
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *rest: (
                {"pyautoattack": None, "autoattack": "there"}[name]
                if name.endswith("autoattack")
                else find(name, *rest)
            ),
        )

    return install


def test_the_official_package_finds_the_same(data, official):
    attacks = [AutoAttack(EPS, parts=("apgd-ce",), steps=5), AutoAttack(EPS, steps=3, queries=5)]
    ours = [attack(digits_classifier(), *data) for attack in attacks]
    official()
    for attack, x_adv in zip(attacks, ours, strict=True):
        assert torch.equal(attack(digits_classifier(), *data), x_adv)


@pytest.mark.parametrize(
    ("kind", "flag"),
    [(Noisy, "randomized defense"), (Dynamic, "dynamic defense"), (Probabilities, "probability")],
)
def test_both_packages_give_the_same_flags(data, official, capsys, kind, flag):
    model, attack = kind(), AutoAttack(0.05, parts=("apgd-ce",), steps=3)
    found = []
    for install in (lambda: None, official):
        install()
        with contained(model, 0):
            found.append(attack.run(model, *data).flags)
    assert flag in " ".join(found[0])
    assert found[0] == found[1]
    assert capsys.readouterr().out == ""
