"""Previews: near what the run then costs, and without influence on it."""

from __future__ import annotations

import pytest

from art_denoised.attacks import PGD, AutoAttack
from art_denoised.checks import InputError
from art_denoised.data import load_data
from art_denoised.demo import digits_classifier
from art_denoised.evaluation.certify import certify
from art_denoised.evaluation.preview import preview, preview_attack
from art_denoised.models.cost import forward_cost, gradient_cost
from art_denoised.smoothing import SmoothedClassifier
from art_denoised.smoothing.smoother import Smoother
from art_denoised.smoothing.stops import Anytime, AtRadii, FixedN, Voting

DATA, RADII = load_data("digits"), [0.0, 0.25, 0.5]


def test_a_preview_is_near_the_cost_of_the_run(tmp_path):
    smoother, data = Smoother(digits_classifier(), sigma=0.25), DATA
    stop, indices = AtRadii(RADII, 5_000), range(0, 500, 10)
    expected = preview(smoother, data, stop, indices=indices, pilot=25)
    log = certify(smoother, data, stop, run=tmp_path, indices=indices, progress=False)
    drawn = sum(row.n0 + row.drawn for row in log.rows)
    assert expected.low < expected.samples < expected.high <= expected.fixed == 50 * 5_100
    assert drawn / 2.5 < expected.samples < drawn * 2.5
    assert expected.seconds > 0


def test_a_fixed_number_is_known_exactly():
    smoother = Smoother(digits_classifier(), sigma=0.25)
    options = {"indices": range(40), "pilot": 3, "cost_per_sample": 0.001}
    cost = preview(smoother, DATA, FixedN(1000), **options)
    assert cost.samples == cost.low == cost.high == cost.fixed == 40 * 1100
    assert round(cost.cost, 2) == 44.0
    assert "44,000 samples" in str(cost)
    one = forward_cost(smoother.network, DATA[0][0][None])
    assert "cost 44.00" in str(cost)
    assert (cost.flop, cost.memory) == (44_000 * one.flop, one.memory(smoother.batch_size))


def test_votes_of_a_prediction_are_counted():
    smoother = Smoother(digits_classifier(), sigma=0.25)
    cost = preview(smoother, DATA, Voting(500), indices=range(4), pilot=2)
    assert cost.samples == cost.fixed == 2000


@pytest.mark.parametrize(
    "bad", [{"cost_per_sample": float("nan")}, {"indices": []}, {"stop": Anytime()}, {"pilot": 0}]
)
def test_what_has_no_cost_is_refused(bad):
    smoother = Smoother(digits_classifier(), sigma=0.25)
    with pytest.raises(InputError):
        preview(smoother, DATA, **{"stop": FixedN(100), **bad})


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
