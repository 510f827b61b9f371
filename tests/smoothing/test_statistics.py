"""Bounds, radii and what they promise."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from art_denoised.checks import InputError
from art_denoised.smoothing.statistics import (
    Certificate,
    Look,
    Proof,
    Sequential,
    Vote,
    average_certified_radius,
    certified_accuracy,
    certified_radius,
    lower_confidence_bound,
    proportion_interval,
)

mpmath.mp.dps = 50


@given(st.floats(0.5, 1, exclude_max=True), st.floats(0.01, 4))
def test_radius_is_rounded_down(p_lower, sigma):
    radius = certified_radius(p_lower, sigma)
    exact = mpmath.mpf(sigma) * mpmath.sqrt(2) * mpmath.erfinv(2 * mpmath.mpf(p_lower) - 1)
    # The bound that p_lower comes from leaves a relative 1e-12; grant it here.
    assert radius <= exact + 1e-14
    assert radius > exact - 1.001e-6
    assert float(f"{radius:.6f}") == radius


def largest_radius(n: int, alpha: float, sigma: float) -> float:
    return certified_radius(lower_confidence_bound(n, n, alpha), sigma)


@pytest.mark.parametrize(("n", "ratio"), [(100, 1.50), (1000, 2.46), (10_000, 3.20), (10**5, 3.81)])
def test_largest_radii_of_the_field(n, ratio):
    assert largest_radius(n, 0.001, 1.0) == pytest.approx(ratio, abs=0.005)


def test_certificate_needs_more_than_half():
    options = {"alpha": 0.001, "sigma": 1.0, "seed": 0, "dtype": "float32"}
    abstained = Certificate.from_counts({1: 9, 2: 1}, {1: 540, 2: 460}, **options)
    assert (abstained.label, abstained.radius) == (-1, 0.0)
    assert abstained.counts == {1: 540, 2: 460}
    never_seen_again = Certificate.from_counts({1: 9, 2: 1}, {2: 1000}, **options)
    assert (never_seen_again.label, never_seen_again.p_lower) == (-1, 0.0)
    certain = Certificate.from_counts({1: 10}, {1: 1000}, **options)
    assert (certain.label, certain.radius) == (1, largest_radius(1000, 0.001, 1.0))
    assert (certain.n0, certain.n) == (10, 1000)


def test_a_certificate_by_hand():
    options = {"alpha": 0.001, "sigma": 0.25, "seed": 3, "dtype": "bfloat16"}
    made = Certificate.from_counts({3: 98, 5: 2}, {3: 990, 5: 10}, **options)
    p_lower = stats.beta.ppf(0.001, 990, 11)  # Clopper and Pearson
    assert made.p_lower == pytest.approx(p_lower, rel=1e-9)
    assert made.radius == pytest.approx(0.25 * stats.norm.ppf(p_lower), abs=1.001e-6)
    assert (made.label, made.n0, made.n, made.drawn) == (3, 100, 1000, 1000)
    assert (made.alpha, made.sigma, made.seed, made.dtype) == tuple(options.values())
    assert made.proves(made.radius)
    assert not made.proves(made.radius + 1e-6)
    unanswered = Certificate.from_counts({-1: 10}, {-1: 1000}, **options)
    assert (unanswered.label, unanswered.radius, unanswered.p_lower) == (-1, 0.0, 0.0)
    assert not unanswered.proves(0.0)
    void = Certificate.from_counts({3: 10}, {3: 1000}, tv=1.0, **options)
    assert (void.label, void.p_lower) == (-1, 0.0)


def test_a_certificate_of_a_table_by_hand():
    proofs = [Proof(0.25, 100, 99), Proof(0.3, 400, 398), Proof(0.5, 400, 398)]
    rest = {"alpha": 0.001, "sigma": 0.5}
    made = Certificate.from_proofs(
        3, {3: 10}, {3: 398, 1: 2}, proofs, bound=Sequential(100, 400), **rest
    )
    assert (made.label, made.radius, made.drawn) == (3, 0.5, 400)
    assert made.p_lower == pytest.approx(0.8413447460685429, rel=1e-14)  # Phi(0.5 / 0.5)
    none = Certificate.from_proofs(3, {3: 10}, {3: 400}, [], bound=Sequential(100, 400), **rest)
    assert (none.label, none.radius, none.p_lower, none.drawn) == (-1, 0.0, 0.0, 400)


class Noted(Sequential):
    """Looks that note what they are asked, and prove the first radius."""

    asked: ClassVar[list[tuple]] = []

    def proofs(self, looks, radii, *, sigma, tv, alpha):
        self.asked.append((looks, radii, sigma, tv, alpha))
        return [Proof(radius, 100, 99) for radius in radii[:1]]


@pytest.mark.parametrize("last", [400, 1000])
def test_a_table_at_another_alpha_is_asked_at_its_own_looks(last):
    proofs = [Proof(0.25, 100, 99), Proof(0.3, 400, 398), Proof(0.5, 400, 398)]
    made = Certificate.from_proofs(
        3, {3: 10}, {3: last - 5, 1: 5}, proofs, bound=Noted(100, 1000), alpha=0.01, sigma=0.5,
        noise="quantised", tv=0.01,
    )  # fmt: skip
    again = made.at(0.001)
    looks = [Look(100, 99), Look(400, 398), Look(400, 398)]
    looks += [Look(1000, 995)] * (last == 1000)
    assert Noted.asked[-1] == (looks, [0.25, 0.3, 0.5], 0.5, 0.01, 0.001)
    assert (again.label, again.radius, again.alpha, again.tv) == (3, 0.25, 0.001, 0.01)


def test_a_table_without_proofs_has_no_looks_at_another_alpha():
    bound = Noted(100, 1000)
    made = Certificate.from_proofs(3, {3: 1}, {3: 50}, [], bound=bound, alpha=0.01, sigma=0.5)
    assert made.at(0.001).label == -1
    assert Noted.asked[-1] == ([], [], 0.5, 0.0, 0.001)
    unseen = replace(made, proofs=(Proof(0.25, 10, 10),), counts={1: 50}, label=3)
    unseen.at(0.001)
    assert Noted.asked[-1][0] == [Look(10, 10), Look(50, 0)]


def test_one_half_is_no_majority():
    even = SimpleNamespace(p_lower=lambda votes, n, alpha: 0.5)
    made = Certificate.from_counts({3: 1}, {3: 9}, bound=even, alpha=0.01, sigma=1.0)
    assert (made.label, made.radius, made.p_lower) == (-1, 0.0, 0.5)
    stated = Certificate(3, 0.1, 0.6, {3: 1}, {3: 9}, 0.01, 1.0, 0, "float32", even)
    assert (stated.noise, stated.tv, stated.drawn, stated.proofs) == ("gaussian", 0.0, 0, ())


def test_the_seed_is_zero_unless_it_is_given():
    rest, bound = {"alpha": 0.01, "sigma": 1.0}, Sequential(1, 2)
    assert Certificate.from_counts({3: 1}, {3: 9}, **rest).seed == 0
    assert Certificate.from_proofs(3, {3: 1}, {3: 9}, [], bound=bound, **rest).seed == 0
    assert Vote.from_counts({3: 9}, **rest).seed == 0


def test_what_was_drawn_stays_at_another_alpha():
    made = Certificate.from_counts({3: 10}, {3: 1000}, alpha=0.001, sigma=0.25, seed=2)
    again = replace(made, drawn=2000).at(0.01)
    assert (again.drawn, again.alpha, again.seed) == (2000, 0.01, 2)
    assert again.p_lower == pytest.approx(0.01 ** (1 / 1000))


@given(st.dictionaries(st.integers(0, 9), st.integers(1, 500), min_size=1))
def test_vote_is_the_binomial_test(counts):
    vote = Vote.from_counts(counts, alpha=0.01, sigma=1.0, seed=0, dtype="float32")
    first, second = [*sorted(counts.values(), reverse=True), 0][:2]
    p_value = stats.binomtest(first, first + second, 0.5).pvalue
    assert vote.p_value == p_value
    assert (vote.label == -1) == (p_value > 0.01)
    if vote.label != -1:
        assert counts[vote.label] == first


def test_a_vote_by_hand():
    vote = Vote.from_counts({1: 9, 2: 1}, alpha=22 / 1024, sigma=0.25)  # 2 (1 + 10) / 2^10
    assert (vote.label, vote.p_value) == (1, pytest.approx(22 / 1024))
    assert Vote.from_counts({1: 9, 2: 1}, alpha=vote.p_value, sigma=0.25).label == 1
    assert Vote.from_counts({1: 9, 2: 1}, alpha=0.021, sigma=0.25).label == -1
    tie = Vote.from_counts({1: 5, 2: 5}, alpha=0.4, sigma=0.25)
    assert (tie.label, tie.p_value) == (-1, 1.0)


@pytest.mark.parametrize(
    ("counts", "label"),
    [
        ({}, -1),
        ({-1: 900}, -1),
        ({-1: 900, 3: 60, 5: 55}, -1),  # mostly unanswered: nothing is the most frequent answer
        ({-1: 60, 3: 900, 5: 55}, 3),
        ({-1: 500, 3: 501}, -1),
    ],
)
def test_votes_without_an_answer_elect_nothing(counts, label):
    assert Vote.from_counts(counts, alpha=0.001, sigma=0.25).label == label


def test_the_distance_of_the_noise_is_subtracted_from_the_bound():
    options = {"alpha": 0.001, "sigma": 1.0}
    exact = Certificate.from_counts({1: 10}, {1: 1000}, **options)
    near = Certificate.from_counts({1: 10}, {1: 1000}, **options, noise="quantised", tv=0.1)
    assert near.p_lower == exact.p_lower - 0.1
    assert near.radius == certified_radius(exact.p_lower - 0.1, 1.0)
    assert near.at(0.001).radius == near.radius
    far = Certificate.from_counts({1: 10}, {1: 1000}, **options, noise="quantised", tv=0.6)
    assert (far.label, far.radius) == (-1, 0.0)


def test_accuracy_over_images_by_hand():
    correct, radii = [True, True, False, True], [0.5, 0.25, 0.9, 0.0]
    assert certified_accuracy(correct, radii, 0.25)[0] == 0.5
    assert certified_accuracy(correct, radii, 0.0)[0] == 0.75
    mean, (low, high) = average_certified_radius(correct, radii)
    assert mean == 0.1875
    half = stats.t.ppf(0.975, 3) * np.std([0.5, 0.25, 0, 0], ddof=1) / 2
    assert (low, high) == pytest.approx((max(0, mean - half), mean + half))
    assert average_certified_radius([True], [0.5]) == (0.5, (0.0, math.inf))
    two, (low, high) = average_certified_radius([True, True], [1.0, 1.2])
    half = 12.706204736432095 * 0.1  # t of one degree of freedom, standard error of the mean
    assert (two, low, high) == pytest.approx((1.1, 0.0, 1.1 + half))
    assert proportion_interval(0, 10).low == 0
    # (alpha / 2)^(1 / n), and its opposite
    assert proportion_interval(10, 10).low == pytest.approx(0.025**0.1)
    assert proportion_interval(0, 10, 0.9).high == pytest.approx(1 - 0.05**0.1)
    assert proportion_interval(10, 10).high == 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: lower_confidence_bound(9, 10, True), "alpha is True"),
        (lambda: lower_confidence_bound(9, 10, math.nan), "alpha is nan"),
        (lambda: lower_confidence_bound(9, 10, 1), "alpha is 1"),
        (lambda: lower_confidence_bound(11, 10, 0.001), "k is 11"),
        (lambda: lower_confidence_bound(-1, 10, 0.001), "k is -1"),
        (lambda: lower_confidence_bound(9.5, 10, 0.001), r"k is 9\.5"),
        (lambda: certified_radius(math.nan, 0.25), "p_lower is nan"),
        (lambda: certified_radius(1, 0.25), "p_lower is 1"),
        (lambda: certified_radius(0.9, -1), "sigma is -1"),
        (lambda: proportion_interval(3, 10, True), "confidence is True"),
        (lambda: proportion_interval(3, 10, 95), "confidence is 95"),
        (lambda: proportion_interval(11, 10), "k is 11"),
        (lambda: average_certified_radius([True], [0.5], "x"), "confidence is 'x'"),
        (lambda: average_certified_radius([True], [math.nan]), "radius is nan"),
        (lambda: certified_accuracy([True, False], [0.5], 0.1), "2 images and 1 radii"),
        (lambda: certified_accuracy([True], [0.5, 0.9], 0.1), "1 images and 2 radii"),
        (lambda: certified_accuracy([7, 3], [0.5, 0.9], 0.1), "correct holds .*7"),  # classes
        (lambda: certified_accuracy(["False"], [0.5], 0.1), "correct holds .*False"),
        (lambda: certified_accuracy([], [], 0.1), "no images"),
        (lambda: certified_accuracy([True], [0.5], math.nan), "radius is nan"),
        (lambda: certified_accuracy([True], [0.5], True), "radius is True"),
    ],
)
def test_what_is_no_count_share_or_radius_is_refused(call, words):
    with pytest.raises(InputError, match=words):
        call()


def test_columns_may_be_of_any_kind():
    correct, radii = [True, False, True], [0.5, 0.9, 0.1]
    expected = certified_accuracy(correct, radii, 0.25)
    assert expected[0] == 1 / 3
    for kind in (np.asarray, torch.tensor, iter):
        assert certified_accuracy(kind(correct), kind(radii), np.float32(0.25)) == expected
    assert certified_accuracy([1, 0, 1], radii, torch.tensor(0.25)) == expected
    assert lower_confidence_bound(np.int64(9), torch.tensor(10), 0.001) == lower_confidence_bound(
        9, 10, 0.001
    )


def test_bound_at_huge_n_is_below_one():
    assert lower_confidence_bound(10**9, 10**9, 0.001) < 1
    assert math.isfinite(largest_radius(10**9, 0.001, 1.0))
