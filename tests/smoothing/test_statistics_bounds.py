"""Lower bounds: exact in 50 digits, and never more often wrong than alpha, computed exactly.

Coverage is not simulated here. The distribution of the votes at each look is carried forward in
full, so the probability that any of the bounds exceeds the true one is a number, and it is compared
with alpha. A bound that spends alpha twice fails, and tests show that it does.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from art_denoised.smoothing.statistics import Looks, Mixture, lower_confidence_bound

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


@given(st.integers(1, 10_000), st.integers(0, 1_000_000), st.floats(1e-9, 0.4))
def test_looks_share_alpha(first, more, alpha):
    looks = Looks(first, first + more)
    counts = looks.counts
    assert counts[0] == first
    assert counts[-1] == first + more
    assert list(counts) == sorted(set(counts))
    assert sum(looks.level(n, alpha) for n in counts) <= alpha * (1 + 1e-12)
    assert sum(looks.level(n, alpha) for n in counts) == pytest.approx(alpha)


def test_looks_grow_by_a_factor_and_the_last_one_by_its_root_at_least():
    assert Looks(100, 1000).counts == (100, 150, 225, 338, 507, 761, 1000)
    assert Looks.upto(900).counts == (100, 150, 225, 338, 507, 900)
    assert Looks.upto(7).counts == (7,)


def test_a_look_that_was_not_planned_has_no_bound():
    with pytest.raises(ValueError, match="no look was planned after 120 samples"):
        Looks(100, 1000).p_lower(110, 120, 0.001)


def test_a_single_look_is_clopper_pearson():
    assert Looks.fixed(1000).p_lower(900, 1000, 0.01) == lower_confidence_bound(900, 1000, 0.01)


def first_from(near: int, end: int, holds: Callable[[int], bool]) -> int:
    """The first number below ``end`` from which on something holds, asked about few numbers."""
    low, high, step = near - 1, near, 1
    while low >= 0 and holds(low):
        low, high, step = low - step, low, 2 * step
    while high < end and not holds(high):
        low, high, step = high, high + step, 2 * step
    low, high = max(low, -1), min(high, end)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def ever_above(p: float, looks: tuple[int, ...], p_lower: Callable[[int, int], float]) -> float:
    """P(some look's bound exceeds p) for votes of probability p, exactly: a walk with a barrier."""
    below, n = np.ones(1), 0  # distribution of the votes on paths that never exceeded p
    fewest = 0  # votes whose bound exceeds p, which it grows with
    for look in looks:
        below = np.convolve(below, stats.binom.pmf(np.arange(look - n + 1), look - n, p))
        n = look
        fewest = first_from(fewest, n + 1, lambda k, n=n: p_lower(k, n) > p)
        below[fewest:] = 0.0
    return 1 - float(below.sum())


PROBABILITIES = [0.05, 0.3, 0.499, 0.5, 0.501, 0.6, 0.8, 0.9, 0.97, 0.999]


@pytest.mark.parametrize("p", PROBABILITIES)
@pytest.mark.parametrize("looks", [Looks(20, 300), Looks(100, 3000), Looks.fixed(50)], ids=str)
def test_looks_are_wrong_together_with_at_most_alpha(p, looks):
    for alpha in (0.001, 0.05, 0.3):
        wrong = ever_above(p, looks.counts, lambda k, n, a=alpha: looks.p_lower(k, n, a))
        assert wrong <= alpha


@pytest.mark.parametrize("p", PROBABILITIES)
@pytest.mark.parametrize("bound", [Mixture(), Mixture(0.5, 0.5), Mixture(20.0, 1.0)], ids=str)
def test_anytime_is_wrong_with_at_most_alpha_however_often_it_is_looked_at(p, bound):
    for alpha in (0.05, 0.3):
        every = tuple(range(1, 400))
        assert ever_above(p, every, lambda k, n, a=alpha: bound.p_lower(k, n, a)) <= alpha


def test_the_walk_sees_alpha_spent_twice():
    """Unsound procedures that are in use: alpha at every look, and stopping whenever one likes."""
    looks, alpha = Looks(20, 300), 0.05
    twice = [
        ever_above(p, looks.counts, lambda k, n: lower_confidence_bound(k, n, alpha))
        for p in PROBABILITIES
    ]
    assert max(twice) > 2 * alpha
    anyhow = ever_above(0.5, tuple(range(1, 400)), lambda k, n: lower_confidence_bound(k, n, alpha))
    assert anyhow > 3 * alpha
    half = [
        ever_above(p, looks.counts, lambda k, n: looks.p_lower(k, n, 2.5 * alpha))
        for p in PROBABILITIES
    ]
    assert max(half) > alpha  # and the plan leaves less than that to spare


def log_mixture(bound: Mixture, k: int, n: int, p: mpmath.mpf) -> mpmath.mpf:
    """log M_n(p), in 50 digits."""
    a, b = mpmath.mpf(bound.a), mpmath.mpf(bound.b)
    evidence = mpmath.log(mpmath.beta(a + k, b + n - k)) - mpmath.log(mpmath.beta(a, b))
    failures = (n - k) * mpmath.log(1 - p) if n > k else 0
    return evidence - k * mpmath.log(p) - failures


def assert_anytime_is_sound_and_tight(bound: Mixture, k: int, n: int, alpha: float) -> None:
    p_lower, limit = mpmath.mpf(bound.p_lower(k, n, alpha)), mpmath.log(1 / mpmath.mpf(alpha))
    assert p_lower == 0 or log_mixture(bound, k, n, p_lower) >= limit
    closer = p_lower + (mpmath.mpf(k) / n - p_lower) * mpmath.mpf(10) ** -6 + 4e-12
    assert log_mixture(bound, k, n, closer) < limit


@given(successes(), ALPHAS, st.sampled_from([Mixture(), Mixture(0.5, 0.5)]))
@settings(max_examples=60)
def test_anytime_is_sound_and_tight_in_exact_arithmetic(counts, alpha, bound):
    assert_anytime_is_sound_and_tight(bound, *counts, alpha)


@pytest.mark.parametrize("n", [1, 100, 10_000, 10_000_000])
@pytest.mark.parametrize("failures", [0, 1, 7])
def test_anytime_is_sound_and_tight_near_certainty(n, failures):
    assert_anytime_is_sound_and_tight(Mixture(), max(n - failures, 1), n, 0.001)


def test_the_default_prior_is_beta_2_and_three_tenths():
    """M_1(p) = 2 / (2 + 0.3) / p after one vote of one."""
    assert Mixture().p_lower(1, 1, 0.1) == pytest.approx(0.1 * 2 / 2.3, rel=1e-10)


@pytest.mark.parametrize("weight", [1e-300, 1e-17, 1e-5, 1.0, 1e5, 1e300])
def test_anytime_is_sound_with_priors_of_any_weight(weight):
    """M_1(p) = 1 / (2 p) after one vote of one, for all symmetric priors: at most alpha / 2."""
    bound = Mixture(weight, weight).p_lower(1, 1, 0.1)
    assert 0 <= bound <= 0.05
    if 1e-5 <= weight <= 1e5:
        assert bound == pytest.approx(0.05, rel=1e-7)


@given(successes(100_000), ALPHAS)
def test_anytime_costs_more_than_a_fixed_number(counts, alpha):
    assert Mixture().p_lower(*counts, alpha) <= lower_confidence_bound(*counts, alpha)


def test_bounds_at_huge_n_are_below_one():
    for p_lower in (lower_confidence_bound, Mixture().p_lower, Looks.fixed(10**9).p_lower):
        assert 0.999 < p_lower(10**9, 10**9, 0.001) < 1
    assert math.isfinite(Mixture().p_lower(10**9 - 5, 10**9, 0.001))
    assert Mixture().p_lower(0, 10, 0.001) == 0
