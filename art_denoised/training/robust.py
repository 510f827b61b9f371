"""Adversarial training of classifiers, by the recipes of the papers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from art_denoised import checks
from art_denoised.attacks.ascent import in_eval
from art_denoised.attacks.pgd import PGD
from art_denoised.training.batches import Batches, stack_pairs
from art_denoised.training.config import TrainingConfig
from art_denoised.training.loop import Evaluation, train
from art_denoised.training.recipes import Recipe, find_recipe
from art_denoised.training.rows import EpochRow
from art_denoised.types import Images, Labels

ROBUST_CONFIG = TrainingConfig(
    epochs=30,
    optimizer="sgd",
    lr=0.1,
    weight_decay=5e-4,
    clip=0.0,
    schedule="one-cycle",
    average=0.995,
)

# Share of the clean accuracy that survives a single step of a network that learnt nothing from it.
_MOST = 0.75


class OverfittingWarning(UserWarning):
    """A training has overfitted catastrophically."""


@dataclass(frozen=True, slots=True)
class Validation:
    """A validation set of adversarial training, and what follows from its figures.

    Attributes:
        data: Pairs of image and label that are not trained on. They are attacked after each epoch.
        steps: Number of steps of that attack, PGD at the eps of the recipe.
        keep_best: Return the weights of the epoch with the highest robust accuracy. The accuracy of
            that epoch is then no longer unbiased.
        stop_on_overfitting: End the training when `overfits` detects it. Otherwise the training
            goes on, with a warning.

    Raises:
        InputError: ``steps`` is out of range.

    Example:
        >>> Validation([(torch.zeros(1, 8, 8), 3)], keep_best=True).steps
        10
    """

    data: Any
    steps: int = 10
    keep_best: bool = False
    stop_on_overfitting: bool = False

    def __post_init__(self) -> None:
        checks.count("steps", self.steps)


def train_robust(
    network: nn.Module,
    data: Any,
    recipe: str | Recipe = "pgd",
    config: TrainingConfig = ROBUST_CONFIG,
    *,
    validation: Any = None,
    run: Path | str | None = None,
    resume: bool = False,
    progress: bool = True,
) -> list[EpochRow]:
    """Train a classifier in place to be robust.

    Args:
        network: Classifier on its device, from images in [0, 1] to logits; normalisation belongs
            into it.
        data: Images in [0, 1] and labels, as `train` takes them.
        recipe: "pgd", "sat", "sat-release", "trades", "feature-denoising" or "clean" (`RECIPES`);
            one of them with other values, as in ``replace(RECIPES["sat"], eps=8 / 255)``; or a
            `Recipe` of your own.
        config: How to train; by default SGD, one cycle, averaged weights.
        validation: `Validation`, or its pairs of image and label. It gives the figures
            ``accuracy``, ``robust`` (under PGD), ``one_step`` (under a single step of length eps)
            and ``overfitting``, 1 or 0.
        run: Folder for log and checkpoint; None keeps neither.
        resume: Continue the training in the folder if there is one.
        progress: Show a progress bar.

    Returns:
        One row for each epoch.

    Raises:
        InputError: A value is out of range, the model cannot take the images, or `train` refuses.

    Example:
        >>> from art_denoised.demo import digits_network
        >>> data = torch.utils.data.TensorDataset(torch.rand(64, 1, 8, 8), torch.arange(64) % 10)
        >>> config = TrainingConfig(epochs=1, batch_size=32, optimizer="sgd", lr=0.05)
        >>> rows = train_robust(
        ...     digits_network(), data, "sat", config, validation=data, progress=False
        ... )
        >>> sorted(rows[0].figures)
        ['accuracy', 'one_step', 'overfitting', 'robust']
    """
    recipe = find_recipe(recipe)
    classes = _class_count(network, Batches(data, config).one()[0])
    evaluation = None
    if validation is not None:
        if not isinstance(validation, Validation):
            validation = Validation(validation)
        x, y = stack_pairs(validation.data, classes)
        _class_count(network, x[:1])
        attack = PGD(recipe.eps, norm=recipe.norm, steps=validation.steps, batch_size=256)
        evaluation = Evaluation(
            _Attacked(x, y, attack),
            keep_best="robust" if validation.keep_best else None,
            stop=_has_overfitted if validation.stop_on_overfitting else None,
        )
    return train(
        network,
        data,
        _RecipeLoss(recipe, classes),
        config,
        evaluation=evaluation,
        run=run,
        resume=resume,
        progress=progress,
    )


@dataclass(frozen=True, slots=True)
class _RecipeLoss:
    """Loss of a recipe, on labels that are checked."""

    recipe: Recipe
    classes: int

    def __call__(self, network: nn.Module, x: Images, y: Labels, step: int) -> Tensor:
        return self.recipe.loss(network, x, checks.labels(y, self.classes))


@dataclass(frozen=True, slots=True)
class _Attacked:
    """Figures of a classifier on a validation set."""

    x: Images
    y: Labels
    attack: PGD

    def __call__(self, network: nn.Module, rows: Sequence[EpochRow]) -> dict[str, float]:
        figures = measure_classifier(network, self.x, self.y, self.attack)
        figures["overfitting"] = float(overfits([*(row.figures for row in rows), figures]))
        if figures["overfitting"]:
            warnings.warn(
                f"epoch {len(rows) + 1}: catastrophic overfitting, accuracy is "
                f"{figures['robust']:.1%} under PGD and {figures['one_step']:.1%} under a single "
                "step; take more steps, a smaller step size, or the best epoch",
                OverfittingWarning,
                stacklevel=2,
            )
        return figures


def _has_overfitted(rows: Sequence[EpochRow]) -> bool:
    return bool(rows[-1].figures["overfitting"])


def overfits(figures: Sequence[Mapping[str, float]]) -> bool:
    """Whether the last epoch shows catastrophic overfitting (Wong et al., ICLR 2020).

    A single step no longer fools the network, but many steps do. Either robust accuracy is below
    half of an earlier epoch's while accuracy under a single step is above it. Or, which the first
    epoch can show as well, accuracy under a single step is above .75 of the clean accuracy and
    above .25, and robust accuracy is below a quarter of it.

    Args:
        figures: ``accuracy``, ``robust`` and ``one_step`` of each epoch so far.

    Example:
        >>> before = {"accuracy": 0.8, "robust": 0.4, "one_step": 0.45}
        >>> overfits([before, {"accuracy": 0.9, "robust": 0.02, "one_step": 0.9}])
        True
        >>> overfits([before, {"accuracy": 0.9, "robust": 0.02, "one_step": 0.05}])
        False
    """
    *earlier, last = figures
    robust, one_step = last["robust"], last["one_step"]
    highest = max((epoch["robust"] for epoch in earlier), default=0.0)
    fell = robust < highest / 2 and one_step > highest
    # A network merely not robust falls to single steps too (digits at eps .3: to a quarter).
    most = one_step > max(_MOST * last["accuracy"], 0.25)
    return fell or (most and robust < one_step / 4)


def measure_classifier(network: nn.Module, x: Images, y: Labels, attack: PGD) -> dict[str, float]:
    """Return the accuracy of a classifier on clean images and under attack.

    Args:
        network: Classifier in eval mode.
        x: Clean images.
        y: True labels.
        attack: Attack whose ball is also that of the single step, of length eps from a random
            point.

    Returns:
        ``accuracy``, ``robust`` (under ``attack``) and ``one_step``.

    Example:
        >>> from art_denoised.data import load_data
        >>> from art_denoised.demo import digits_classifier
        >>> data = load_data("digits")
        >>> x, y = data.images[:50], data.labels[:50]
        >>> figures = measure_classifier(digits_classifier(), x, y, PGD(0.2, steps=10))
        >>> figures["accuracy"] > 0.9, figures["robust"] < 0.3
        (True, True)
    """
    device = next(network.parameters()).device
    x, y = x.to(device), y.to(device)
    single = replace(attack, steps=1, step_size=attack.eps or None)
    size = attack.batch_size or len(x)
    figures = {}
    for name, images in {
        "accuracy": x,
        "robust": attack(network, x, y),
        "one_step": single(network, x, y),
    }.items():
        with torch.no_grad():
            predictions = torch.cat([network(part).argmax(1) for part in torch.split(images, size)])
        figures[name] = int((predictions == y).sum()) / len(y)
    return figures


def _class_count(network: nn.Module, x: Images) -> int:
    """Classify one image, to find a misfit before the work starts."""
    parameter = next(network.parameters(), torch.zeros(0))
    with in_eval(network):
        return checks.class_count(network, x.to(parameter.device))
