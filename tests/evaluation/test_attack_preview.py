"""Previews of attacks: as many passes as the attacks take, and what is not known is named."""

from __future__ import annotations

import pytest

from art_denoised.attacks import PGD, AutoAttack
from art_denoised.checks import InputError
from art_denoised.data import load_data
from art_denoised.demo import digits_classifier
from art_denoised.evaluation import preview_attack
from art_denoised.models.cost import forward_cost, gradient_cost
from art_denoised.smoothing import SmoothedClassifier

DATA = load_data("digits")


class Unknown:
    eps, norm = 0.1, "linf"

    def __call__(self, model, x, y):
        return x


def test_passes_and_operations_are_those_of_the_attacks():
    network, x = digits_classifier(), DATA[0][0][None]
    attacks = [PGD(0.1, steps=9), AutoAttack(0.1, parts=("square",), queries=50)]
    cost = preview_attack(network, DATA, attacks, indices=range(20), batch_size=8)
    assert cost.nfe == 20 * (2 + (10 + 1) + (50 + 1))
    each = 10 * gradient_cost(network, x).flop + 54 * forward_cost(network, x).flop
    assert cost.flop == pytest.approx(20 * each)
    assert cost.memory >= forward_cost(network, x).memory(8)
    assert cost.seconds > 0
    assert "20 images: up to 1,280 forward passes" in str(cost)


def test_a_randomised_model_is_evaluated_again():
    smoothed = SmoothedClassifier(digits_classifier(), sigma=0.25, samples=4, seed=0).eval()
    attacks = [PGD(0.1, steps=4), Unknown()]
    options = {"indices": range(3), "repeats": 7, "noise": "fresh"}
    cost = preview_attack(smoothed, DATA, attacks, **options)
    assert cost.nfe == 3 * (7 + (5 + 7))
    assert cost.unknown == ("unknown",)
    assert "unknown" in str(cost)


def test_nothing_to_attack_is_refused():
    with pytest.raises(InputError):
        preview_attack(digits_classifier(), DATA, [PGD(0.1)], indices=[])
