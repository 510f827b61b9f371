"""How to train, and what is done to images before each step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch.nn import functional as F

from art_denoised import checks
from art_denoised.checks import InputError

if TYPE_CHECKING:
    from art_denoised.types import Images

Optimizer = Literal["adam", "sgd"]
Schedule = Literal["cosine", "one-cycle", "step", "milestones", "constant"]
Augmentation = Literal["crop+flip", "crop", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How to train.

    Attributes:
        epochs: Passes over the data.
        batch_size: Images a step; those of a last smaller batch sit out the epoch.
        optimizer: "adam", or "sgd" with Nesterov's momentum.
        rate: Peak learning rate.
        momentum: Of SGD.
        weight_decay: Of the optimizer (added to the gradient).
        clip: Largest norm of the gradient, which is scaled down to it; 0 for none.
        schedule: "cosine": 5% of the steps up to ``rate``, then a half cosine down to 0;
            "one-cycle": 30% up, then a line down to 0; "step": a tenth after each third of the
            steps, as in Salman et al.; "milestones": 5% up, a tenth after 32%, 64% and 86% of the
            steps, as in Xie et al.; "constant".
        average: Decay of the exponential moving average of the weights that is returned, 0 for
            none. It starts faster, at step t with at most (1 + t) / (10 + t).
        augment: Random crops out of a reflected border of an eighth of the image, and flips:
            "crop+flip", "crop" (for digits) or "none".
        bf16: Autocast to bfloat16; None: where the machine computes in it.
        seed: Of everything random.

    Raises:
        InputError: A value out of range.

    Example:
        >>> plan = Plan(epochs=2, schedule="step")
        >>> [plan.rate_at(step, 30) for step in (0, 10, 29)]
        [0.001, 0.0001, 1e-05]
    """

    epochs: int = 30
    batch_size: int = 128
    optimizer: Optimizer = "adam"
    rate: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 1e-4
    clip: float = 1.0
    schedule: Schedule = "cosine"
    average: float = 0.999
    augment: Augmentation = "crop+flip"
    bf16: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        checks.count("epochs", self.epochs)
        checks.count("batch_size", self.batch_size)
        if checks.count("seed", self.seed, 0) >= 2**64:
            raise InputError(f"seed is {self.seed}; give a whole number below 2^64")
        checks.positive("rate", self.rate)
        for name in ("weight_decay", "clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}; give a number >= 0")
        for name in ("average", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; give a number in [0, 1)")
        names = {"optimizer": Optimizer, "schedule": Schedule, "augment": Augmentation}
        for name, known in names.items():
            if getattr(self, name) not in get_args(known):
                raise InputError(
                    f"{name} is {getattr(self, name)!r}; give one of {', '.join(get_args(known))}"
                )

    def rate_at(self, step: int, steps: int) -> float:
        """Return the learning rate of step ``step`` of ``steps``."""
        done = step / steps
        if self.schedule == "step":
            return float(f"{self.rate * 0.1 ** int(3 * done):.12g}")
        if self.schedule == "constant":
            return self.rate
        warm = max(1, round(0.3 * steps) if self.schedule == "one-cycle" else steps // 20)
        if step < warm:
            return self.rate * (step + 1) / warm
        if self.schedule == "one-cycle":
            return self.rate * (steps - step) / (steps - warm + 1)
        if self.schedule == "milestones":
            return self.rate * 0.1 ** sum(done >= part / 110 for part in (35, 70, 95))
        return self.rate * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2


def augment(x: Images, how: Augmentation = "crop+flip") -> Images:
    """Crop out of a reflected border of an eighth of the image, and flip, each on its own.

    Draws from torch's global random state.

    Args:
        x: Images.
        how: "crop+flip", "crop" or "none".

    Example:
        >>> augment(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 3, 32, 32])
    """
    if how == "none":
        return x
    n, _, height, width = x.shape
    border = max(1, min(height, width) // 8)
    padded = F.pad(x, (border,) * 4, mode="reflect")
    top, left = torch.randint(0, 2 * border + 1, (2, n), device=x.device)
    rows = top[:, None] + torch.arange(height, device=x.device)
    columns = left[:, None] + torch.arange(width, device=x.device)
    if how == "crop+flip":
        flipped = torch.rand(n, device=x.device) < 0.5
        columns = torch.where(flipped[:, None], columns.flip(1), columns)
    item = torch.arange(n, device=x.device)[:, None, None]
    # Advanced indices around the channel slice come first: (n, height, width, channels).
    return padded[item, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
