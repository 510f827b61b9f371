"""torchattacks: norms, outputs of any sign, names."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
import torchattacks
from torch import nn

from art_denoised.attacks import TorchAttack
from art_denoised.checks import InputError
from art_denoised.demo import digits_classifier
from art_denoised.estimators.defended import ArtAttack

EPS, L2 = 0.2, 2.0


class Moved(nn.Module):
    """The digits classifier with a constant added to its outputs: the same probabilities."""

    def __init__(self, constant: float) -> None:
        super().__init__()
        self.net, self.constant = digits_classifier(), constant

    def forward(self, x):
        return self.net(x).log_softmax(1) + self.constant


@pytest.fixture(scope="module")
def data(digits):
    return digits[0][:16], digits[1][:16]


@pytest.mark.parametrize(
    "face",
    [
        TorchAttack(L2, norm="l2", kind="CW", options={"steps": 20, "c": 10, "lr": 0.1}),
        TorchAttack(EPS, kind="UPGD", options={"loss": "margin", "alpha": 0.05, "steps": 10}),
        TorchAttack(EPS, kind="PGD", options={"alpha": 0.05, "steps": 10}),
    ],
    ids=lambda face: face.kind,
)
def test_outputs_that_are_all_negative_are_attacked_as_any_others(face, data):
    """CW and margins take the largest of outputs times a mask: 0, without gradient, if all < 0."""
    x, y = data
    left = {}
    for constant in (-50.0, 0.0, 1000.0):
        model = Moved(constant)
        x_adv = face(model, x, y)
        assert (x_adv != x).flatten(1).any(1).all()
        left[constant] = int((model(x_adv).argmax(1) == y).sum())
    assert max(left.values()) <= 4
    assert max(left.values()) - min(left.values()) <= 1  # rounding of outputs near 1000


def test_outputs_of_minus_infinity_stay():
    class Sure(nn.Module):
        def forward(self, x):
            logits = digits_classifier()(x)
            return logits.masked_fill(torch.arange(10) == 9, -torch.inf)

    x, y = torch.rand(2, 1, 8, 8), torch.tensor([1, 2])
    assert torch.isfinite(TorchAttack(EPS, options={"steps": 2})(Sure(), x, y)).all()


@pytest.mark.parametrize(
    ("norm", "kind", "remedy"),
    [
        ("l2", "PGD", "'linf'; give that or the class PGDL2"),
        ("linf", "PGDL2", "'l2'; give that or the class PGD"),
        ("l2", "FGSM", "'linf'; give that"),
        ("l2", "PIFGSM", "'linf'; give that"),
    ],
)
def test_a_class_of_another_norm_is_refused_before_any_work(norm, kind, remedy):
    with pytest.raises(InputError, match=f"norm is '{norm}', but the norm of {kind} .*{remedy}"):
        TorchAttack(EPS, norm=norm, kind=kind)


@pytest.mark.parametrize(
    ("norm", "kind"), [("l2", "BasicIterativeMethod"), ("linf", "VirtualAdversarialMethod")]
)
def test_so_it_is_of_art(norm, kind):
    with pytest.raises(InputError, match=f"norm is '{norm}', but the norm of {kind} of ART"):
        ArtAttack(EPS, norm=norm, kind=kind)


def test_every_class_with_a_radius_and_one_norm_is_known():
    """Read off the documentation of the library itself."""
    found = {}
    for name, one in vars(torchattacks).items():
        if not (inspect.isclass(one) and issubclass(one, torchattacks.attack.Attack)):
            continue
        arguments = inspect.signature(one).parameters
        measure = re.search(r"Distance Measure\s*:\s*(\w+)", one.__doc__ or "")
        bounded = {"eps", "max_epsilon"} & set(arguments)
        if bounded and "norm" not in arguments and measure:
            found[name] = measure.group(1).lower()
    assert found == TorchAttack.fixed_norms


def test_the_radius_is_told_under_its_other_name():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 4)).eval()
    x = torch.full((2, 3, 8, 8), 0.5)
    x_adv = TorchAttack(0.3, kind="PIFGSM")(model, x, torch.tensor([0, 1]))
    assert 0.1 < float((x_adv - x).abs().max()) <= 0.3 + 1e-5
