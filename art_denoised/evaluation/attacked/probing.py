"""What the masking checks look at: a few images, and attacks of our own on them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from art_denoised import checks
from art_denoised.attacks.autoattack import AutoAttack
from art_denoised.attacks.contained import contained
from art_denoised.attacks.losses import margin
from art_denoised.attacks.pgd import PGD
from art_denoised.evaluation.attacked.records import CLEAN, AttackRow
from art_denoised.evaluation.attacked.target import Target
from art_denoised.smoothing.bounds import lower_confidence_bound
from art_denoised.types import Images, Labels

ALPHA = 0.01  # probability of accusing a model whose share is at the tolerance
LOST, KEPT = 0.25, 0.75  # shares of right answers; between them the noise of the model decides


@dataclass(frozen=True)
class Probes:
    """How large the checks are.

    Attributes:
        images: Images looked at, the first that are right without attack.
        steps: Of the PGD with the margin loss that probes them.
        queries: Of the Square attack on what gradient attacks left.
        eot: Draws averaged, for randomised models.

    Raises:
        InputError: One is not a whole number above 0.
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
        y: Their classes.
        indices: Of these images in the data set.
        rows: Of the run.
        balls: (norm, eps) of its attacks.
        bare: The classifier without its defence, if given.
        probes: How large the checks are.
        mixed: Columns of the run whose attack uses both gradients and scores, as AutoAttack does:
            what they break is no proof that gradients find it, nor that scores do.
    """

    target: Target
    x: Images
    y: Labels
    indices: tuple[int, ...]
    rows: tuple[AttackRow, ...]
    balls: tuple[tuple[str, float], ...]
    bare: nn.Module | None
    probes: Probes
    mixed: frozenset[tuple[str, str, float]] = frozenset()
    _probed: dict[tuple[str, float, int], Tensor] = field(default_factory=dict)

    @property
    def eot(self) -> int:
        """Draws to average."""
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
        """Return which images are broken in ``shares`` and by no gradient attack, one harder yet.

        Square finds a few that a short PGD of one start misses, also of honest models.
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
        """Return the rows of attacks in a ball that use gradients and nothing else."""
        here = (row for row in self.rows if (row.norm, row.eps) == (norm, eps))
        return [row for row in here if row.gradient != "none" and row.column not in self.mixed]

    def blind(self, norm: str, eps: float) -> list[AttackRow]:
        """Return the rows of attacks in a ball that use no gradient."""
        here = (row for row in self.rows if (row.norm, row.eps) == (norm, eps))
        return [row for row in here if row.gradient == "none" and row.attack != CLEAN]

    def gradients(self, how: str) -> Images:
        """Return the gradients of the margin loss at the images, averaged over draws."""
        total = torch.zeros_like(self.x)
        with contained(self.target.module, 0), self.target.taking(how), torch.enable_grad():
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
        with contained(self.target.module, 2):
            draws = [margin(self.target.logits(x), self.y) for _ in range(self.eot)]
        return torch.stack(draws).mean(0)


class Count(NamedTuple):
    """``k`` of ``n`` images speak against the figure, in words ``finding``."""

    k: int
    n: int
    finding: str


def gravest(counts: Iterable[Count], tolerance: float, among: int) -> tuple[Count, bool]:
    """Return the count that speaks most against the figure, and whether it exceeds the tolerance.

    The worst of ``among`` so many. A large share of few images does not hide a smaller one of many.

    Example:
        >>> gravest([Count(1, 8, "few"), Count(50, 500, "many")], tolerance=0.05, among=2)
        (Count(k=50, n=500, finding='many'), True)
    """
    judged = [(exceeds(k, n, tolerance, among), k / n, n, text) for k, n, text in counts]
    failed, share, n, finding = max(judged)
    return Count(round(share * n), n, finding), failed


def probe(norm: str, eps: float, steps: int, eot: int = 1) -> PGD:
    """Return the attack of the checks. An l_inf ball beyond 1 is that of 1: it holds all images.

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
    """Whether ``k`` of ``n`` images show that more than ``tolerance`` of all would do so.

    One-sided Clopper-Pearson at confidence 99 %, of the worst ``among`` so many (Bonferroni).

    Example:
        >>> exceeds(3, 32, 0.02), exceeds(4, 32, 0.02)
        (False, True)
    """
    return k > 0 and lower_confidence_bound(k, n, ALPHA / among) > tolerance
