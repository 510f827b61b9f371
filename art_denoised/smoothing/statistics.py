"""Counts in, certificates out: the statistics of randomized smoothing as pure functions.

A certificate is a lower bound on the probability of a class, put through Theorem 1 of Cohen et al.
The bounds, of which docs/explanation/sequential.md has the theorems:

- all samples first, then one bound: Clopper-Pearson, `Looks.fixed`;
- a bound that holds at all sample counts at once, whoever stops for whatever reason: `Mixture`
  (Ville's inequality for a beta-binomial mixture martingale);
- exact group-sequential tests for tables of radii: `Sequential`;
- `Looks` at several sample counts, by which earlier versions certified tables of radii. Nothing
  writes them any more.

Every bound is rounded down, the safe direction.

Sources: Cohen, Rosenfeld, Kolter, "Certified Adversarial Robustness via Randomized Smoothing"
(ICML 2019, arXiv 1902.02918), section 3.2; abstention of Predict after its Proposition 1. Of
`Sequential`: Jennison and Turnbull, "Group Sequential Methods" (2000), section 12.1 (exact binomial
tests); Lan and DeMets (Biometrika 1983, error spending); Maurer, Hothorn and Lehmacher (1995, fixed
sequences).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import ROUND_FLOOR, Decimal
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from scipy import optimize, special, stats

from art_denoised import checks
from art_denoised.checks import InputError

# Above the error of scipy's inverse incomplete beta function (checked against mpmath in the
# tests), below anything that matters to a radius.
_SAFETY = 1e-12
_FACTOR = 1.5  # between one look and the next
_LAST_SHARE = 0.5  # of alpha that the last look gets: there the most certificates are decided
# Of `Sequential`: chosen with benchmarks/replay.py (docs/decisions/0009-exact-boundaries.md).
_FIRST = 40  # samples at the first look
_GROWTH = 1.07  # between one look and the next
_SPENDING = 0.7  # of alpha, (n / N)^_SPENDING may be spent until n of N samples
_FUTILE = 0.07  # chance below which a radius is given up, at most
_PATIENCE = 100  # votes against the class, expected at p0, at which half of that chance suffices
_CUT = 1e-14  # share of alpha that each cut of a tail may lose
_SLACK = 1e-9  # share of alpha that is not spent: more than all cuts and rounding errors
_ROUNDING = 1e-12  # above the error of p0
ABSTAIN = -1
"""Label of an abstention."""
_DECIMALS = 6


def lower_confidence_bound(k: int, n: int, alpha: float) -> float:
    """One-sided Clopper-Pearson lower bound on a probability after k successes in n trials.

    The bound p satisfies P(Binomial(n, p) >= k) <= alpha, also in floating point: it lies a
    relative 1e-12 below scipy's value.

    Args:
        k: Successes, 0 <= k <= n.
        n: Trials, at least 1.
        alpha: Failure probability in (0, 1).

    Raises:
        InputError: A value is out of range.

    Example:
        >>> round(lower_confidence_bound(1000, 1000, 0.001), 6)  # 0.001 ** (1 / 1000)
        0.993116
    """
    k, n = checks.successes(k, n)
    alpha = checks.share("alpha", alpha)
    if k == 0:
        return 0.0
    return float(special.betaincinv(k, n - k + 1, alpha)) * (1 - _SAFETY)


@dataclass(frozen=True, slots=True)
class Looks:
    """Clopper-Pearson at sample counts planned beforehand, which share alpha (a union bound).

    The counts grow by a factor 1.5 from ``first`` to ``last``. The last look gets half of alpha,
    the others share the rest equally; a single look gets all of it.
    """

    first: int
    last: int

    @classmethod
    def upto(cls, n: int) -> Looks:
        """Return the looks that earlier versions planned for at most ``n`` samples."""
        return cls(min(100, n), n)

    @classmethod
    def fixed(cls, n: int) -> Looks:
        """Return the plan with a single look at ``n`` samples."""
        return cls(n, n)

    @property
    def counts(self) -> tuple[int, ...]:
        """Sample counts of the looks, ascending."""
        return _counts(self.first, self.last, _FACTOR)

    def level(self, n: int, alpha: float) -> float:
        """Return the part of ``alpha`` that is spent at the look after ``n`` samples."""
        counts = self.counts
        if n not in counts:
            raise ValueError(f"no look was planned after {n} samples, but after {counts}")
        if len(counts) == 1:
            return alpha
        if n == self.last:
            return alpha * _LAST_SHARE
        return alpha * (1 - _LAST_SHARE) / (len(counts) - 1)

    def p_lower(self, k: int, n: int, alpha: float) -> float:
        """Bound the probability after ``k`` successes at the look after ``n`` samples."""
        return lower_confidence_bound(k, n, self.level(n, alpha))


@lru_cache
def _counts(first: int, last: int, growth: float) -> tuple[int, ...]:
    """Return sample counts that grow by a factor from the first to the last."""
    counts = [first]
    while (following := math.ceil(counts[-1] * growth)) * math.sqrt(growth) <= last:
        counts.append(following)
    return tuple(counts) if first == last else (*counts, last)


@dataclass(frozen=True, slots=True)
class Mixture:
    """A bound that holds at all sample counts at once: a beta-binomial mixture.

    For a true probability p the mixture likelihood ratio

        M_n(p) = B(a + k, b + n - k) / B(a, b) / (p^k (1 - p)^(n - k))

    is a nonnegative martingale of mean 1, so with probability at least 1 - alpha it stays below
    1/alpha for ever (Ville 1939). The bound is the smallest p with M_n(p) < 1/alpha (Robbins 1970,
    "Statistical methods related to the law of the iterated logarithm"). It may be looked
    at after every sample, sampling may stop for any reason, and may go on later. The default
    Beta(a, b) prior expects probabilities near 1, where radii are large; any prior is sound.
    """

    a: float = 2.0
    b: float = 0.3

    def p_lower(self, k: int, n: int, alpha: float) -> float:
        """Bound the probability after ``k`` successes among ``n`` samples, for all n together."""
        if k == 0:
            return 0.0
        a, b = self.a, self.b
        evidence = float(special.betaln(a + k, b + n - k) - special.betaln(a, b))
        # log-gamma values of this size are rounded at 1e-16 of it; stay above what that can change.
        margin = 1e-14 * (a + b + n) * math.log(a + b + n + 1)
        target = evidence + math.log(alpha) - margin

        def excess(p: float) -> float:  # log M_n(p) - log(1 / alpha) + margin, falling in p
            return target - float(special.xlogy(k, p) + special.xlog1py(n - k, -p))

        top = k / n
        if excess(top) >= 0:  # the margin outweighs the evidence: only at astronomical n
            return 0.0
        low = math.exp(target / k) / 2  # the root lies above exp(target / k)
        root = float(optimize.brentq(excess, low, top, xtol=1e-15, rtol=1e-14))
        return max(root * (1 - _SAFETY) - 2e-15, 0.0)


class Look(NamedTuple):
    """The votes for the class among the first ``n`` samples."""

    n: int
    votes: int


class Proof(NamedTuple):
    """A radius, and the look at which it was proved."""

    radius: float
    n: int
    votes: int


@dataclass(frozen=True, slots=True)
class Sequential:
    """Exact tests at sample counts that grow from ``first`` to ``last``.

    A radius r is proved by rejecting p <= p0 = Phi(r / sigma), at the first look where the votes
    reach a boundary. The probability that they ever do is computed exactly, by recursion over the
    looks: it is at most alpha at p0, hence at every smaller p. The radii of a table are tested in
    ascending order, each at the full alpha, the next one only once the last is proved
    (fixed-sequence gatekeeping).
    """

    first: int
    last: int

    @classmethod
    def upto(cls, n: int) -> Sequential:
        """Return the looks that are planned for at most ``n`` samples."""
        return cls(min(_FIRST, n), n)

    @property
    def counts(self) -> tuple[int, ...]:
        """Sample counts of the looks, ascending."""
        return _counts(self.first, self.last, _GROWTH)

    def boundary(self, p0: float, alpha: float) -> Mapping[int, int]:
        """Return the votes that reject p <= ``p0``, by the sample counts of the looks."""
        return _boundary(self.counts, p0, alpha)

    def futility(self, p0: float, alpha: float) -> Mapping[int, int]:
        """Return the votes below which p <= ``p0`` will hardly be rejected any more."""
        return _futility(self.counts, p0, alpha)

    def proofs(
        self,
        looks: Sequence[Look],
        radii: Iterable[float],
        *,
        sigma: float,
        tv: float,
        alpha: float,
    ) -> tuple[Proof, ...]:
        """Prove ascending radii in their order, until no look reaches the boundary of one.

        ``tv`` bounds the distance of the sampled noise from exact noise; ``alpha`` is the failure
        probability of all proofs together. A look that was not planned is a ValueError.
        """
        found: list[Proof] = []
        for radius in radii:
            boundary = self.boundary(threshold(radius, sigma, tv), alpha)
            for n, votes in looks:
                if n not in boundary:
                    raise ValueError(f"no look was planned after {n} samples")
                if votes >= boundary[n]:
                    found.append(Proof(radius, n, votes))
                    break
            else:  # the gate: larger radii are not even tested
                break
        return tuple(found)

    def is_futile(
        self, look: Look, radius: float, *, sigma: float, tv: float, alpha: float
    ) -> bool:
        """Return whether a radius that is not proved yet should be given up after a look."""
        return look.votes < self.futility(threshold(radius, sigma, tv), alpha)[look.n]


def threshold(radius: float, sigma: float, tv: float) -> float:
    """Return the probability that must be exceeded to prove a radius, rounded up.

    Samples of noise at a distance ``tv`` of exact noise vote with a probability that is at most
    that much larger.
    """
    return min(float(special.ndtr(radius / sigma)) * (1 + _ROUNDING) + tv, 1.0)


@lru_cache(maxsize=1024)
def _boundary(counts: tuple[int, ...], p0: float, alpha: float) -> Mapping[int, int]:
    """Return the smallest boundaries whose crossing costs no more than what may be spent so far.

    At a look after n of N samples, alpha (n / N)^_SPENDING may be spent in all. What a look leaves,
    because votes are whole numbers, is there for the next ones.
    """
    boundary: dict[int, int] = {}
    law, low, spent = np.ones(1), 0, 0.0  # law[i] = P(votes are low + i, no boundary crossed yet)
    for before, n in zip((0, *counts), counts, strict=False):
        draw, start = _binomial(n - before, p0, alpha * _CUT)
        law, low = np.convolve(law, draw), low + start
        crossing = np.cumsum(law[::-1])[::-1]  # P(votes are at least low + i, none crossed yet)
        left = alpha * (1 - _SLACK) * (n / counts[-1]) ** _SPENDING - spent
        first = int(np.searchsorted(-crossing, -left))
        boundary[n] = low + first
        spent += float(crossing[first : first + 1].sum())
        law = law[:first]
        cut = int(np.searchsorted(np.cumsum(law), alpha * _CUT))
        law, low = law[cut:], low + cut
    return MappingProxyType(boundary)  # every caller gets the same one


def _binomial(n: int, p: float, cut: float) -> tuple[np.ndarray, int]:
    """Return the law of the votes among n samples up to tails of ``cut``, and where it begins."""
    low, high = int(stats.binom.ppf(cut, n, p)), int(stats.binom.isf(cut, n, p))
    return stats.binom.pmf(np.arange(low, high + 1), n, p), low


@lru_cache(maxsize=1024)
def _futility(counts: tuple[int, ...], p0: float, alpha: float) -> Mapping[int, int]:
    """Return the fewest votes that leave enough chance to reach the last boundary."""
    # Little chance is enough while few votes against the class are expected, because one more or
    # less then moves the chance far. Bisection at all looks at once; after the last look nothing is
    # left to wait for.
    n, last = np.array(counts[:-1], float), counts[-1]
    needed = _boundary(counts, p0, alpha)[last]
    against = n * (1 - p0)
    least = _FUTILE * against / (against + _PATIENCE) * (1 - n / last)
    low, high = np.zeros(len(n)), n + 1
    for _ in range(last.bit_length() + 1):
        votes = np.floor((low + high) / 2)
        enough = _chance(votes, n, last, needed) >= least
        low, high = np.where(enough, low, votes), np.where(enough, votes, high)
    fewest = dict(zip(counts, (*high.astype(int).tolist(), last + 1), strict=True))
    return MappingProxyType(fewest)


def _chance(votes: np.ndarray, n: np.ndarray, last: int, needed: int) -> np.ndarray:
    """Return the chance that the remaining samples bring ``needed`` votes, given those so far.

    The votes to come are beta-binomial under Jeffreys' prior. At least x of m samples vote for the
    class if p exceeds a Beta(x, m - x + 1) variable, so the chance is that one beta variable
    exceeds another. Arcsines of their roots are normal, nearly. Where the votes are there already,
    it is only said to be above a half: no chance that gives up a radius is as large.
    """
    m, x = last - n, needed - votes
    angle = np.arcsin(np.sqrt((votes + 0.5) / (n + 1)))
    other = np.arcsin(np.sqrt(np.clip(x / (m + 1), 0, 1)))
    z = 2 * (angle - other) / np.sqrt(1 / (n + 1) + 1 / (m + 1))
    return np.where(x > m, 0.0, special.ndtr(z))


Bound: TypeAlias = Looks | Mixture | Sequential


class Interval(NamedTuple):
    """A confidence interval [low, high]."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Certificate:
    """What was certified about one image, and all that is needed to check it.

    With probability at least 1 - ``alpha`` over the noise, either ``label`` is -1 or the smoothed
    classifier returns ``label`` at every point within l2 distance ``radius`` of the image.

    Attributes:
        label: The certified class, or -1 for an abstention.
        radius: Certified l2 radius in image units, rounded down to 6 decimals, or the largest
            proved radius of a table; 0 on abstention.
        p_lower: Lower confidence bound on the probability of the selected class under noise.
        selection_counts: Votes of the n0 selection samples, class -> votes, without zeros. Empty
            where the true label took the place of the selected class.
        counts: Votes of the n estimation samples, class -> votes, without zeros. Empty where the
            image was skipped, because its selected class was known to be wrong.
        alpha: Failure probability of this certificate.
        sigma: Standard deviation of the noise in image units.
        bound: How ``p_lower`` follows from the counts, and what allowed sampling to stop.
        seed: Seed of the noise streams.
        dtype: Floating-point type in which the base classifier computed, e.g. "float32". The
            certificate is one of the model in that type.
        proofs: Each proved radius of a table with the look that proved it: n samples, and the votes
            of the label among them.
        noise: "gaussian", or "quantised" for 8-bit images.
        tv: Bound on the total variation distance between the noise that was sampled and exact
            noise, of which ``p_lower`` is corrected; 0 for "gaussian", where it is not known.
        drawn: Estimation samples drawn in all: more than n in old logs, where an earlier look gave
            the best bound.
    """

    label: int
    radius: float
    p_lower: float
    selection_counts: Mapping[int, int]
    counts: Mapping[int, int]
    alpha: float
    sigma: float
    bound: Bound
    seed: int = 0
    dtype: str = "float32"
    noise: str = "gaussian"
    tv: float = 0.0
    drawn: int = 0
    proofs: tuple[Proof, ...] = ()

    @property
    def n0(self) -> int:
        """Number of selection samples."""
        return sum(self.selection_counts.values())

    @property
    def n(self) -> int:
        """Number of estimation samples."""
        return sum(self.counts.values())

    @classmethod
    def from_counts(
        cls,
        selection_counts: Mapping[int, int],
        counts: Mapping[int, int],
        *,
        alpha: float,
        sigma: float,
        bound: Looks | Mixture | None = None,
        tv: float = 0.0,
        **record: Any,
    ) -> Certificate:
        """Certify from the votes of two independent sets of samples (Cohen et al., Certify).

        The class is selected from the first set, and its probability is bounded from the second
        alone: reusing the first would void the bound. Arguments are the attributes, as in
        ``record``; ``bound`` is by default the one for a number of samples fixed beforehand.

        Raises:
            ValueError: ``bound`` does not hold at this number of samples.

        Example:
            >>> c = Certificate.from_counts(
            ...     {3: 98, 5: 2}, {3: 990, 5: 10}, alpha=0.001, sigma=0.25
            ... )
            >>> c.label, c.radius, c.n
            (3, 0.494502, 1000)
        """
        selected, n = top_class(selection_counts), sum(counts.values())
        bound = Looks.fixed(n) if bound is None else bound
        p_lower = 0.0
        if n and selected != ABSTAIN:
            p_lower = max(bound.p_lower(counts.get(selected, 0), n, alpha) - tv, 0.0)
        certified = p_lower > 0.5
        return cls(
            label=selected if certified else ABSTAIN,
            radius=certified_radius(p_lower, sigma),
            p_lower=p_lower,
            selection_counts=dict(selection_counts),
            counts=dict(counts),
            alpha=alpha,
            sigma=sigma,
            bound=bound,
            tv=tv,
            drawn=n,
            **record,
        )

    @classmethod
    def from_proofs(
        cls,
        label: int,
        selection_counts: Mapping[int, int],
        counts: Mapping[int, int],
        proofs: Sequence[Proof],
        *,
        sigma: float,
        **record: Any,
    ) -> Certificate:
        """Return the certificate of the class ``label`` with these radii of a table proved."""
        radius = proofs[-1].radius if proofs else 0.0
        return cls(
            label=label if proofs else ABSTAIN,
            radius=radius,
            p_lower=float(special.ndtr(radius / sigma)) if proofs else 0.0,
            selection_counts=dict(selection_counts),
            counts=dict(counts),
            sigma=sigma,
            drawn=sum(counts.values()),
            proofs=tuple(proofs),
            **record,
        )

    def proves(self, radius: float) -> bool:
        """Whether the label is certified within ``radius``, which may be 0."""
        return self.label != ABSTAIN and self.radius >= radius

    def at(self, alpha: float) -> Certificate:
        """Return what the same votes certify at another failure probability.

        Looks and stopping do not depend on alpha's value for their soundness: the bounds at all
        looks hold together at any alpha chosen without looking at the votes. Of a table of radii,
        those are left that the same looks prove at that alpha.

        Example:
            >>> c = Certificate.from_counts({3: 50}, {3: 1000}, alpha=0.001, sigma=0.25)
            >>> c.radius, c.at(0.001 / 500).radius
            (0.615815, 0.556279)
        """
        names = ("sigma", "seed", "dtype", "bound", "noise", "tv")
        same = {name: getattr(self, name) for name in names}
        if isinstance(self.bound, Sequential):
            looks = [Look(proof.n, proof.votes) for proof in self.proofs]
            if looks and looks[-1].n < self.n:
                looks.append(Look(self.n, self.counts.get(self.label, 0)))
            radii = [proof.radius for proof in self.proofs]
            proofs = self.bound.proofs(looks, radii, sigma=self.sigma, tv=self.tv, alpha=alpha)
            return Certificate.from_proofs(
                self.label, self.selection_counts, self.counts, proofs, alpha=alpha, **same
            )
        again = Certificate.from_counts(self.selection_counts, self.counts, alpha=alpha, **same)
        return replace(again, drawn=self.drawn)


