"""The masking checks find purifiers whose gradients or noise are not what they seem."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from art_denoised import PGD, Purification, PurifiedClassifier
from art_denoised.demo import digits_classifier, digits_diffusion
from art_denoised.evaluation import Probes
from tests.evaluation.test_masking import EPS, failed, findings


class Defective(nn.Module):
    """A purification with a planted defect."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Purification(digits_diffusion(), t=0.05, steps=2, sampler="ddim", seed=0)


class Detaching(Defective):
    """Keeps the graph alive, but no gradient comes through its steps."""

    def forward(self, x):
        return self.inner(x.detach()) + 0 * x


class Resetting(Defective):
    """Sets the global seed, so that its noise looks fresh and is not."""

    def forward(self, x):
        torch.manual_seed(0)
        return self.inner(x + 0.05 * torch.randn(x.shape))


class Quantising(Defective):
    """Its last step rounds to a few grey levels."""

    def forward(self, x):
        return (self.inner(x) * 8).round() / 8


@pytest.mark.parametrize(
    ("defect", "expected"),
    [
        (Detaching, {"zero gradients", "eps large enough"}),
        (Resetting, {"global seed"}),
        (Quantising, {"zero gradients", "eps large enough"}),
    ],
)
def test_planted_defects_are_found(defect, expected, digits):
    model = PurifiedClassifier(defect(), digits_classifier()).eval()
    probes = Probes(images=8, steps=2, queries=10, eot=2)
    attacks = [PGD(EPS, steps=3, loss="margin")]
    log, checks = findings(
        model, digits, attacks=attacks, images=8, probes=probes, undefended=digits_classifier()
    )
    assert expected <= failed(checks), checks
    assert log.trusted is False
