"""Robust accuracy from rows: shares with intervals, and several attacks taken together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from scipy import stats

from art_denoised.evaluation.attack_rows import AttackRow
from art_denoised.smoothing.statistics import Interval, proportion_interval


@dataclass(frozen=True)
class Share:
    """A share of images in [0, 1] and the limits of its 95% interval."""

    value: float
    low: float
    high: float


class Survival(NamedTuple):
    """Shares of evaluations in which one image is right; 0 or 1 where there is one evaluation."""

    counted: float
    fresh: float
    worst: float


def share(values: Sequence[float]) -> Share | None:
    """Return the mean of one value in [0, 1] for each image, with its 95% interval.

    The interval of whole counts is that of Clopper and Pearson. A mean of averages over evaluations
    varies less than a count with the same mean; it gets the interval of the two counts around it.

    Returns:
        The share; None if there are no values.

    Example:
        >>> share([1, 1, 0.5, 0]).value
        0.625
    """
    n = len(values)
    if not n:
        return None
    total = math.fsum(values)
    low = _interval(math.floor(total + 1e-9), n).low
    high = _interval(math.ceil(total - 1e-9), n).high
    return Share(total / n, low, high)


@cache  # milliseconds each, and a report needs the same ones many times
def _interval(k: int, n: int) -> Interval:
    return proportion_interval(k, n)


def survival(rows: Sequence[AttackRow]) -> Survival:
    """Return what several attacks leave of one image: the result of the most harmful one.

    On fresh noise, the lowest of several averages over few evaluations is biased downward, because
    chance takes part in choosing it. Therefore half of the evaluations choose the attack and the
    other half judge it, and the other way round (cross-fitting). With one evaluation each, which
    is enough for a deterministic model, it is the lowest.

    Example:
        >>> def row(attack, fresh):
        ...     return AttackRow(0, 1, attack, "none", "linf", 0.1, True, True, fresh, 0, 0, 0)
        >>> survival([row("a", (True, True, True, True)), row("b", (True, False, False, False))])
        Survival(counted=True, fresh=0.25, worst=False)
    """
    counted, worst = all(row.counted for row in rows), all(row.worst for row in rows)
    if min(len(row.fresh) for row in rows) < 2:
        return Survival(counted, min(row.mean for row in rows), worst)
    halves = (slice(0, None, 2), slice(1, None, 2))

    draws: list[bool] = []
    for choose, judge in (halves, halves[::-1]):
        strongest = min(rows, key=lambda row: (_mean(row.fresh[choose]), row.counted))
        draws += strongest.fresh[judge]
    return Survival(counted, _mean(draws), worst)


def together(attacks: Sequence[Mapping[int, AttackRow]]) -> dict[int, Survival]:
    """Return what several attacks leave of each image that all of them tried.

    Args:
        attacks: For each attack, image -> row.
    """
    if not attacks:
        return {}
    common = sorted(set.intersection(*map(set, attacks)))
    each = [survival([rows[index] for rows in attacks]) for index in common]
    # An average over images must not exceed that of a single attack on them. Where the choice by
    # few evaluations did worse than the strongest single attack, that attack stands in.
    singles = [[rows[index].mean for index in common] for rows in attacks]
    fresh = min([[image.fresh for image in each], *singles], key=math.fsum)
    left = zip(common, each, fresh, strict=True)
    return {index: image._replace(fresh=mean) for index, image, mean in left}


def kept(image: Survival) -> bool:
    """Return whether an image is right in at least half of its evaluations, as smoothing votes."""
    return image.fresh >= 0.5


def sign_test(first: int, second: int, alternative: str = "two-sided") -> float:
    """Return the exact p-value that two counts have the same expectation (McNemar's test).

    Args:
        first: Number of images that only the first keeps.
        second: Number of images that only the second keeps.
        alternative: "two-sided", "greater" (the first is) or "less".

    Example:
        >>> sign_test(0, 0), round(sign_test(9, 1, "greater"), 3)
        (1.0, 0.011)
    """
    if first + second == 0:
        return 1.0
    return float(stats.binomtest(first, first + second, 0.5, alternative=alternative).pvalue)


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values)