@dataclass(frozen=True, slots=True)
class Vote:
    """The smoothed classifier's answer on one image (Cohen et al., Predict).

    With probability at least 1 - ``alpha`` over the noise, ``label`` is -1 or the class that the
    smoothed classifier returns.

    Attributes:
        label: The predicted class, or -1 for an abstention.
        p_value: p-value of the two-sided test that the two most voted classes are equally likely.
        counts: Votes, class -> votes, without zeros.
        alpha, sigma, seed, dtype, noise: As in `Certificate`.
    """

    label: int
    p_value: float
    counts: Mapping[int, int]
    alpha: float
    sigma: float
    seed: int = 0
    dtype: str = "float32"
    noise: str = "gaussian"

    @classmethod
    def from_counts(cls, counts: Mapping[int, int], *, alpha: float, **record: Any) -> Vote:
        """Predict from votes, abstaining where the two leading classes are too close.

        Votes for -1, samples without an answer, count as a class that cannot be returned.

        Example:
            >>> Vote.from_counts({1: 60, 2: 40}, alpha=0.001, sigma=0.25).label
            -1
        """
        label = top_class(counts)
        first = counts.get(label, 0)
        second = max((votes for c, votes in counts.items() if c != label), default=0)
        p_value = 1.0
        if first > second:  # not so where most samples have no answer
            p_value = float(stats.binomtest(first, first + second, 0.5).pvalue)
        label = label if p_value <= alpha else ABSTAIN
        return cls(label, p_value, dict(counts), alpha, **record)


