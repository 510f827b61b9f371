"""AutoAttack: its counts, its flags from both packages, and models with few classes."""

from __future__ import annotations

import importlib.util
import logging
import sys
import warnings

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


def test_autoattack_counts_and_flags(data, caplog):
    (x, y), trace, logger = data, sys.gettrace(), logging.getLogger("auto-attack")
    before = (list(logger.handlers), logger.propagate, logger.level)
    attack = AutoAttack(0.05, parts=("apgd-ce",), steps=3)
    with contained(dynamic := Dynamic(), 0):
        found = attack.run(dynamic, x, y)
    assert [flag for flag in found.flags if "dynamic" in flag]
    assert sum(autoattack_checks.funcs.values()) == 0
    assert sys.gettrace() is trace
    assert (list(logger.handlers), logger.propagate, logger.level) == before
    assert caplog.records == []  # nor does a warning reach the log of the caller
    plain = attack.run(digits_classifier(), x, y)
    assert plain.flags == ()
    with torch.no_grad():
        assert torch.equal(plain.counted, digits_classifier()(plain.x_adv).argmax(1) == y)


@pytest.mark.filterwarnings("ignore")
def test_warnings_without_a_category_are_flags(data):
    """AutoAttack gives its own none; those of the model or of torch have one."""

    class Warned(Defect):
        def forward(self, x):
            warnings.warn("zero gradient", Warning, stacklevel=1)
            warnings.warn("deprecated", UserWarning, stacklevel=1)
            return self.net(x)

    attack = AutoAttack(0.05, parts=("apgd-ce",), steps=1)
    assert attack.run(Warned(), *data).flags == ("zero gradient",)


@pytest.fixture
def built(monkeypatch, data):
    """Return pyautoattack's object as an attack on a model of so many classes sets it up."""

    def build(attack: AutoAttack, classes: int = 10) -> pyautoattack.AutoAttack:
        seen = []
        run = lambda self, x, y, **options: seen.append(self) or (x, y)  # noqa: E731
        monkeypatch.setattr(pyautoattack.AutoAttack, "run_standard_evaluation", run)
        attack.run(nn.Sequential(nn.Flatten(), nn.Linear(64, classes)), *data)
        return seen[0]

    return build


def test_the_default_is_the_standard_version_of_the_paper(built):
    """Croce and Hein (2020): 100 steps, 9 targets, 5000 queries, one start, no averaging."""
    attack = AutoAttack(EPS)
    made = built(attack)
    assert made.attacks_to_run == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert (made.epsilon, made.norm, made.seed) == (EPS, "Linf", 0)
    for apgd in (made.apgd, made.apgd_targeted):
        assert (apgd.n_iter, apgd.n_restarts, apgd.eot_iter) == (100, 1, 1)
    assert (made.fab.n_iter, made.fab.n_restarts, made.square.n_queries) == (100, 1, 5000)
    assert made.apgd_targeted.n_target_classes == made.fab.n_target_classes == 9
    # Passes of APGD; of 9 targets, also with two a step; and queries.
    assert attack.nfe == 101 + 9 * 101 + 9 * 2 * 101 + 5000


def test_the_version_for_random_models_averages_twenty_draws(built):
    attack = AutoAttack(EPS, version="rand")
    made = built(attack)
    assert made.attacks_to_run == ["apgd-ce", "apgd-dlr"]
    assert (made.apgd.eot_iter, made.apgd.n_restarts) == (20, 1)
    assert attack.nfe == 2 * 101 * 20
    two = AutoAttack(EPS, version="rand", eot=2)
    assert (built(two).apgd.eot_iter, two.nfe) == (2, 2 * 101 * 2)
    assert AutoAttack(EPS, parts=("apgd-ce", "fab")).nfe == 101 + 2 * 101


@pytest.mark.parametrize(
    ("steps", "schedule"), [(100, (22, 6, 3)), (40, (8, 2, 1)), (20, (4, 1, 1)), (3, (1, 1, 1))]
)
def test_checkpoints_of_apgd_are_those_of_the_paper(steps, schedule, built):
    """The first period is .22 of the steps; periods shrink by .03, to .06; none is below 1."""
    made = built(AutoAttack(EPS, steps=steps, queries=7, eot=3))
    for apgd in (made.apgd, made.apgd_targeted):
        assert (apgd.n_iter_2, apgd.n_iter_min, apgd.size_decr) == schedule
        assert (apgd.n_iter, apgd.eot_iter) == (steps, 3)
    assert (made.fab.n_iter, made.square.n_queries) == (steps, 7)


def test_there_are_no_more_targets_than_wrong_classes(built):
    made = built(AutoAttack(EPS, parts=("apgd-t",)), classes=5)
    assert made.apgd_targeted.n_target_classes == made.fab.n_target_classes == 4
    made = built(AutoAttack(EPS, norm="l2", seed=5), classes=20)
    assert made.apgd_targeted.n_target_classes == made.fab.n_target_classes == 9
    assert (made.norm, made.seed) == ("L2", 5)


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
    two = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).eval()
    AutoAttack(EPS, parts=("apgd-ce", "square"), steps=2, queries=2)(two, x, y % 2)


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
