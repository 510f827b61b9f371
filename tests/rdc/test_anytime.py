"""Elimination of classes: the full answer from a part of the evaluations."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from art_denoised import DiffusionClassifier
from art_denoised.checks import InputError
from art_denoised.data import digits
from art_denoised.demo import digits_diffusion
from art_denoised.diffusion import DiffusionModel, Native, noise_levels
from art_denoised.rdc import disagreement, predict_anytime
from tests.rdc.test_classifier import Counting, Nan


@pytest.fixture(scope="module")
def x():
    return torch.stack([digits(train=False)[i][0] for i in range(150)])


def classifier(**options) -> DiffusionClassifier:
    return DiffusionClassifier(digits_diffusion(), **{"seed": 0, **options})


def test_it_agrees_with_all_levels_at_a_third_of_the_cost(x):
    found = predict_anytime(classifier(), x)
    assert found.nfe < found.full_nfe / 3
    assert found.decided.all()
    assert disagreement(classifier(), x) <= 0.01  # measured, not proved: 0 of 150 here


def test_the_evaluations_are_counted(x):
    dc = classifier(max_batch=64)
    dc.model.network = counting = Counting(dc.model.network)
    found = predict_anytime(dc, x[:20])
    assert counting.rows == found.nfe
    assert counting.largest <= 64


def test_a_class_that_is_never_dropped_is_evaluated_in_full(x):
    found = predict_anytime(classifier(), x[:20], z=1e9)
    assert found.nfe == found.full_nfe
    assert torch.equal(found.predictions, classifier()(x[:20]).argmax(1))


def test_smaller_z_is_cheaper(x):
    costs = [predict_anytime(classifier(), x[:50], z=z).nfe for z in (0.5, 2.0, 8.0)]
    assert costs == sorted(costs)
    assert costs[0] < costs[-1]


@pytest.mark.parametrize("budget", [0, 100, 1000, 1900])
def test_the_budget_is_kept(x, budget):
    dc = classifier()
    dc.model.network = counting = Counting(dc.model.network)
    found = predict_anytime(dc, x[:50], budget=budget)
    assert counting.rows == found.nfe <= budget
    assert not found.decided.all()


@pytest.mark.parametrize("budget", range(70, 82))
def test_what_the_budget_left_behind_is_not_called_decided(x, budget):
    """Ten levels by fours: the last round is cheaper than the one that was too expensive."""
    dc = classifier(levels=noise_levels(10))
    found = predict_anytime(dc, x[:2], z=1e9, first=4, budget=budget)
    assert found.decided.tolist() == [found.nfe >= 100, found.nfe >= 200]


def test_the_prior_counts(x):
    sure = [1e-30] * 10
    sure[3] = 1.0
    dc = classifier(prior=sure, temperature=10.0)
    assert torch.equal(predict_anytime(dc, x[:20], z=1e9).predictions, dc(x[:20]).argmax(1))


def test_the_prior_counts_for_as_many_levels_as_the_losses(x):
    """Else it outweighs them where the budget ends early: to answer by it alone is to ignore x."""
    prior = [0.5] + [0.5 / 9] * 9
    dc, even = (classifier(prior=p, temperature=20.0) for p in (prior, None))
    full = dc(x[:20]).argmax(1)
    assert torch.equal(full, even(x[:20]).argmax(1))  # it decides nothing where all levels count
    found = predict_anytime(dc, x[:20], budget=20 * 10 * 4)
    assert not found.decided.all()
    assert (found.predictions == full).float().mean() >= 0.9
    unlikely = classifier(prior=prior[::-1])
    assert predict_anytime(unlikely, x[:3], budget=0).predictions.tolist() == [9, 9, 9]


class Levels(nn.Module):
    """Keeps the noise levels that it was told."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x, sigma, y):
        self.seen += sigma.tolist()
        return 0 * x


@pytest.mark.parametrize("count", [1, 2, 7, 32])
def test_every_beginning_is_spread_over_the_levels(count):
    levels = noise_levels(count)
    network = Levels()
    model = DiffusionModel(network, Native(), classes=2, null_class=2)
    dc = DiffusionClassifier(model, levels=levels, seed=0)
    predict_anytime(dc, torch.full((1, 1, 8, 8), 0.5), z=1e9, first=2)
    order = [levels.sigmas.index(pytest.approx(sigma)) for sigma in network.seen[::2]]
    assert sorted(order) == list(range(count))
    if count == 32:
        assert sorted(order[:4]) == [0, 8, 16, 24]


def test_bad_input(x):
    for bad in ({"z": 0}, {"first": 0}, {"budget": -1}):
        with pytest.raises(InputError):
            predict_anytime(classifier(), x[:1], **bad)
    dc = classifier()
    dc.model.network = Nan()
    with pytest.raises(InputError, match="NaN"):
        predict_anytime(dc, x[:1])
    with pytest.raises(InputError, match="seed"):
        disagreement(classifier(seed=None), x[:1])