def top_class(counts: Mapping[int, int]) -> int:
    """Return the class with most votes, the smallest index among equals.

    Votes for -1, samples without an answer, select nothing: without others, -1 is returned.

    Example:
        >>> top_class({7: 4, 2: 9, 5: 9, -1: 20}), top_class({-1: 20})
        (2, -1)
    """
    return min((c for c in counts if c != ABSTAIN), key=lambda c: (-counts[c], c), default=ABSTAIN)


def certified_radius(p_lower: float, sigma: float) -> float:
    """l2 radius sigma * Phi^-1(p_lower) (Cohen et al., Theorem 1), rounded down to 6 decimals.

    Uses the bound 1 - p_lower for the runner-up. 0 where ``p_lower`` does not exceed 1/2.

    Raises:
        InputError: ``p_lower`` is not in [0, 1), or ``sigma`` is not positive.

    Example:
        >>> certified_radius(0.9, 0.25)
        0.320387
    """
    p_lower, sigma = checks.real("p_lower", p_lower), checks.positive("sigma", sigma)
    if not 0 <= p_lower < 1:
        raise InputError(f"p_lower is {p_lower}; give a lower bound in [0, 1)")
    if p_lower <= 0.5:
        return 0.0
    radius = sigma * float(special.ndtri(p_lower))
    return float(Decimal(radius).quantize(Decimal(1).scaleb(-_DECIMALS), ROUND_FLOOR))


