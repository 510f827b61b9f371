"""Adversarial training of classifiers, by the recipes of the papers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from art_denoised import checks
from art_denoised.attacks.ascent import in_eval
from art_denoised.attacks.pgd import PGD
from art_denoised.checks import InputError
from art_denoised.storage import tensors_fingerprint
from art_denoised.training.holdout import stack_holdout
from art_denoised.training.loop import Rows, first_image, train
from art_denoised.training.plan import Plan
from art_denoised.training.recipes import Recipe, describe, find_recipe
from art_denoised.types import Images, Labels

PLAN = Plan(
    epochs=30,
    optimizer="sgd",
    rate=0.1,
    weight_decay=5e-4,
    clip=0.0,
    schedule="one-cycle",
    average=0.995,
)


_MOST = 0.75  # of the clean accuracy that a single step leaves, if it teaches nothing


class OverfittingWarning(UserWarning):
    """A training has overfitted catastrophically."""


def train_robust(
    model: nn.Module,
    data: Any,
    *,
    recipe: str | Recipe = "pgd",
    plan: Plan | None = None,
    holdout: Any = None,
    judge_steps: int = 10,
    best: bool = False,
    stop_on_overfitting: bool = False,
    out: Path | str | None = None,
    resume: bool = False,
    identity: Mapping[str, Any] | None = None,
    tensorboard: bool = False,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Train a classifier in place to be robust.

    Args:
        model: Images in [0, 1] to logits, on its device; normalisation belongs into it.
        data: As for `train`: images in [0, 1] and labels.
        recipe: "pgd", "sat", "trades", "feature-denoising" or "clean" (`RECIPES`); one of them
            with other values, as in ``replace(RECIPES["sat"], eps=8 / 255)``; or a `Recipe` of
            your own.
        plan: How to train; by default `PLAN`: SGD, one cycle, averaged weights.
        holdout: Pairs of image and label, not trained on, that are attacked after each epoch.
        judge_steps: Steps of that attack, PGD at the eps of the recipe.
        best: Return the weights of the epoch with the highest robust accuracy on ``holdout``,
            whose figure is then no longer an unbiased one.
        stop_on_overfitting: End a training of which `overfits` says so. Else it goes on, and the
            row and a warning tell.
        out: As for `train`.
        resume: As for `train`.
        identity: As for `train`.
        tensorboard: As for `train`.
        progress: As for `train`.

    Returns:
        A row an epoch: epoch, loss, rate, seconds; with ``holdout`` also ``accuracy``, ``robust``
        (under PGD), ``one_step`` (under a single step of length eps) and ``overfitting``, 1 or 0.

    Raises:
        InputError: A value out of range, a model that cannot take the images, or as for `train`.

    Example:
        >>> from art_denoised.demo import digits_network
        >>> data = torch.utils.data.TensorDataset(torch.rand(64, 1, 8, 8), torch.arange(64) % 10)
        >>> plan = Plan(epochs=1, batch_size=32, optimizer="sgd", rate=0.05)
        >>> rows = train_robust(
        ...     digits_network(), data, recipe="sat", plan=plan, holdout=data, progress=False
        ... )
        >>> sorted(rows[0])
        ['accuracy', 'epoch', 'loss', 'one_step', 'overfitting', 'rate', 'robust', 'seconds']
    """
    recipe = find_recipe(recipe)
    if holdout is None and (best or stop_on_overfitting):
        raise InputError("there is no holdout to judge epochs on; give one")
    judge = PGD(recipe.eps, norm=recipe.norm, steps=judge_steps, batch_size=256)
    classes = _class_count(model, first_image(data))
    held_out = None if holdout is None else stack_holdout(holdout, classes)
    if held_out is not None:
        _class_count(model, held_out[0][:1])

    def evaluate(network: nn.Module, rows: Rows) -> dict[str, float]:
        assert held_out is not None
        row = judge_classifier(network, *held_out, judge)
        row["overfitting"] = float(overfits([*rows, row]))
        if row["overfitting"]:
            warnings.warn(
                f"epoch {len(rows) + 1}: catastrophic overfitting, {row['robust']:.1%} are right "
                f"under PGD and {row['one_step']:.1%} under a single step; take more steps, a "
                "shorter stride, or the best epoch",
                OverfittingWarning,
                stacklevel=2,
            )
        return row

    return train(
        model,
        data,
        lambda x, y, step: recipe.loss(model, x, y),
        PLAN if plan is None else plan,
        out=out,
        resume=resume,
        evaluate=None if held_out is None else evaluate,
        stop=(lambda rows: bool(rows[-1]["overfitting"])) if stop_on_overfitting else None,
        best="robust" if best else None,
        classes=classes,
        identity={
            **(identity or {}),
            **describe(recipe),
            "judge_steps": judge_steps,
            "holdout": None if held_out is None else tensors_fingerprint(*held_out),
            "stop_on_overfitting": stop_on_overfitting,
        },
        tensorboard=tensorboard,
        progress=progress,
    )


