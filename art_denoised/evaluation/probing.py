"""What the masking checks look at: a few images, and attacks of our own on them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from art_denoised.attacks.contained import contained
from art_denoised.attacks.losses import margin
from art_denoised.attacks.pgd import PGD
from art_denoised.evaluation.robust_records import CLEAN, AttackRow
from art_denoised.evaluation.target import Target
from art_denoised.smoothing.bounds import lower_confidence_bound
from art_denoised.types import Images, Labels

ALPHA = 0.01  # probability of accusing a model whose share is at the tolerance


@dataclass(frozen=True)
class Probes:
    """How large the checks are.

    Attributes:
        images: Images looked at, the first that are right without attack.
        steps: Of the PGD with the margin loss that probes them.
        queries: Of the Square attack, where the run had no gradient-free attack.
        eot: Draws averaged, for randomised models.
    """

    images: int = 32
    steps: int = 20
    queries: int = 200
    eot: int = 8


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
    """

    target: Target
    x: Images
    y: Labels
    indices: tuple[int, ...]
    rows: tuple[AttackRow, ...]
    balls: tuple[tuple[str, float], ...]
    bare: nn.Module | None
    probes: Probes
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
        return next((ball for ball in by_size if not self.by_gradients(*ball).all()), by_size[-1])

    def broken(self, x_adv: Images) -> Tensor:
        """Return whether the model gets each image wrong more often than not."""
        return self.target.right(x_adv, self.y, seed=1).float().mean(0) < 0.5

    def pgd(self, norm: str, eps: float, steps: int) -> Tensor:
        """Return which images PGD breaks, with any of the model's gradients."""
        if not self.target.differentiable:
            return torch.zeros(len(self.x), dtype=torch.bool)
        key = (norm, eps, steps)
        if key not in self._probed:
            attack: Any = PGD(eps, norm=norm, steps=steps, loss="margin", eot=self.eot)  # type: ignore[arg-type]
            found = [
                self.target.attempt(attack, gradient, self.x, self.y, 0).x_adv
                for gradient in self.target.gradients()
            ]
            self._probed[key] = torch.stack([self.broken(x_adv) for x_adv in found]).any(0)
        return self._probed[key]

    def by_gradients(self, norm: str, eps: float) -> Tensor:
        """Return which images the run's gradient attacks or PGD break."""
        broken = {
            row.index
            for row in self.rows
            if (row.norm, row.eps) == (norm, eps) and row.gradient != "none" and row.mean < 0.5
        }
        mine = torch.tensor([index in broken for index in self.indices])
        return mine | self.pgd(norm, eps, self.probes.steps)

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


def exceeds(k: int, n: int, tolerance: float) -> bool:
    """Whether ``k`` of ``n`` images show that more than ``tolerance`` of all would do so.

    One-sided Clopper-Pearson at confidence 99 %.

    Example:
        >>> exceeds(3, 32, 0.02), exceeds(4, 32, 0.02)
        (False, True)
    """
    return k > 0 and lower_confidence_bound(k, n, ALPHA) > tolerance
