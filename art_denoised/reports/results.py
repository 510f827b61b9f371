"""Results of attacked models and how models differ, with intervals: pure functions of rows.

docs/how-to/report.md explains every result. `tables`, `plots` and `page` show them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from statistics import fmean
from typing import Any, NamedTuple

from scipy import stats

from art_denoised.evaluation.attack_rows import CLEAN, AttackRow, CheckRow, ImageRow, verdict
from art_denoised.evaluation.logs import CertifyRow, Log
from art_denoised.reports.certified import accuracy_table, is_lower_bound
from art_denoised.smoothing.statistics import proportion_interval

ALL = "all attacks"
_LEVEL = 0.025  # of the one-sided test for an inversion, as one end of a 95% interval
# Milliseconds each, and a report needs the same ones many times.
_interval = cache(proportion_interval)


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

    @property
    def kept(self) -> bool:
        """Whether the image is right in at least half of its evaluations, as smoothing votes."""
        return self.fresh >= 0.5

    @property
    def majority(self) -> bool:
        """Whether it is right in more than half of them, so that a vote over them is right."""
        return self.fresh > 0.5


def share(values: Sequence[float]) -> Share | None:
    """Return the mean of one value in [0, 1] for each image, with its 95% interval; None of none.

    The interval of whole counts is that of Clopper and Pearson. A mean of averages over evaluations
    varies less than a count with the same mean; it gets the interval of the two counts around it.
    """
    n, total = len(values), math.fsum(values)
    if not n:
        return None
    low = _interval(math.floor(total + 1e-9), n).low
    return Share(total / n, low, _interval(math.ceil(total - 1e-9), n).high)


def survival(rows: Sequence[AttackRow]) -> Survival:
    """Return what several attacks leave of one image: the result of the most harmful one.

    On fresh noise, the lowest of several averages over few evaluations is biased downward, because
    chance takes part in choosing it. Therefore half of the evaluations choose the attack and the
    other half judge it, and the other way round (cross-fitting). With one evaluation each, which
    is enough for a deterministic model, it is the lowest.
    """
    counted, worst = all(row.counted for row in rows), all(row.worst for row in rows)
    if min(len(row.fresh) for row in rows) < 2:
        return Survival(counted, min(row.mean for row in rows), worst)
    halves = (slice(0, None, 2), slice(1, None, 2))
    draws: list[bool] = []
    for choose, judge in (halves, halves[::-1]):
        strongest = min(rows, key=lambda row: (fmean(row.fresh[choose]), row.counted))
        draws += strongest.fresh[judge]
    return Survival(counted, fmean(draws), worst)


def together(attacks: Sequence[Mapping[int, AttackRow]]) -> dict[int, Survival]:
    """Return what several attacks, each image -> row, leave of images that all of them tried."""
    common = sorted(set.intersection(*map(set, attacks)))
    each = [survival([rows[index] for rows in attacks]) for index in common]
    # An average over images must not exceed that of a single attack on them. Where the choice by
    # few evaluations did worse than the strongest single attack, that attack stands in.
    singles = [[rows[index].mean for index in common] for rows in attacks]
    fresh = min([[image.fresh for image in each], *singles], key=math.fsum)
    left = zip(common, each, fresh, strict=True)
    return {index: image._replace(fresh=mean) for index, image, mean in left}


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


class Ball(NamedTuple):
    """Norm and radius of a ball; its ``str`` is its name."""

    norm: str
    eps: float

    def __str__(self) -> str:
        return f"{self.norm} eps {eps_name(self.eps)}"


@dataclass(frozen=True)
class Result:
    """Accuracy of one model under one attack, or under all of them.

    Attributes:
        norm: "linf" or "l2".
        eps: Radius of the ball, image units.
        attack: Name of the attack, or "all attacks".
        gradient: "exact", "bpda" or "none"; empty for all attacks.
        images: Number of images.
        draws: Number of evaluations of each attacked image.
        clean: Accuracy on the same images without attack; None where it was not measured.
        counted: Robust accuracy by the attack's own count.
        fresh: Robust accuracy on fresh noise, mean over evaluations. The result to quote.
        majority: Robust accuracy if an image counts when more than half of its evaluations on fresh
            noise are right: a lower bound on that of a vote over so many copies.
        worst: Robust accuracy if an image counts only when it is right in every evaluation,
            including the attack's own.
        seconds: Time of the attack for one image.
        queries: Number of forward passes of the model for one image; 0 where no log tells.
    """

    norm: str
    eps: float
    attack: str
    gradient: str
    images: int
    draws: int
    clean: Share | None
    counted: Share
    fresh: Share
    majority: Share
    worst: Share
    seconds: float
    queries: float

    @property
    def ball(self) -> Ball:
        """Norm and eps."""
        return Ball(self.norm, self.eps)


@dataclass(frozen=True)
class Agreement:
    """Certified accuracy at one radius beside l2 robust accuracy at eps equal to it.

    No attack can break what is certified, so the first is at most the second.

    Attributes:
        radius: l2 radius, equal to eps.
        certified: Certified accuracy.
        at_least: Whether it is a lower bound, because the run stopped sampling at other radii.
        robust: Robust accuracy under all attacks.
        paired: Number of images in both logs. Both accuracies are over them; 0: each over its own.
        broken: Indices of images that are certified at the radius and yet were broken.
        spared: Number of images that are not certified and survived.
        p_value: p-value of ``broken`` against ``spared`` (exact, one-sided); None without pairs.
    """

    radius: float
    certified: Share
    at_least: bool
    robust: Share
    paired: int
    broken: tuple[int, ...]
    spared: int
    p_value: float | None

    @property
    def inverted(self) -> bool:
        """Whether certified accuracy is above robust accuracy beyond what chance explains."""
        apart = self.certified.low > self.robust.high
        return apart or (self.p_value is not None and self.p_value < _LEVEL)


@dataclass(frozen=True)
class Model:
    """All rows of one defended model, and the results that follow from them.

    Attributes:
        name: Name for people.
        rows: Rows of all attacks.
        checks: Findings of the masking checks.
        certified: Rows of certify.
        asked: l2 radii at which certify stopped sampling; empty if its certificates are complete.
        pictures: Images before and after attack.
        settings: Title and settings of each log.
        same_images: Whether the logs of attack and certify index the same data.
        unmade: Names of masking checks that some run has not made.
        incomplete: What runs that were interrupted lack, in words; empty if they are complete.
        begun: Times at which its logs were begun, in UTC as ISO 8601, those that are known.
    """

    name: str
    rows: tuple[AttackRow, ...] = ()
    checks: tuple[CheckRow, ...] = ()
    certified: tuple[CertifyRow, ...] = ()
    asked: tuple[float, ...] = ()
    pictures: tuple[ImageRow, ...] = ()
    settings: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    same_images: bool = True
    unmade: tuple[str, ...] = ()
    incomplete: str = ""
    begun: tuple[str, ...] = ()

    @property
    def failed(self) -> tuple[CheckRow, ...]:
        """Checks that failed."""
        return tuple(check for check in self.checks if check.passed is False)

    @property
    def trusted(self) -> bool | None:
        """Whether robust accuracy is reliable.

        False if a check failed or certificates contradict it; None if some checks were not made.
        """
        return False if self.inversions else verdict(self.checks, self.unmade)

    @property
    def clean(self) -> Share | None:
        """Accuracy on all images without attack, on fresh noise."""
        return share([row.mean for row in self.rows if row.attack == CLEAN])

    @cached_property
    def labels(self) -> dict[int, int]:
        """Image -> true class."""
        return {row.index: row.label for row in self.rows}

    @cached_property
    def columns(self) -> dict[Ball, dict[tuple[str, str], dict[int, AttackRow]]]:
        """Ball -> (attack, gradient) -> image -> row, without the clean rows, balls in order."""
        columns: dict[Ball, dict[tuple[str, str], dict[int, AttackRow]]] = {}
        attacked = [row for row in self.rows if row.attack != CLEAN]
        for row in sorted(attacked, key=lambda row: (row.norm, row.eps)):
            of_ball = columns.setdefault(Ball(row.norm, row.eps), {})
            of_ball.setdefault((row.attack, row.gradient), {})[row.index] = row
        return columns

    @cached_property
    def results(self) -> tuple[Result, ...]:
        """For each ball the result under every attack, then that under all together."""
        return tuple(itertools.chain.from_iterable(map(self._results, self.columns)))

    @property
    def headlines(self) -> tuple[Result, ...]:
        """Results under all attacks, one for each ball."""
        return tuple(result for result in self.results if result.attack == ALL)

    @cached_property
    def survivals(self) -> dict[Ball, dict[int, Survival]]:
        """Ball -> image -> what all attacks leave, of images that every one of them tried."""
        return {ball: together(list(rows.values())) for ball, rows in self.columns.items()}

    @cached_property
    def agreements(self) -> tuple[Agreement, ...]:
        """Certified accuracy beside robust accuracy, at each eps of the l2 attacks."""
        if not self.certified:
            return ()
        balls = [result.ball for result in self.headlines if result.norm == "l2"]
        return tuple(self._agreement(ball) for ball in balls)

    @property
    def inversions(self) -> tuple[Agreement, ...]:
        """Agreements where certified accuracy is above robust accuracy, which cannot be."""
        return tuple(agreement for agreement in self.agreements if agreement.inverted)

    @property
    def certify_log(self) -> Log:
        """Its certificates as a log."""
        return Log("certify", {"radii": self.asked}, self.certified)

    def certified_share(self, radius: float) -> Share | None:
        """Return certified accuracy at an l2 radius; None without certificates."""
        return _certified(self.certified, radius) if self.certified else None

    def _results(self, ball: Ball) -> Iterator[Result]:
        attacks = self.columns[ball]
        for (attack, gradient), rows in attacks.items():
            single = {i: Survival(row.counted, row.mean, row.worst) for i, row in rows.items()}
            yield self._result(ball, attack, gradient, single, [rows])
        if left := self.survivals[ball]:
            yield self._result(ball, ALL, "", left, list(attacks.values()))

    def _result(
        self,
        ball: Ball,
        attack: str,
        gradient: str,
        left: Mapping[int, Survival],
        attacks: Sequence[Mapping[int, AttackRow]],
    ) -> Result:
        clean = [row.mean for row in self.rows if row.attack == CLEAN and row.index in left]
        shares = (share(values) for values in zip(*left.values(), strict=True))
        counted, fresh, worst = (entry for entry in shares if entry is not None)
        majority = share([image.majority for image in left.values()])
        assert majority is not None  # there are images
        made = [rows[index] for rows in attacks for index in left]
        return Result(
            *ball,
            attack=attack,
            gradient=gradient,
            images=len(left),
            draws=min(len(row.fresh) for row in made),
            clean=share(clean) if len(clean) == len(left) else None,
            counted=counted,
            fresh=fresh,
            majority=majority,
            worst=worst,
            seconds=math.fsum(row.seconds for row in made) / len(left),
            queries=math.fsum(row.queries for row in made) / len(left),
        )

    def _agreement(self, ball: Ball) -> Agreement:
        left = self.survivals[ball]
        paired = {
            row.index: row
            for row in self.certified
            if self.same_images and row.index in left and row.label == self.labels[row.index]
        }
        robust = share([left[index].fresh for index in paired or left])
        assert robust is not None  # a headline has images
        held = {i for i, row in paired.items() if row.correct and row.radius >= ball.eps}
        broken = tuple(i for i in sorted(held) if not left[i].kept)
        spared = sum(left[i].kept for i in paired.keys() - held)
        return Agreement(
            radius=ball.eps,
            certified=_certified(list(paired.values()) or self.certified, ball.eps),
            at_least=is_lower_bound(ball.eps, self.asked),
            robust=robust,
            paired=len(paired),
            broken=broken,
            spared=spared,
            p_value=sign_test(len(broken), spared, "greater") if paired else None,
        )


def norms(models: Sequence[Model]) -> list[str]:
    """Return the norms that models have results in: "linf", "l2"; certificates are in l2."""
    found = {ball.norm for model in models for ball in model.columns}
    return sorted(found | {"l2"} if any(model.certified for model in models) else found)


def eps_name(eps: float) -> str:
    """Return eps as people write it: a fraction of 255 where it is one."""
    whole = round(eps * 255)
    exact = 0 < whole < 128 and math.isclose(eps * 255, whole, rel_tol=1e-4)
    return f"{whole}/255" if exact and len(f"{eps:g}") > 5 else f"{eps:g}"


def _certified(rows: Sequence[CertifyRow], radius: float) -> Share:
    """Return certified accuracy at one radius."""
    return Share(*accuracy_table(rows, [radius])[0][1:])


@dataclass(frozen=True)
class Difference:
    """How two models differ on the same images, under all attacks on each.

    Attributes:
        first, second: Names of the models.
        norm: "linf" or "l2".
        eps: Radius of the ball, image units.
        images: Number of images that both were attacked on.
        only_first, only_second: Numbers of images that only this model keeps.
        p_value: p-value of the exact two-sided sign test that both are equally good.
        trusted: Whether the results of both are reliable, as `Model.trusted`.
    """

    first: str
    second: str
    norm: str
    eps: float
    images: int
    only_first: int
    only_second: int
    p_value: float
    trusted: bool | None

    @property
    def ball(self) -> Ball:
        """Norm and eps."""
        return Ball(self.norm, self.eps)

    @property
    def gain(self) -> float:
        """Share of images that the second keeps, minus that of the first."""
        return (self.only_second - self.only_first) / self.images


def model_differences(models: Sequence[Model]) -> list[Difference]:
    """Return how each model differs from the first, in each ball with images that both share.

    An image is kept if it is right in at least half of its evaluations under all attacks. Images
    with equal index and label count as the same; `conflicts` says where runs name other data.

    Example:
        >>> from art_denoised.evaluation.attack_rows import AttackRow
        >>> def model(name, right):
        ...     row = AttackRow(0, 1, "pgd", "exact", "l2", 0.5, True, right, (right,), 0, 0, 0)
        ...     return Model(name, (row,))
        >>> model_differences([model("plain", False), model("denoised", True)])[0].gain
        1.0
    """
    return [
        _difference(models[0], second, ball, pairs)
        for second in models[1:]
        for ball in models[0].columns
        if (pairs := list(_pairs(models[0], second, ball)))
    ]


def _difference(
    first: Model, second: Model, ball: Ball, pairs: Sequence[tuple[bool, bool]]
) -> Difference:
    only_first, only_second = pairs.count((True, False)), pairs.count((False, True))
    verdicts = {first.trusted, second.trusted}
    return Difference(
        first.name,
        second.name,
        *ball,
        images=len(pairs),
        only_first=only_first,
        only_second=only_second,
        p_value=sign_test(only_first, only_second),
        trusted=False if False in verdicts else None if None in verdicts else True,
    )


def _pairs(first: Model, second: Model, ball: Ball) -> Iterator[tuple[bool, bool]]:
    mine, other = first.survivals.get(ball, {}), second.survivals.get(ball, {})
    for index in mine:
        if index in other and first.labels[index] == second.labels[index]:
            yield mine[index].kept, other[index].kept