def overfits(rows: Rows) -> bool:
    """Whether the last epoch shows catastrophic overfitting (Wong et al., ICLR 2020).

    A single step no longer fools the network and many do. Either robust accuracy is below half of
    an earlier epoch's, while accuracy under a single step is above it. Or, which the first epoch
    can show as well, a single step leaves most of the clean accuracy, at least a quarter of the
    images, and many steps leave less than a quarter of that.

    Args:
        rows: Of `train_robust`, with ``accuracy``, ``robust`` and ``one_step``.

    Example:
        >>> before = {"accuracy": 0.8, "robust": 0.4, "one_step": 0.45}
        >>> overfits([before, {"accuracy": 0.9, "robust": 0.02, "one_step": 0.9}])
        True
        >>> overfits([before, {"accuracy": 0.9, "robust": 0.02, "one_step": 0.05}])  # honestly
        False
    """
    *earlier, last = rows
    robust, one_step = last["robust"], last["one_step"]
    highest = max((row["robust"] for row in earlier), default=0.0)
    fell = robust < highest / 2 and one_step > highest
    # A network merely not robust falls to single steps too (digits at eps .3: to a quarter).
    most = one_step > max(_MOST * last["accuracy"], 0.25)
    return fell or (most and robust < one_step / 4)


def judge_classifier(model: nn.Module, x: Images, y: Labels, attack: PGD) -> dict[str, float]:
    """Return the accuracy of a classifier on images as they are and under attack.

    Args:
        model: In eval mode.
        x: Images.
        y: True labels.
        attack: Its ball is also that of the single step, of length eps from a random point.

    Returns:
        ``accuracy``, ``robust`` (under ``attack``) and ``one_step``.

    Example:
        >>> from art_denoised.demo import digits_classifier
        >>> from art_denoised.data import load_data
        >>> x, y = (part[:50] for part in (load_data("digits").images, load_data("digits").labels))
        >>> judged = judge_classifier(digits_classifier(), x, y, PGD(0.2, steps=10))
        >>> judged["accuracy"] > 0.9, judged["robust"] < 0.3
        (True, True)
    """
    device = next(model.parameters()).device
    x, y = x.to(device), y.to(device)
    single = replace(attack, steps=1, step_size=attack.eps or None)
    size = attack.batch_size or len(x)
    judged = {}
    for name, images in {
        "accuracy": x,
        "robust": attack(model, x, y),
        "one_step": single(model, x, y),
    }.items():
        with torch.no_grad():
            answers = torch.cat([model(part).argmax(1) for part in torch.split(images, size)])
        judged[name] = int((answers == y).sum()) / len(y)
    return judged


def _class_count(model: nn.Module, x: Images) -> int:
    """Classify one image, to find a misfit before the work starts."""
    parameter = next(model.parameters(), torch.zeros(0))
    with in_eval(model):
        return checks.class_count(model, x.to(parameter.device))
