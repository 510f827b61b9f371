"""Exact boundaries: coverage as a number, gates, looks, and what may never prove a radius.

Coverage is computed here by a recursion of its own: the law of the votes is carried from look to
look in full, without cuts, and with the boundaries of the package. What is simulated goes through
the stop rule, as a user would.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from art_denoised import AtRadii, InputError
from art_denoised.smoothing import Draw, Stage, simulate
from art_denoised.smoothing.statistics import Look, Sequential, threshold

ALPHA = 0.05


def crossing(p: float, boundary: dict[int, int]) -> float:
    """P(the votes reach a boundary at some look), exactly, for a class of probability p."""
    alive, before, crossed = np.ones(1), 0, 0.0
    for n, votes in boundary.items():
        more = n - before
        alive, before = np.convolve(alive, stats.binom.pmf(np.arange(more + 1), more, p)), n
        crossed += float(alive[votes:].sum())
        alive[votes:] = 0.0
    return crossed


PLANS = [Sequential.upto(n) for n in (10, 40, 55, 300, 1000)]
RATIOS = [0.0, 0.25, 0.5, 1.0, 1.7, 2.5]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_a_radius_is_wrongly_proved_with_at_most_alpha(plan):
    """At the threshold, just below it, and far below it, for six radii and five levels."""
    for ratio in RATIOS:
        p0 = threshold(ratio, 1.0, 0.0)
        for alpha in (1e-6, 0.001, 0.01, 0.05, 0.3):
            boundary = plan.boundary(p0, alpha)
            for p in (p0, *(p0 * share for share in (1 - 1e-9, 0.999, 0.99, 0.95, 0.8, 0.5))):
                assert crossing(p, boundary) <= alpha
            assert crossing(min(p0 + (1 - p0) / 2, 1), boundary) >= crossing(p0, boundary)


@given(st.integers(10, 300), st.floats(0, 2.5), st.floats(1e-5, 0.4), st.floats(0.01, 1))
@settings(max_examples=100, deadline=None)
def test_coverage_at_any_plan_radius_and_probability(n, ratio, alpha, share):
    p0 = threshold(ratio, 1.0, 0.0)
    boundary = Sequential.upto(n).boundary(p0, alpha)
    assert crossing(p0 * share, boundary) <= alpha
    assert crossing(p0, boundary) <= alpha


@pytest.mark.parametrize("alpha", [0.001, 0.05])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0, 1.5])
def test_no_alpha_is_left_over(ratio, alpha):
    p0 = threshold(ratio, 1.0, 0.0)
    assert 0.9 * alpha < crossing(p0, Sequential.upto(3000).boundary(p0, alpha)) <= alpha


def test_a_single_look_is_the_binomial_test():
    for k in range(1, 11):
        proved = Sequential(10, 10).proofs([Look(10, k)], [0.2], sigma=1.0, tv=0.0, alpha=0.01)
        p_value = stats.binomtest(k, 10, stats.norm.cdf(0.2), alternative="greater").pvalue
        assert bool(proved) == (p_value <= 0.01)


def test_alpha_is_not_exceeded_by_a_billionth():
    """One vote of one has a probability of 1/4 at p0 = 1/4."""
    plan = Sequential(1, 1)
    assert plan.boundary(0.25, 0.25 * (1 + 1.5e-9)) == {1: 1}
    assert plan.boundary(0.25, 0.25 * (1 - 5e-10)) == {1: 2}


def test_noise_at_a_distance_raises_the_threshold():
    assert threshold(0.5, 0.25, 0.01) == pytest.approx(stats.norm.cdf(2) + 0.01)
    assert threshold(40.0, 1.0, 0.0) == 1.0  # no number of votes proves that
    boundary = Sequential.upto(100).boundary(1.0, ALPHA)
    assert all(votes == n + 1 for n, votes in boundary.items())


@pytest.mark.parametrize(("ratio", "n"), [(0.0, 300), (1.0, 1000), (2.0, 1000)])
def test_a_radius_is_futile_below_the_stated_chance(ratio, n):
    """Reference values: the formulas at each look, of those votes and of one less.

    With one vote less, the exact chance is small, too: votes to come are beta-binomial.
    """
    p0, plan = threshold(ratio, 1.0, 0.0), Sequential.upto(n)
    needed, futility = plan.boundary(p0, ALPHA)[n], plan.futility(p0, ALPHA)
    assert list(futility) == list(plan.counts)
    assert futility[n] == n + 1
    for look in plan.counts[:-1]:
        left, against = n - look, look * (1 - p0)
        least = 0.07 * against / (against + 100) * (1 - look / n)

        def chance(votes: int, look: int = look, left: int = left) -> float:
            wanted = needed - votes
            if wanted > left:
                return 0.0
            if wanted <= 0:
                return 1.0
            angles = [
                math.asin(math.sqrt(a / b))
                for a, b in ((votes + 0.5, look + 1), (wanted, left + 1))
            ]
            scale = math.sqrt(1 / (look + 1) + 1 / (left + 1))
            return float(stats.norm.cdf(2 * (angles[0] - angles[1]) / scale))

        fewest = futility[look]
        assert fewest > look or chance(fewest) >= least
        assert fewest == 0 or chance(fewest - 1) < least
        if fewest:
            law = stats.betabinom(left, fewest - 0.5, look - fewest + 1.5)
            assert law.sf(needed - fewest) < 0.08


def test_looks_begin_with_40_samples_and_grow_by_a_fourteenth():
    assert Sequential.upto(60).counts == (40, 43, 47, 51, 55, 60)
    assert Sequential.upto(30).counts == (30,)


@pytest.mark.parametrize("p0", [0.5, 0.9])
def test_after_n_of_a_thousand_samples_a_share_of_alpha_is_spent(p0):
    """alpha (n / 1000)^0.7, and no vote less would do: exact tails at the first two looks."""
    boundary = Sequential.upto(1000).boundary(p0, ALPHA)

    def crossed(first: int, second: int) -> float:
        """P(at least so many votes among 40 samples, or among 43)."""
        later = [stats.binom.sf(second - k - 1, 3, p0) for k in range(first)]
        early = stats.binom.pmf(np.arange(first), 40, p0)
        return float(stats.binom.sf(first - 1, 40, p0) + early @ later)

    spent = [ALPHA * (n / 1000) ** 0.7 for n in (40, 43)]
    first, second = boundary[40], boundary[43]
    assert crossed(first, 44) <= spent[0] < crossed(first - 1, 44)
    assert crossed(first, second) <= spent[1] < crossed(first, second - 1)


def test_boundaries_are_held():
    plan, again = Sequential.upto(2000), Sequential.upto(2000)
    assert plan.boundary(0.5, 0.001) is again.boundary(0.5, 0.001)


# Two radii so near each other that, at the look after 51 samples, the larger one needs fewer votes.
NEAR, FEW = (0.4, 0.41), Sequential.upto(60)


def boundaries(radii, plan, alpha=ALPHA):
    return [plan.boundary(threshold(r, 1.0, 0.0), alpha) for r in radii]


def ever_proved(p: float, plan: Sequential, radii, gated: bool) -> float:
    """P(any radius is proved), exactly; without gates each radius is tested by itself."""
    first, *others = boundaries(radii, plan)
    if not gated:
        first = {n: min(votes, *(b[n] for b in others)) for n, votes in first.items()}
    return crossing(p, first)


def test_gates_are_needed():
    p0 = threshold(NEAR[0], 1.0, 0.0)  # both radii are too large
    assert ever_proved(p0, FEW, NEAR, gated=False) > 1.05 * ALPHA
    assert ever_proved(p0, FEW, NEAR, gated=True) <= ALPHA


def test_a_radius_is_not_proved_before_all_smaller_ones():
    small, large = boundaries(NEAR, FEW)
    assert large[51] < small[51]

    def votes(draw: Draw) -> dict[int, int]:
        """What the larger radius needs after 51 samples, as late as possible, and no more."""
        total = [max(0, large[51] - max(0, 51 - n)) for n in (draw.start, draw.stop)]
        right = total[1] - total[0]
        return {0: right, 1: draw.size - right}

    stop = AtRadii(NEAR, 60, alpha=ALPHA, labels="class")
    certificate, _ = simulate(stop.procedure(0, {"sigma": 1.0}), votes)
    assert (certificate.label, certificate.proofs) == (-1, ())
    alone = AtRadii(NEAR[1:], 60, alpha=ALPHA, labels="class")
    certificate, _ = simulate(alone.procedure(0, {"sigma": 1.0}), votes)
    assert certificate.proofs == ((NEAR[1], 51, large[51]),)


def test_boundaries_hold_at_planned_looks_alone():
    plan = Sequential.upto(300)
    boundary = plan.boundary(0.5 * (1 + 1e-12), ALPHA)
    everywhere, latest = {}, 301
    for n in range(1, 301):
        latest = everywhere[n] = boundary.get(n, latest)
    assert crossing(0.5, everywhere) > 1.5 * ALPHA
    for n in (39, 41, 301):
        with pytest.raises(ValueError, match=f"after {n} samples"):
            plan.proofs([Look(n, n)], [0.0], sigma=1.0, tv=0.0, alpha=ALPHA)


def path(p: float, seed: int):
    rng, seen = np.random.default_rng(seed), []

    def votes(draw: Draw) -> dict[int, int]:
        seen.append(draw)
        k = int(rng.binomial(draw.size, p))
        return {0: k, 1: draw.size - k}

    return votes, seen


@pytest.mark.parametrize("p", [0.45, 0.52, 0.6915, 0.75, 0.99])
def test_each_look_decides_by_its_own_votes(p):
    """Sampling ends at the first look where all is proved or the next radius is out of reach.

    A procedure that peeks at the next votes before it gives up draws more, and fails here.
    """
    radii = (0.0, 0.5, 1.0)
    stop = AtRadii(radii, 2000, alpha=ALPHA, labels="class")
    limits = [threshold(r, 1.0, 0.0) for r in radii]
    for seed in range(50):
        votes, draws = path(p, seed)
        certificate, _ = simulate(stop.procedure(0, {"sigma": 1.0}), votes)
        votes, proved, total = path(p, seed)[0], 0, 0
        for draw in draws:
            total += votes(draw)[0]
            while proved < 3 and total >= stop.bound.boundary(limits[proved], ALPHA)[draw.stop]:
                proved += 1
            over = proved == 3 or total < stop.bound.futility(limits[proved], ALPHA)[draw.stop]
            assert over == (draw is draws[-1])
        assert [draw.start for draw in draws[1:]] == [draw.stop for draw in draws[:-1]]
        assert certificate.drawn == certificate.n == draws[-1].stop
        assert len(certificate.proofs) == proved


def test_a_radius_is_given_up_when_the_rest_hardly_proves_it():
    """The chance is that of a beta-binomial; the arcsine makes it about right."""
    plan, p0 = Sequential.upto(10_000), threshold(0.5, 1.0, 0.0)
    needed, futile = plan.boundary(p0, 0.001)[10_000], plan.futility(p0, 0.001)
    for n in plan.counts[10:-1:5]:
        k = np.array([futile[n] - 1, futile[n]])
        chance = stats.betabinom.sf(needed - k - 1, 10_000 - n, k + 0.5, n - k + 0.5)
        against = n * (1 - p0)
        least = 0.07 * against / (against + 100) * (1 - n / 10_000)
        assert chance[0] < 1.3 * least
        assert chance[1] > 0.7 * least
    assert futile[10_000] > 10_000


def test_what_is_certain_or_hopeless_is_decided_soon():
    plan, p0 = Sequential.upto(100_000), threshold(0.5, 1.0, 0.0)
    assert plan.futility(p0, 0.001)[40] > 0
    boundary = plan.boundary(p0, 0.001)
    assert next(n for n, votes in boundary.items() if n >= votes) < 60
    hopeless = AtRadii([0.5], labels="class").procedure(1, {"sigma": 1.0})
    certificate, samples = simulate(hopeless, lambda draw: {0: draw.size})
    assert (certificate.label, samples) == (-1, 40)


def test_the_true_class_takes_the_place_of_a_selected_one():
    asked = []

    def votes(draw: Draw) -> dict[int, int]:
        asked.append(draw.stage)
        return {4: draw.size}

    stop = AtRadii([0.5], 1000, labels="class")
    certificate, samples = simulate(stop.procedure(4, {"sigma": 1.0}), votes)
    assert set(asked) == {Stage.ESTIMATION}
    assert (certificate.label, certificate.n0, samples) == (4, 0, certificate.n)
    assert stop.settings["n0"] == 0
    with pytest.raises(InputError, match="no label"):
        stop.procedure(None, {"sigma": 1.0})
    with pytest.raises(InputError, match="n0 is 50"):
        AtRadii([0.5], 1000, n0=50, labels="class")
    with pytest.raises(InputError, match="labels is 'true'"):
        AtRadii([0.5], 1000, labels="true")


def test_at_a_smaller_alpha_less_is_proved_by_the_same_looks():
    votes = path(0.9, 0)[0]
    stop = AtRadii([0.0, 0.5, 1.0], 3000, alpha=0.3, labels="class")
    certificate, _ = simulate(stop.procedure(0, {"sigma": 1.0}), votes)
    assert len(certificate.proofs) == 3
    assert certificate.at(0.3) == certificate
    stricter = [certificate.at(0.3 / 10**i) for i in (0, 3, 6, 9)]
    proved = [len(c.proofs) for c in stricter]
    assert proved == sorted(proved, reverse=True)
    assert proved[-1] < 3
    assert stricter[-1].radius in (0.0, 0.5)
    for c in stricter:
        for radius, n, k in c.proofs:
            assert k >= c.bound.boundary(threshold(radius, 1.0, 0.0), c.alpha)[n]


def test_the_plan_is_the_one_that_the_figures_of_the_documentation_were_made_with():
    """Its constants were chosen once, on published logs (benchmarks/replay.py)."""
    plan = Sequential.upto(100_000)
    counts = plan.counts
    chosen = [counts[0], counts[20], counts[60], counts[-1]]
    assert (len(counts), chosen) == (114, [40, 177, 2753, 100_000])
    assert [plan.boundary(0.9, 0.001)[n] for n in chosen] == [41, 175, 2542, 90_340]
    assert [plan.futility(0.9, 0.001)[n] for n in chosen] == [30, 151, 2462, 100_001]
