"""What attacks left of each model, as figures with intervals: a pure function of rows.

docs/report.md says what every figure means. `robust_text` and `robust_page` show them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

from scipy import stats

from art_denoised.evaluation.records import CertifyRow
from art_denoised.evaluation.report import accuracy_table
from art_denoised.evaluation.robust_records import CLEAN, AttackRow, CheckRow, ImageRow
from art_denoised.smoothing.statistics import Interval, proportion_interval

ALL = "all attacks"
_LEVEL = 0.025  # of the one-sided test for an inversion, as one end of a 95% interval


class Share(NamedTuple):
    """A share of images with its 95% interval."""

    value: float
    low: float
    high: float


class Ball(NamedTuple):
    """A norm and the radius of its ball, image units."""

    norm: str
    eps: float


class Survival(NamedTuple):
    """What is left of one image: shares of evaluations, 0 or 1 for single ones."""

    counted: float
    fresh: float
    worst: float


@dataclass(frozen=True)
class Figure:
    """Accuracy of one model under one attack, or under all of them.

    Attributes:
        ball: Norm and eps.
        attack: Name of the attack, or `ALL`.
        gradient: "exact", "bpda", "none"; empty for `ALL`.
        images: How many.
        draws: Evaluations of each attacked image after the attack.
        clean: Accuracy on the same images unattacked; None where it was not measured.
        counted: Robust accuracy as the attack counted it.
        fresh: On fresh noise, mean over evaluations. The figure to quote.
        worst: An image counts if it is right in every evaluation, the attack's own among them.
        seconds: Of the attack, an image.
    """

    ball: Ball
    attack: str
    gradient: str
    images: int
    draws: int
    clean: Share | None
    counted: Share
    fresh: Share
    worst: Share
    seconds: float


@dataclass(frozen=True)
class Agreement:
    """Certified accuracy at one radius beside l2 robust accuracy at eps equal to it.

    What is certified cannot be broken, so the first is at most the second.

    Attributes:
        radius: The l2 radius, which is eps.
        certified: Certified accuracy.
        empirical: Robust accuracy under all attacks.
        paired: Images in both logs. Both accuracies are over them; 0: each over its own.
        broken: Indices of images that are certified at the radius and yet were broken.
        spared: How many are not certified and survived.
        p_value: Of ``broken`` against ``spared`` (exact, one-sided); None where nothing is paired.
    """

    radius: float
    certified: Share
    empirical: Share
    paired: int
    broken: tuple[int, ...]
    spared: int
    p_value: float | None

    @property
    def inverted(self) -> bool:
        """Whether certified accuracy is above robust accuracy beyond what chance explains."""
        apart = self.certified.low > self.empirical.high
        return apart or (self.p_value is not None and self.p_value < _LEVEL)


@dataclass(frozen=True)
class Model:
    """All rows of one defended model.

    Attributes:
        name: For people.
        rows: Of all attacks.
        checks: What the masking checks found.
        certified: Rows of certify.
        pictures: Images before and after.
        settings: Title -> settings of the run, for each log.
        same_images: Whether attack and certify logs index the same data.
    """

    name: str
    rows: tuple[AttackRow, ...] = ()
    checks: tuple[CheckRow, ...] = ()
    certified: tuple[CertifyRow, ...] = ()
    pictures: tuple[ImageRow, ...] = ()
    settings: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    same_images: bool = True

    @property
    def failed(self) -> tuple[CheckRow, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.passed is False)

    @property
    def trusted(self) -> bool | None:
        """Whether robust accuracy may be believed; None if no check was made.

        Not where a check failed, nor where certificates contradict it.
        """
        if self.failed or self.inversions:
            return False
        return True if any(check.passed for check in self.checks) else None

    @property
    def clean(self) -> Share | None:
        """Accuracy on all images unattacked, on fresh noise."""
        return share([row.mean for row in self.rows if row.attack == CLEAN])

    @cached_property
    def labels(self) -> dict[int, int]:
        """Image -> its true class."""
        return {row.index: row.label for row in self.rows}

    @cached_property
    def columns(self) -> dict[Ball, dict[tuple[str, str], dict[int, AttackRow]]]:
        """Ball -> (attack, gradient) -> image -> row, of real attacks, balls in order."""
        columns: dict[Ball, dict[tuple[str, str], dict[int, AttackRow]]] = {}
        attacked = [row for row in self.rows if row.attack != CLEAN]
        for row in sorted(attacked, key=lambda row: (row.norm, row.eps)):
            of_ball = columns.setdefault(Ball(row.norm, row.eps), {})
            of_ball.setdefault((row.attack, row.gradient), {})[row.index] = row
        return columns

    @cached_property
    def figures(self) -> tuple[Figure, ...]:
        """For each ball every attack, and after them all together."""
        return tuple(itertools.chain.from_iterable(map(self._figures, self.columns)))

    @property
    def headlines(self) -> tuple[Figure, ...]:
        """The figures under all attacks, one a ball."""
        return tuple(figure for figure in self.figures if figure.attack == ALL)

    @cached_property
    def survivals(self) -> dict[Ball, dict[int, Survival]]:
        """Ball -> image -> what all attacks leave, of images that every one of them tried."""
        return {ball: _together(list(rows.values())) for ball, rows in self.columns.items()}

    @cached_property
    def agreements(self) -> tuple[Agreement, ...]:
        """Certified accuracy beside robust accuracy, at each eps of the l2 attacks."""
        if not self.certified:
            return ()
        balls = [figure.ball for figure in self.headlines if figure.ball.norm == "l2"]
        return tuple(self._agreement(ball) for ball in balls)

    @property
    def inversions(self) -> tuple[Agreement, ...]:
        """Where certified accuracy is above robust accuracy, which cannot be."""
        return tuple(agreement for agreement in self.agreements if agreement.inverted)

    def _figures(self, ball: Ball) -> Iterator[Figure]:
        attacks = self.columns[ball]
        for (attack, gradient), rows in attacks.items():
            single = {i: Survival(row.counted, row.mean, row.worst) for i, row in rows.items()}
            yield self._figure(ball, attack, gradient, single, [rows])
        if together := self.survivals[ball]:
            yield self._figure(ball, ALL, "", together, list(attacks.values()))

    def _figure(
        self,
        ball: Ball,
        attack: str,
        gradient: str,
        left: Mapping[int, Survival],
        attacks: Sequence[Mapping[int, AttackRow]],
    ) -> Figure:
        clean = [row.mean for row in self.rows if row.attack == CLEAN and row.index in left]
        shares = (share(values) for values in zip(*left.values(), strict=True))
        counted, fresh, worst = (entry for entry in shares if entry is not None)
        spent = math.fsum(rows[index].seconds for rows in attacks for index in left)
        return Figure(
            ball=ball,
            attack=attack,
            gradient=gradient,
            images=len(left),
            draws=min(len(rows[index].fresh) for rows in attacks for index in left),
            clean=share(clean) if len(clean) == len(left) else None,
            counted=counted,
            fresh=fresh,
            worst=worst,
            seconds=spent / len(left),
        )

    def _agreement(self, ball: Ball) -> Agreement:
        certificates = {row.idx: row for row in self.certified}
        left = self.survivals[ball]
        paired = [
            index
            for index in left
            if self.same_images
            and index in certificates
            and certificates[index].label == self.labels[index]
        ]
        of_certified = [certificates[index] for index in paired] or list(self.certified)
        empirical = share([left[index].fresh for index in paired or left])
        entry = accuracy_table(of_certified, [ball.eps])[0]
        held = {row.idx for row in of_certified if row.correct and row.radius >= ball.eps}
        broken = tuple(index for index in paired if index in held and not kept(left[index]))
        spared = sum(index not in held and kept(left[index]) for index in paired)
        assert empirical is not None  # a headline has images
        return Agreement(
            radius=ball.eps,
            certified=Share(entry.certified_accuracy, entry.low, entry.high),
            empirical=empirical,
            paired=len(paired),
            broken=broken,
            spared=spared,
            p_value=sign_test(len(broken), spared, "greater") if paired else None,
        )


def share(values: Sequence[float]) -> Share | None:
    """Return the mean of values in [0, 1], one an image, with its 95% interval; None of nothing.

    For whole counts the interval is Clopper and Pearson's. A mean of averages over evaluations
    varies less than a count of the same mean; it gets the interval of the counts around it.

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


