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
from art_denoised.diffusion import Levels as DiffusionLevels
from art_denoised.rdc import disagreement, predict_anytime
from tests.rdc.test_classifier import Counting, Nan


@pytest.fixture(scope="module")
def x():
    return torch.stack([digits(train=False)[i][0] for i in range(100)])


def classifier(**options) -> DiffusionClassifier:
    return DiffusionClassifier(digits_diffusion(), **{"seed": 0, **options})


def test_it_agrees_with_all_levels_at_a_third_of_the_cost(x):
    found = predict_anytime(classifier(), x)
    assert found.nfe < found.full_nfe / 3
    assert found.decided.all()
    assert disagreement(classifier(), x) <= 0.01  # measured, not proved: 0 of 100 here


def test_the_share_of_disagreements_is_that_counted_by_hand():
    dc, options = classifier(), {"z": 0.01, "first": 1}
    x = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))  # no digits
    other = predict_anytime(dc, x, **options).predictions != dc(x).argmax(1)
    assert 1 < other.sum() < 40
    assert disagreement(dc, x, **options) == pytest.approx(float(other.sum()) / 40)


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


@pytest.mark.parametrize("temperature", [5.0, 10.0, 20.0, 40.0])
def test_the_prior_counts_once_where_there_is_one_level(x, temperature):
    dc = classifier(levels=noise_levels(1), prior=[0.5] + [0.5 / 9] * 9, temperature=temperature)
    assert torch.equal(predict_anytime(dc, x).predictions, dc(x).argmax(1))


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


@pytest.mark.parametrize("count", [1, 2, 3, 7, 32])
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


class Given(nn.Module):
    """Class 0 is right; the error of class 1 rises and falls around ``mean`` by 1 as levels go."""

    def __init__(self, sigmas, mean):
        super().__init__()
        self.sigmas, self.mean, self.seen = sigmas, mean, []

    def forward(self, x, sigma, y):
        for one in sigma.tolist():
            level = self.sigmas.index(pytest.approx(one))
            if level not in self.seen:
                self.seen.append(level)
        place = torch.tensor([self.seen.index(self.sigmas.index(pytest.approx(s))) for s in sigma])
        error = (self.mean + (-1.0) ** place) * y
        return error.sqrt().reshape(-1, 1, 1, 1).expand_as(x)


def given_losses(mean, **options) -> DiffusionClassifier:
    levels = DiffusionLevels(tuple((1 + torch.arange(16)).tolist()), (1.0,) * 16)
    model = DiffusionModel(Given(levels.sigmas, mean), Native(), classes=2)
    return DiffusionClassifier(model, levels=levels, seed=0, **options)


GREY = torch.full((1, 1, 1, 1), 0.5)  # 0 in [-1, 1]


@pytest.mark.parametrize(("mean", "levels"), [(1.8, 4), (1.65, 8)])
def test_a_class_is_dropped_at_three_standard_errors_of_a_finite_population(mean, levels):
    """By hand: after 4 of 16 levels the sum is 4 mean, its error (4 / 3)^.5 (4 (1 - 4 / 16))^.5.

    So 1.5 is the smallest mean at z = 3. It is 1.73 at z = 3.46, and after 8 levels 0.92.
    """
    found = predict_anytime(given_losses(mean), GREY, z=3.46, first=4)
    assert (found.nfe, found.full_nfe) == (2 * levels, 32)
    assert found.predictions.tolist() == [0]
    assert found.decided.all()


def test_a_prior_weighs_as_much_as_the_temperature_makes_it():
    """The losses differ by 16 * 2 in all, over a temperature of 16 by 2, which is below ln 9."""
    options = {"prior": [0.1, 0.9], "temperature": 16.0}
    assert given_losses(2.0, **options)(GREY).argmax(1).tolist() == [1]
    found = predict_anytime(given_losses(2.0, **options), GREY, z=1e9)
    assert found.predictions.tolist() == [1]
    assert found.decided.all()
    assert predict_anytime(given_losses(2.0), GREY, z=1e9).predictions.tolist() == [0]


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
