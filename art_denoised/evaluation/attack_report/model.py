"""What attacks left of each model, as figures with intervals: a pure function of rows.

docs/report.md says what every figure means. `text` and `page` show them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from art_denoised.evaluation.attack_report.survival import (
    Share,
    Survival,
    kept,
    share,
    sign_test,
    together,
)
from art_denoised.evaluation.attack_rows import (
    CLEAN,
    AttackRow,
    CheckRow,
    ImageRow,
    verdict,
)
from art_denoised.evaluation.records import CertifyRow
from art_denoised.evaluation.report import accuracy_table

ALL = "all attacks"
_LEVEL = 0.025  # of the one-sided test for an inversion, as one end of a 95% interval


class Ball(NamedTuple):
    """A norm and the radius of its ball, image units."""

    norm: str
    eps: float


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
        unmade: Names of masking checks that some run of it has not made.
    """

    name: str
    rows: tuple[AttackRow, ...] = ()
    checks: tuple[CheckRow, ...] = ()
    certified: tuple[CertifyRow, ...] = ()
    pictures: tuple[ImageRow, ...] = ()
    settings: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    same_images: bool = True
    unmade: tuple[str, ...] = ()

    @property
    def failed(self) -> tuple[CheckRow, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.passed is False)

    @property
    def trusted(self) -> bool | None:
        """Whether robust accuracy may be believed; None if the checks were not all made.

        Not where a check failed, nor where certificates contradict it.
        """
        return False if self.inversions else verdict(self.checks, self.unmade)

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
        return {ball: together(list(rows.values())) for ball, rows in self.columns.items()}

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
        if left := self.survivals[ball]:
            yield self._figure(ball, ALL, "", left, list(attacks.values()))

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
