"""Counts in, certificates out: the statistics of randomized smoothing as pure functions.

Soundness lives here, so nothing in this file knows of torch, files or screens. Every bound is
rounded in the safe direction: down.

Source: Cohen, Rosenfeld, Kolter, "Certified Adversarial Robustness via Randomized Smoothing"
(ICML 2019, arXiv 1902.02918), section 3.2; abstention of Predict after its Proposition 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_FLOOR, Decimal
from typing import NamedTuple

import numpy as np
from scipy import special, stats

ABSTAIN = -1

# Above the error of scipy's inverse incomplete beta function (checked against mpmath in the
# tests), below anything that matters to a radius.
_SAFETY = 1e-12
_DECIMALS = 6


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
        radius: Certified l2 radius in image units, rounded down to 6 decimals; 0 on abstention.
        p_lower: Lower confidence bound on the probability of the selected class under noise.
        selection_counts: Votes of the n0 selection samples, class -> votes, without zeros.
        counts: Votes of the n estimation samples, class -> votes, without zeros.
        alpha: Failure probability of this certificate.
        sigma: Standard deviation of the noise in image units.
        seed: Seed of the noise streams.
        dtype: Floating-point type in which the base classifier computed, e.g. "float32". The
            certificate is one of the model in that type.
    """

    label: int
    radius: float
    p_lower: float
    selection_counts: Mapping[int, int]
    counts: Mapping[int, int]
    alpha: float
    sigma: float
    seed: int
    dtype: str

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
        seed: int,
        dtype: str,
    ) -> Certificate:
        """Certify from the votes of two independent sets of samples (Cohen et al., Certify).

        The class is selected from the first set and its probability bounded from the second
        alone; reusing the first would void the bound.

        Args:
            selection_counts: Class -> votes among the n0 selection samples.
            counts: Class -> votes among the n fresh estimation samples.
            alpha: Failure probability in (0, 0.5).
            sigma: Noise level in image units.
            seed: Seed of the noise, for the record.
            dtype: Type the base classifier computed in, for the record.

        Example:
            >>> c = Certificate.from_counts(
            ...     {3: 98, 5: 2}, {3: 990, 5: 10}, alpha=0.001, sigma=0.25, seed=0, dtype="float32"
            ... )
            >>> c.label, c.radius, c.n
            (3, 0.494502, 1000)
        """
        selected = top_class(selection_counts)
        p_lower = lower_confidence_bound(counts.get(selected, 0), sum(counts.values()), alpha)
        certified = p_lower > 0.5
        return cls(
            label=selected if certified else ABSTAIN,
            radius=certified_radius(p_lower, sigma),
            p_lower=p_lower,
            selection_counts=dict(selection_counts),
            counts=dict(counts),
            alpha=alpha,
            sigma=sigma,
            seed=seed,
            dtype=dtype,
        )


@dataclass(frozen=True, slots=True)
class Vote:
    """The smoothed classifier's answer on one image (Cohen et al., Predict).

    With probability at least 1 - ``alpha`` over the noise, ``label`` is -1 or the class that the
    smoothed classifier returns.

    Attributes:
        label: The predicted class, or -1 for an abstention.
        p_value: Of the two-sided test that the two most voted classes are equally likely.
        counts: Votes, class -> votes, without zeros.
        alpha: Failure probability.
        sigma: Noise level in image units.
        seed: Seed of the noise streams.
        dtype: Floating-point type of the base classifier.
    """

    label: int
    p_value: float
    counts: Mapping[int, int]
    alpha: float
    sigma: float
    seed: int
    dtype: str

    @classmethod
    def from_counts(
        cls, counts: Mapping[int, int], *, alpha: float, sigma: float, seed: int, dtype: str
    ) -> Vote:
        """Predict from votes, abstaining where the two leading classes are too close.

        Example:
            >>> Vote.from_counts({1: 60, 2: 40}, alpha=0.001, sigma=0.25, seed=0, dtype="").label
            -1
        """
        first, second = [*sorted(counts.values(), reverse=True), 0][:2]
        p_value = float(stats.binomtest(first, first + second, 0.5).pvalue)
        label = top_class(counts) if p_value <= alpha else ABSTAIN
        return cls(label, p_value, dict(counts), alpha, sigma, seed, dtype)