def proportion_interval(k: int, n: int, confidence: float = 0.95) -> Interval:
    """Two-sided Clopper-Pearson interval for a proportion of k in n, exact at any n.

    Raises:
        InputError: ``k`` is not from 0 to ``n``, or ``confidence`` not in (0, 1).

    Example:
        >>> low, high = proportion_interval(90, 100)
        >>> round(low, 3), round(high, 3)
        (0.824, 0.951)
    """
    k, n = checks.successes(k, n)
    level = checks.share("confidence", confidence)
    interval = stats.binomtest(k, n).proportion_ci(level, method="exact")
    return Interval(float(interval.low), float(interval.high))


def certified_accuracy(
    correct: Sequence[bool], radii: Sequence[float], radius: float
) -> tuple[float, Interval]:
    """Share of images classified correctly with a certified radius of at least ``radius``.

    Args:
        correct: Whether each image's certified label is its true one.
        radii: Each image's certified radius, image units.
        radius: The radius in question, image units.

    Returns:
        The share and its 95% Clopper-Pearson interval over images of the same distribution, which
        does not include the alpha of the certificates.

    Raises:
        InputError: There are no images, ``correct`` holds something else than truth values, or a
            radius is out of range.

    Example:
        >>> accuracy, interval = certified_accuracy([True, True, False], [0.5, 0.1, 0.9], 0.25)
        >>> round(accuracy, 3)
        0.333
    """
    right, certified = _columns(correct, radii)
    if not checks.real("radius", radius) >= 0:
        raise InputError(f"radius is {radius}; give a number >= 0")
    radius = float(radius)
    hits = int(np.sum(right & (certified >= radius)))
    return hits / len(right), proportion_interval(hits, len(right))


