"""What the masking checks look at: a few images, and attacks of our own on them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import torch
from scipy import special
from torch import Tensor, nn

from art_denoised import checks
from art_denoised.attacks.autoattack import AutoAttack
from art_denoised.attacks.losses import margin
from art_denoised.attacks.pgd import PGD
from art_denoised.evaluation.attack_rows import CLEAN, AttackRow
from art_denoised.evaluation.columns import Column
from art_denoised.evaluation.target import Target
from art_denoised.types import Images, Labels

ALPHA = 0.01  # probability of accusing a model whose share is at the tolerance
LOST, KEPT = 0.25, 0.75  # shares of right answers; between them the noise of the model decides


@dataclass(frozen=True)
class Probes:
    """Size of the masking checks.

    Attributes:
        images: Number of images: the first that are right without attack.
        steps: Number of steps of the PGD with the margin loss.
        queries: Number of queries of Square, on images that gradient attacks left.
        eot: Number of draws averaged for randomised models.

    Raises:
        InputError: A value is not a whole number above 0.

    Example:
        >>> Probes(images=16).steps
        20
    """

    images: int = 32
    steps: int = 20
    queries: int = 200
    eot: int = 8

    def __post_init__(self) -> None:
        for size in fields(self):
            checks.count(size.name, getattr(self, size.name))


@dataclass
class Subject:
    """What the checks look at.

    Attributes:
        target: The model.
        x: Images.
        y: True classes of the images.
        indices: Indices of these images in the data set.
        rows: Rows of the run.
        columns: Attacks of the run.
        undefended: The classifier without its defence, if given.
        probes: Size of the checks.
    """

    target: Target
    x: Images
    y: Labels
    indices: tuple[int, ...]
    rows: tuple[AttackRow, ...]
    columns: tuple[Column, ...]
    undefended: nn.Module | None
    probes: Probes
    _probed: dict[tuple[str, float, int], Tensor] = field(default_factory=dict)

    @property
    def balls(self) -> tuple[tuple[str, float], ...]:
        """Norm and eps of the attacks."""
        balls = {(column.attack.norm, column.attack.eps) for column in self.columns}
        return tuple(sorted(balls))

    @property
    def eot(self) -> int:
        """Number of draws to average."""
        return self.probes.eot if self.target.randomised else 1

    @property
    def attackable(self) -> bool:
        """Whether the images are right without attack."""
        right = {row.index for row in self.rows if row.attack == CLEAN and row.clean}
        return right >= set(self.indices)

    @property
    def ball(self) -> tuple[str, float]:
        """The largest ball of the run in which some image survives gradient attacks."""
        by_size = sorted(self.balls, key=lambda ball: -ball[1])
        left = (ball for ball in by_size if (self.by_gradients(*ball) >= KEPT).any())
        return next(left, by_size[-1])

    def right(self, x_adv: Images) -> Tensor:
        """Return how often the model is right on each image, in [0, 1]."""
        return self.target.right(x_adv, self.y, seed=1).float().mean(0)

    def pgd(self, norm: str, eps: float, steps: int) -> Tensor:
        """Return how often images are right under PGD, with the worst of the model's gradients."""
        if not self.target.differentiable:
            return self.right(self.x)
        key = (norm, eps, steps)
        if key not in self._probed:
            attack = probe(norm, eps, steps, self.eot)
            found = [
                self.target.attempt(attack, gradient, self.x, self.y, 0).x_adv
                for gradient in self.target.gradients()
            ]
            self._probed[key] = torch.stack([self.right(x_adv) for x_adv in found]).amin(0)
        return self._probed[key]

    def by_gradients(self, norm: str, eps: float) -> Tensor:
        """Return how often images are right under the worst gradient attack, PGD among them."""
        seen = worst(self.seeing(norm, eps))
        mine = torch.tensor([seen.get(index, 1.0) for index in self.indices])
        return torch.minimum(mine, self.pgd(norm, eps, self.probes.steps))

    def by_square(self, norm: str, eps: float) -> Tensor:
        """Return how often images are right under Square, 1 where gradient attacks broke them."""
        shares = torch.ones(len(self.x))
        left = self.by_gradients(norm, eps) >= KEPT
        if left.any():
            attack = AutoAttack(eps, norm=norm, parts=("square",), queries=self.probes.queries)  # type: ignore[arg-type]
            found = self.target.attempt(attack, "none", self.x[left], self.y[left], 0)
            x_adv = self.x.clone()
            x_adv[left] = found.x_adv
            shares[left] = self.right(x_adv)[left]
        return shares

    def alone(self, norm: str, eps: float, shares: Tensor) -> Tensor:
        """Return which images are broken in ``shares`` but not by gradient attacks.

        They are attacked harder first: Square finds a few images that a short PGD of one start
        misses, on honest models too.
        """
        alone = (shares <= LOST) & (self.by_gradients(norm, eps) >= KEPT)
        attack = replace(probe(norm, eps, 5 * self.probes.steps, self.eot), restarts=4)
        for how in self.target.gradients() if self.target.differentiable else ():
            if alone.any():
                x_adv = self.x.clone()
                x_adv[alone] = self.target.attempt(
                    attack, how, self.x[alone], self.y[alone], 0
                ).x_adv
                alone &= self.right(x_adv) >= KEPT
        return alone

    def seeing(self, norm: str, eps: float) -> list[AttackRow]:
        """Return the rows of attacks in a ball that use gradients and nothing else.

        What a mixed attack such as AutoAttack breaks shows neither that gradients find it, nor that
        scores do.
        """
        mixed = {column.key for column in self.columns if column.mixed}
        here = (row for row in self.rows if (row.norm, row.eps) == (norm, eps))
        return [row for row in here if row.gradient != "none" and row.column not in mixed]

    def blind(self, norm: str, eps: float) -> list[AttackRow]:
        """Return the rows of attacks in a ball that use no gradient."""
        here = (row for row in self.rows if (row.norm, row.eps) == (norm, eps))
        return [row for row in here if row.gradient == "none" and row.attack != CLEAN]

    def gradients(self, how: str) -> Images:
        """Return the gradients of the margin loss at the images, averaged over draws."""
        total = torch.zeros_like(self.x)
        with self.target.session(0), self.target.taking(how), torch.enable_grad():
            for _ in range(self.eot):
                leaf = self.x.clone().requires_grad_()
                loss = margin(self.target.logits(leaf), self.y).sum()
                if loss.requires_grad:
                    (part,) = torch.autograd.grad(loss, leaf, allow_unused=True)
                    total += 0 if part is None else part
        return total

    @torch.no_grad()
    def losses(self, x: Images) -> Tensor:
        """Return the margin loss of each image, averaged over draws."""
        with self.target.session(2):
            draws = [margin(self.target.logits(x), self.y) for _ in range(self.eot)]
        return torch.stack(draws).mean(0)


