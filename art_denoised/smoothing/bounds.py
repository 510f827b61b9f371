"""Lower confidence bounds on a class probability: at one sample count, and at any time.

A certificate is a lower bound on the probability of a class, put through Theorem 1 of Cohen et al.
The ways of this file, of which docs/explanation/sequential.md has the theorems:

- all samples first, then one bound: Clopper-Pearson, `Looks.fixed`;
- a bound that holds at all sample counts at once, whoever stops for whatever reason: `Mixture`
  (Ville's inequality for a beta-binomial mixture martingale);
- `Looks` at several sample counts, by which earlier versions certified tables of radii. Nothing
  writes them any more.

Every bound is rounded down.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from scipy import optimize, special

# Above the error of scipy's inverse incomplete beta function (checked against mpmath in the
# tests), below anything that matters to a radius.
_SAFETY = 1e-12
_FACTOR = 1.5  # between one look and the next
_LAST_SHARE = 0.5  # of alpha that the last look gets: there the most certificates are decided


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
        return _look_counts(self.first, self.last)

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
def _look_counts(first: int, last: int) -> tuple[int, ...]:
    counts = [first]
    while (following := math.ceil(counts[-1] * _FACTOR)) * math.sqrt(_FACTOR) <= last:
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