@cache  # milliseconds each, and a report asks for the same ones again and again
def _interval(k: int, n: int) -> Interval:
    return proportion_interval(k, n)


def _together(attacks: Sequence[Mapping[int, AttackRow]]) -> dict[int, Survival]:
    common = sorted(set.intersection(*map(set, attacks)))
    together = [survival([rows[index] for rows in attacks]) for index in common]
    # No average over images may be above that of a single attack on them, so the strongest
    # single attack stands in where choosing by few evaluations did worse.
    singles = [[rows[index].mean for index in common] for rows in attacks]
    fresh = min([[image.fresh for image in together], *singles], key=math.fsum)
    left = zip(common, together, fresh, strict=True)
    return {index: image._replace(fresh=mean) for index, image, mean in left}


def survival(rows: Sequence[AttackRow]) -> Survival:
    """Return what several attacks leave of one image: the one that harms it most.

    On fresh noise, the lowest of several averages of a few evaluations is too low: luck has
    chosen it. So half of the evaluations choose the attack and the other half judge it, and
    the other way round. With one evaluation each, which is all a deterministic model needs, it
    is the lowest.

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


def kept(image: Survival) -> bool:
    """Return whether an image is right in at least half of its evaluations, as smoothing votes.

    Example:
        >>> kept(Survival(counted=0, fresh=0.5, worst=0))
        True
    """
    return image.fresh >= 0.5


def sign_test(first: int, second: int, alternative: str = "two-sided") -> float:
    """Return the exact p-value that both counts have the same expectation (McNemar's test).

    Example:
        >>> sign_test(0, 0), round(sign_test(9, 1, "greater"), 3)
        (1.0, 0.011)
    """
    if first + second == 0:
        return 1.0
    return float(stats.binomtest(first, first + second, 0.5, alternative=alternative).pvalue)


def ball_name(ball: Ball) -> str:
    """Return a ball in words, eps as a fraction of 255 where it is one.

    Example:
        >>> ball_name(Ball("linf", 8 / 255)), ball_name(Ball("l2", 0.5))
        ('linf eps 8/255', 'l2 eps 0.5')
    """
    return f"{ball.norm} eps {eps_name(ball.eps)}"


def eps_name(eps: float) -> str:
    """Return eps as people write it.

    Example:
        >>> eps_name(8 / 255), eps_name(0.25)
        ('8/255', '0.25')
    """
    whole = round(eps * 255)
    exact = 0 < whole < 128 and math.isclose(eps * 255, whole, rel_tol=1e-4)
    return f"{whole}/255" if exact and len(f"{eps:g}") > 5 else f"{eps:g}"


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values)