class Count(NamedTuple):
    """``k`` of ``n`` images speak against the result, in words ``finding``."""

    k: int
    n: int
    finding: str


def gravest(counts: Iterable[Count], tolerance: float, among: int) -> tuple[Count, bool]:
    """Return the count that speaks most against the result, and whether it exceeds the tolerance.

    It is the worst of ``among`` counts. A large share of few images does not hide a smaller share
    of many.

    Example:
        >>> gravest([Count(1, 8, "few"), Count(50, 500, "many")], tolerance=0.05, among=2)
        (Count(k=50, n=500, finding='many'), True)
    """
    judged = [(exceeds(k, n, tolerance, among), k / n, n, text) for k, n, text in counts]
    failed, share, n, finding = max(judged)
    return Count(round(share * n), n, finding), failed


def probe(norm: str, eps: float, steps: int, eot: int = 1) -> PGD:
    """Return the attack of the checks. An l_inf ball beyond 1 becomes 1, which holds all images.

    Example:
        >>> probe("linf", 1.2, steps=20).eps, probe("l2", 1.2, steps=20).eps
        (1.0, 1.2)
    """
    eps = min(eps, 1.0) if norm == "linf" else eps
    return PGD(eps, norm=norm, steps=steps, loss="margin", eot=eot)  # type: ignore[arg-type]


def worst(rows: Iterable[AttackRow]) -> dict[int, float]:
    """Return how often each image is right under the worst of the attacks in ``rows``."""
    shares: dict[int, float] = {}
    for row in rows:
        if row.attack != CLEAN and row.clean:
            shares[row.index] = min(row.mean, shares.get(row.index, 1.0))
    return shares


def exceeds(k: int, n: int, tolerance: float, among: int = 1) -> bool:
    """Whether ``k`` of ``n`` images show that more than ``tolerance`` of all images would do so.

    One-sided exact binomial test at level 1 %, divided by ``among`` for the worst of so many
    counts (Bonferroni). It exceeds if the Clopper-Pearson lower bound lies above ``tolerance``.

    Example:
        >>> exceeds(3, 32, 0.02), exceeds(4, 32, 0.02)
        (False, True)
    """
    # P(Binomial(n, tolerance) >= k) as an incomplete beta function
    return k > 0 and float(special.betainc(k, n - k + 1, tolerance)) < ALPHA / among