def top_class(counts: Mapping[int, int]) -> int:
    """Return the class with most votes, the smallest index among equals.

    Example:
        >>> top_class({7: 4, 2: 9, 5: 9})
        2
    """
    return min(counts, key=lambda c: (-counts[c], c))


def lower_confidence_bound(k: int, n: int, alpha: float) -> float:
    """One-sided Clopper-Pearson lower bound on a probability after k successes in n trials.

    The bound p satisfies P(Binomial(n, p) >= k) <= alpha, also in floating point: it lies a
    relative 1e-12 below scipy's value.

    Args:
        k: Successes, 0 <= k <= n.
        n: Trials, at least 1.
        alpha: Failure probability in (0, 1).

    Example:
        >>> round(lower_confidence_bound(1000, 1000, 0.001), 6)  # 0.001 ** (1 / 1000)
        0.993116
    """
    if k == 0:
        return 0.0
    return float(special.betaincinv(k, n - k + 1, alpha)) * (1 - _SAFETY)


def certified_radius(p_lower: float, sigma: float) -> float:
    """l2 radius sigma * Phi^-1(p_lower) (Cohen et al., Theorem 1), rounded down to 6 decimals.

    Uses the bound 1 - p_lower for the runner-up. 0 where ``p_lower`` does not exceed 1/2.

    Example:
        >>> certified_radius(0.9, 0.25)
        0.320387
    """
    if p_lower <= 0.5:
        return 0.0
    radius = sigma * float(special.ndtri(p_lower))
    return float(Decimal(radius).quantize(Decimal(1).scaleb(-_DECIMALS), ROUND_FLOOR))


def largest_radius(n: int, alpha: float, sigma: float) -> float:
    """Radius certified when all n samples agree: no run with these settings can show more.

    Example:
        >>> largest_radius(100_000, 0.001, 1.0)
        3.811456
    """
    return certified_radius(lower_confidence_bound(n, n, alpha), sigma)


def proportion_interval(k: int, n: int, confidence: float = 0.95) -> Interval:
    """Two-sided Clopper-Pearson interval for a proportion, exact at any n.

    Example:
        >>> low, high = proportion_interval(90, 100)
        >>> round(low, 3), round(high, 3)
        (0.824, 0.951)
    """
    interval = stats.binomtest(k, n).proportion_ci(confidence, method="exact")
    return Interval(float(interval.low), float(interval.high))


def certified_accuracy(
    correct: Sequence[bool], radii: Sequence[float], radius: float
) -> tuple[float, Interval]:
    """Share of images classified correctly with a certified radius of at least ``radius``.

    Args:
        correct: Whether each image's certified label is its true one.
        radii: Each image's certified radius, image units.
        radius: The radius asked about, image units.

    Returns:
        The share and its 95% Clopper-Pearson interval over the data set. The interval speaks of
        images drawn from the same distribution; it does not include the alpha of the certificates.

    Example:
        >>> accuracy, interval = certified_accuracy([True, True, False], [0.5, 0.1, 0.9], 0.25)
        >>> round(accuracy, 3)
        0.333
    """
    hits = int(np.sum(np.asarray(correct, bool) & (np.asarray(radii, float) >= radius)))
    return hits / len(radii), proportion_interval(hits, len(radii))


def average_certified_radius(
    correct: Sequence[bool], radii: Sequence[float], confidence: float = 0.95
) -> tuple[float, Interval]:
    """Mean certified radius, counting 0 for images that are not certified correctly (ACR).

    Source: Zhai et al., "MACER" (ICLR 2020, arXiv 2001.02378).

    Returns:
        The mean and Student's t interval for it, approximate for few images.

    Example:
        >>> average_certified_radius([True, False], [0.5, 0.9])[0]
        0.25
    """
    values = np.where(np.asarray(correct, bool), np.asarray(radii, float), 0.0)
    mean = float(values.mean())
    if len(values) < 2:
        return mean, Interval(0.0, math.inf)
    standard_error = float(values.std(ddof=1)) / math.sqrt(len(values))
    half = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1)) * standard_error
    return mean, Interval(max(mean - half, 0.0), mean + half)
