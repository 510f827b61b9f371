"""Bounds, radii and what they promise."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from art_denoised.smoothing.bounds import lower_confidence_bound
from art_denoised.smoothing.statistics import (
    Certificate,
    Vote,
    average_certified_radius,
    certified_accuracy,
    certified_radius,
    largest_radius,
    proportion_interval,
)

mpmath.mp.dps = 50
ALPHAS = st.floats(1e-6, 0.4)


@st.composite
def successes(draw: st.DrawFn, most: int = 1_000_000) -> tuple[int, int]:
    n = draw(st.integers(1, most))
    return draw(st.integers(1, n)), n


def tail(k: int, n: int, p: mpmath.mpf) -> mpmath.mpf:
    """P(Binomial(n, p) >= k), summed term by term in 50 digits, up to terms below 1e-30 of it."""
    term = total = mpmath.binomial(n, k) * p**k * (1 - p) ** (n - k)
    for i in range(k, n):
        term *= mpmath.mpf(n - i) / (i + 1) * p / (1 - p)
        total += term
        if term < total * mpmath.mpf(10) ** -35:  # what is left decays geometrically from here
            break
    return total


def assert_sound_and_tight(k: int, n: int, alpha: float) -> None:
    """P(Binomial(n, p) >= k) <= alpha in exact arithmetic, and no room to spare."""
    p_lower = mpmath.mpf(lower_confidence_bound(k, n, alpha))
    assert tail(k, n, p_lower) <= alpha
    assert tail(k, n, p_lower * (1 + mpmath.mpf(10) ** -11)) > alpha


@given(successes(), ALPHAS)
@settings(max_examples=40)
def test_bound_is_sound_and_tight(counts, alpha):
    assert_sound_and_tight(*counts, alpha)


@pytest.mark.parametrize("n", [100, 1000, 10_000, 100_000])
@pytest.mark.parametrize("share", [0.501, 0.6, 0.9, 0.999, 1.0])
def test_bound_is_sound_and_tight_at_the_counts_of_the_field(n, share):
    assert_sound_and_tight(round(n * share), n, 0.001)


@given(successes(), ALPHAS)
def test_bound_agrees_with_scipy(counts, alpha):
    k, n = counts
    exact = stats.binomtest(k, n, alternative="greater").proportion_ci(1 - alpha).low
    assert lower_confidence_bound(k, n, alpha) == pytest.approx(exact, rel=1e-8)
    assert lower_confidence_bound(0, n, alpha) == 0


@given(st.floats(0.5, 1, exclude_max=True), st.floats(0.01, 4))
def test_radius_is_rounded_down(p_lower, sigma):
    radius = certified_radius(p_lower, sigma)
    exact = mpmath.mpf(sigma) * mpmath.sqrt(2) * mpmath.erfinv(2 * mpmath.mpf(p_lower) - 1)
    # The bound that p_lower comes from leaves a relative 1e-12; grant it here.
    assert radius <= exact + 1e-14
    assert radius > exact - 1.001e-6
    assert float(f"{radius:.6f}") == radius


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


@given(st.dictionaries(st.integers(0, 9), st.integers(1, 500), min_size=1))
def test_vote_is_the_binomial_test(counts):
    vote = Vote.from_counts(counts, alpha=0.01, sigma=1.0, seed=0, dtype="float32")
    first, second = [*sorted(counts.values(), reverse=True), 0][:2]
    p_value = stats.binomtest(first, first + second, 0.5).pvalue
    assert vote.p_value == p_value
    assert (vote.label == -1) == (p_value > 0.01)
    if vote.label != -1:
        assert counts[vote.label] == first


def test_accuracy_over_images_by_hand():
    correct, radii = [True, True, False, True], [0.5, 0.25, 0.9, 0.0]
    assert certified_accuracy(correct, radii, 0.25)[0] == 0.5
    assert certified_accuracy(correct, radii, 0.0)[0] == 0.75
    mean, (low, high) = average_certified_radius(correct, radii)
    assert mean == 0.1875
    half = stats.t.ppf(0.975, 3) * np.std([0.5, 0.25, 0, 0], ddof=1) / 2
    assert (low, high) == pytest.approx((max(0, mean - half), mean + half))
    assert proportion_interval(0, 10).low == 0
    assert proportion_interval(10, 10).high == 1


# ------------------------------------------------------------------------------------------------
# Soundness by simulation. A trial draws the votes of a base classifier with known class
# probabilities and certifies them; a violation is a radius beyond the true one. The share of
# violations must not exceed alpha: with 4,000 trials the test rejects when the violations are
# beyond the 1 - 1e-6 quantile of Binomial(4000, alpha), so a sound procedure fails it with
# probability below 1e-6 a case (and, the streams being seeded, in every run or in none).

ALPHA, TRIALS = 0.05, 4000
LIMIT = int(stats.binom.ppf(1 - 1e-6, TRIALS, ALPHA))


def violations(probabilities, n0, n, alpha=ALPHA, reuse_selection=False) -> int:
    rng = np.random.default_rng(1)
    selections = rng.multinomial(n0, probabilities, TRIALS)
    estimations = rng.multinomial(n, probabilities, TRIALS)
    wrong = 0
    for selection, estimation in zip(selections, estimations, strict=True):
        if reuse_selection:
            selection = estimation
        certificate = Certificate.from_counts(
            counted(selection), counted(estimation), alpha=alpha, sigma=1.0, seed=0, dtype=""
        )
        if certificate.label != -1:
            true = float(stats.norm.ppf(probabilities[certificate.label]))
            wrong += certificate.radius > max(true, 0) or true <= 0
    return wrong


def counted(votes) -> dict[int, int]:
    return {int(c): int(votes[c]) for c in np.nonzero(votes)[0]}


@pytest.mark.parametrize("p", [0.3, 0.499, 0.5, 0.501, 0.55, 0.7, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("n", [20, 200])
def test_violations_stay_within_alpha(p, n):
    assert violations([p, 1 - p], n0=10, n=n) <= LIMIT


def test_many_equal_classes_stay_within_alpha():
    assert violations([0.5, *[0.5 / 9] * 9], n0=10, n=100) <= LIMIT


def test_the_simulation_sees_a_doubled_alpha():
    assert max(violations([p, 1 - p], 10, 200, alpha=2 * ALPHA) for p in (0.7, 0.9)) > LIMIT


def test_the_simulation_sees_reused_selection_samples():
    """Two equal classes: the winner of the very votes that are counted looks better than 1/2."""
    assert violations([0.5, 0.5], n0=100, n=100) <= LIMIT
    assert violations([0.5, 0.5], n0=100, n=100, reuse_selection=True) > LIMIT


def test_bound_at_huge_n_is_below_one():
    assert lower_confidence_bound(10**9, 10**9, 0.001) < 1
    assert math.isfinite(largest_radius(10**9, 0.001, 1.0))
