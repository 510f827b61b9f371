"""Exact group-sequential tests of a class probability, for tables of radii.

A radius r is proved by rejecting p <= p0 = Phi(r / sigma). The votes are looked at after planned
sample counts, and p <= p0 is rejected at the first look where they reach a boundary. The
probability that they ever do is computed exactly, by recursion over the looks: it is at most alpha
at p0, hence at every smaller p. The radii of a table are tested in ascending order, each at the
full alpha, the next one only once the last is proved (fixed-sequence gatekeeping).

docs/explanation/sequential.md has theorem and proof. Sources: Jennison and Turnbull, "Group
Sequential Methods" (2000), section 12.1 (exact binomial tests); Lan and DeMets (Biometrika 1983,
error spending); Maurer, Hothorn and Lehmacher (1995, fixed sequences).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from scipy import special, stats

# Chosen with benchmarks/replay.py; docs/decisions/0009-exact-boundaries.md has the alternatives.
_FIRST = 40  # samples at the first look
_GROWTH = 1.07  # between one look and the next
_SPENDING = 0.7  # of alpha, (n / N)^_SPENDING may be spent until n of N samples
_FUTILE = 0.07  # chance below which a radius is given up, at most
_PATIENCE = 100  # votes against the class, expected at p0, at which half of that chance suffices

_CUT = 1e-14  # share of alpha that each cut of a tail may lose
_SLACK = 1e-9  # share of alpha that is not spent: more than all cuts and rounding errors
_ROUNDING = 1e-12  # above the error of p0


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
    """Looks at sample counts that grow from ``first`` to ``last``, with exact boundaries."""

    first: int
    last: int

    @classmethod
    def upto(cls, n: int) -> Sequential:
        """Return the looks that are planned for at most ``n`` samples."""
        return cls(min(_FIRST, n), n)

    @property
    def counts(self) -> tuple[int, ...]:
        """Sample counts of the looks, ascending."""
        return _counts(self.first, self.last)

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
        """Prove radii in their order, until the votes of no look reach the boundary of one.

        Args:
            looks: Looks so far, or some of them.
            radii: l2 radii in image units, ascending.
            sigma: Standard deviation of the noise.
            tv: Bound on the total variation distance of the sampled noise from exact noise.
            alpha: Failure probability of all proofs together.

        Raises:
            ValueError: A look was not planned.
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


@lru_cache
def _counts(first: int, last: int) -> tuple[int, ...]:
    counts = [first]
    while (following := math.ceil(counts[-1] * _GROWTH)) * math.sqrt(_GROWTH) <= last:
        counts.append(following)
    return tuple(counts) if first == last else (*counts, last)


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
    low = max(int(stats.binom.ppf(cut, n, p)) - 1, 0)
    high = min(int(stats.binom.isf(cut, n, p)) + 1, n)
    return stats.binom.pmf(np.arange(low, high + 1), n, p), low


@lru_cache(maxsize=1024)
def _futility(counts: tuple[int, ...], p0: float, alpha: float) -> Mapping[int, int]:
    """Return the fewest votes that leave enough chance to reach the last boundary.

    Little chance is enough while few votes against the class are expected, because one more or less
    then moves the chance far. Found by bisection at all looks at once. At the last look nothing is
    left to wait for.
    """
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
    exceeds another. Arcsines of their roots are normal, nearly.
    """
    m, x = last - n, needed - votes
    angle = np.arcsin(np.sqrt((votes + 0.5) / (n + 1)))
    other = np.arcsin(np.sqrt(np.clip(x / (m + 1), 0, 1)))
    z = 2 * (angle - other) / np.sqrt(1 / (n + 1) + 1 / (m + 1))
    return np.where(x > m, 0.0, np.where(x <= 0, 1.0, special.ndtr(z)))