class TableRow(NamedTuple):
    """Certified accuracy at one radius, with its 95% Clopper-Pearson interval over images."""

    radius: float
    certified_accuracy: float
    low: float
    high: float


def accuracy_rows(
    correct: Sequence[bool], certified: Sequence[float], radii: Sequence[float]
) -> list[TableRow]:
    """Return certified accuracy at each of ``radii``.

    Args:
        correct: Whether each image's certified label is its true one.
        certified: Each image's certified radius, image units.
        radii: The radii in question, image units.

    Example:
        >>> accuracy_rows([True, True, False], [0.5, 0.1, 0.9], [0.0, 0.25])[1].radius
        0.25
    """
    found = [certified_accuracy(correct, certified, radius) for radius in radii]
    return [TableRow(float(r), a, *interval) for r, (a, interval) in zip(radii, found, strict=True)]


def average_certified_radius(
    correct: Sequence[bool], radii: Sequence[float], confidence: float = 0.95
) -> tuple[float, Interval]:
    """Mean certified radius, counting 0 for images that are not certified correctly (ACR).

    Source: Zhai et al., "MACER" (ICLR 2020, arXiv 2001.02378).

    Raises:
        InputError: There are no images, a value is out of range, or ``correct`` holds something
            else than truth values.

    Returns:
        The mean and Student's t interval for it, approximate for few images.

    Example:
        >>> average_certified_radius([True, False], [0.5, 0.9])[0]
        0.25
    """
    right, certified = _columns(correct, radii)
    confidence = checks.share("confidence", confidence)
    values = np.where(right, certified, 0.0)
    mean = float(values.mean())
    if len(values) < 2:
        return mean, Interval(0.0, math.inf)
    standard_error = float(values.std(ddof=1)) / math.sqrt(len(values))
    half = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1)) * standard_error
    return mean, Interval(max(mean - half, 0.0), mean + half)


def _columns(correct: Any, radii: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return whether each image is right, and its certified radius, as arrays."""
    right, certified = (
        np.asarray(column if hasattr(column, "__array__") else list(column))
        for column in (correct, radii)
    )
    checks.one_each(right, certified, "radii")
    if not len(right):
        raise InputError("there are no images; give at least one")
    if right.dtype.kind not in "biu" or not np.isin(right, (False, True)).all():
        # Predicted classes would count as right, all but class 0.
        raise InputError(f"correct holds {right.flat[0]!r}, ...; give True or False for each image")
    for radius in certified:
        if not checks.real("a certified radius", radius) >= 0:
            raise InputError(f"a certified radius is {radius}; give a number >= 0")
    return right.astype(bool), certified.astype(float)
