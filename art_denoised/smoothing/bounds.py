"""Lower confidence bounds on a class probability, and tests of it, however sampling stops.

A certificate is a lower bound on the probability of a class, put through Theorem 1 of Cohen et al.
The ways of this file, of which docs/explanation/sequential.md has the theorems:

- all samples first, then one bound: Clopper-Pearson, `Looks.fixed`;
- a bound that holds at all sample counts at once, whoever stops for whatever reason: `Mixture`
  (Ville's inequality for a beta-binomial mixture martingale);
- exact group-sequential tests for tables of radii: `Sequential`;
- `Looks` at several sample counts, by which earlier versions certified tables of radii. Nothing
  writes them any more.

Every bound is rounded down.

Sources of `Sequential`: Jennison and Turnbull, "Group Sequential Methods" (2000), section 12.1
(exact binomial tests); Lan and DeMets (Biometrika 1983, error spending); Maurer, Hothorn and
Lehmacher (1995, fixed sequences).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from scipy import optimize, special, stats

from art_denoised import checks

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
