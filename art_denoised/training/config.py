"""How to train: everything that the three trainers have in common."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from torch import nn

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.runs.identity import describe

Optimizer = Literal["adam", "sgd"]
Schedule = Literal["cosine", "one-cycle", "step", "milestones", "sat-milestones", "constant"]
Augmentation = Literal["crop+flip", "crop", "none"]
ParameterGroups = Callable[[nn.Module], list[dict[str, Any]]]


def decayed_weights(network: nn.Module) -> list[dict[str, Any]]:
    """Group parameters so that weight decay acts on weights alone, as in the papers' releases.

    Weights are trained parameters of two or more dimensions that belong to no normalisation.
    Biases, normalisation and learnt activations such as `SmoothReLU` are not decayed.

    Args:
        network: Network that is trained.

    Returns:
        Parameter groups as PyTorch's optimizers take them.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
        >>> [(len(g["params"]), g.get("weight_decay")) for g in decayed_weights(net)]
        [(1, None), (3, 0.0)]
    """
    # Norms over several dimensions have weights that look like those of a linear layer.
    norms = {
        id(p) for m in network.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()
    }
    trained = [p for p in network.parameters() if p.requires_grad]
    weights = [p for p in trained if p.ndim > 1 and id(p) not in norms]
    decayed = {id(p) for p in weights}
    others = [p for p in trained if id(p) not in decayed]
    groups: list[dict[str, Any]] = [{"params": weights}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """How to train.

    Attributes:
        epochs: Number of passes over the data.
        batch_size: Number of images in a step. A last smaller batch is left out of the epoch.
        optimizer: "adam", or "sgd" with Nesterov's momentum.
        lr: Peak learning rate.
        momentum: Momentum of SGD.
        weight_decay: Factor of the L2 penalty, whose gradient is added to that of the loss.
        clip: Largest norm of the gradient, which is scaled down to it; 0 disables it.
        schedule: Learning rate over time. "cosine": 5% of the steps up to ``lr``, then a half
            cosine down to 0. "one-cycle": 30% up, then a line down to 0. "step": a tenth after each
            third of the steps (Salman et al. 2020). "milestones": 5% up, then a tenth after 35, 70
            and 95 of 110 parts of the steps (Xie et al., CVPR 2019). "sat-milestones": 5% up, then
            a tenth after 30, 60 and 90 of 100 (release of Xie et al. 2020). "constant".
        average: Decay of the exponential moving average of the weights that is returned; 0
            disables it. At step t the decay is at most (1 + t) / (10 + t).
        augment: Random crops from a reflected border of an eighth of the image, and flips:
            "crop+flip", "crop" (for digits) or "none".
        bf16: Whether to autocast to bfloat16; None: where the device computes in it natively.
        seed: Seed of everything random.
        parameter_groups: Function from the network to the parameter groups of the optimizer, for
            example with learning rates or weight decays of their own.
        checkpoint_every: Seconds between checkpoints within an epoch. It changes no result.

    Raises:
        InputError: A value is out of range.

    Example:
        >>> TrainingConfig(epochs=2, schedule="step").lr
        0.001
    """

    epochs: int = 30
    batch_size: int = 128
    optimizer: Optimizer = "adam"
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 1e-4
    clip: float = 1.0
    schedule: Schedule = "cosine"
    average: float = 0.999
    augment: Augmentation = "crop+flip"
    bf16: bool | None = None
    seed: int = 0
    parameter_groups: ParameterGroups = decayed_weights
    checkpoint_every: float = 60.0

    def __post_init__(self) -> None:
        checks.count("epochs", self.epochs)
        checks.count("batch_size", self.batch_size)
        if checks.count("seed", self.seed, 0) >= 2**64:
            raise InputError(f"seed is {self.seed}; give a whole number below 2^64")
        checks.positive("lr", self.lr)
        for name in ("weight_decay", "clip", "checkpoint_every"):
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

    @property
    def settings(self) -> dict[str, Any]:
        """What determines the result, as JSON values."""
        names = [field.name for field in fields(self) if field.name != "checkpoint_every"]
        return {name: describe(getattr(self, name)) for name in names}
