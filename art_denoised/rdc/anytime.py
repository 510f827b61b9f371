"""Predictions of a diffusion classifier from a part of its network evaluations.

All classes share the noise of a level, so classes are compared in pairs, level by level, and most
can be dropped after a few levels. Levels are taken in an order of which every beginning is spread
over all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from art_denoised import checks
from art_denoised.diffusion.levels import LevelNoise
from art_denoised.rdc.classifier import DiffusionClassifier

if TYPE_CHECKING:
    from art_denoised.types import Images, Labels


@dataclass(frozen=True)
class AnytimePrediction:
    """The result of `predict_anytime`.

    Attributes:
        predictions: Predicted classes, (batch,).
        decided: Whether one class was left, or all levels were evaluated for those that were left,
            (batch,); False where the budget ran out before.
        nfe: Number of network evaluations.
        full_nfe: Number of network evaluations of the full computation.
    """

    predictions: Labels
    decided: Tensor
    nfe: int
    full_nfe: int


@torch.no_grad()
def predict_anytime(
    classifier: DiffusionClassifier,
    x: Images,
    *,
    z: float = 3.0,
    first: int = 4,
    budget: int | None = None,
) -> AnytimePrediction:
    """Predict by elimination of classes.

    After m of L levels, a class is dropped if the projected difference of its loss to the leader's,
    L / m times the sum of their paired differences so far, exceeds z of its standard errors (with
    the correction for a finite number of levels). This is no proof: `disagreement` measures how
    often the prediction differs from that of all levels.

    Args:
        classifier: Diffusion classifier.
        x: Images (batch, channels, height, width) in [0, 1].
        z: Number of standard errors; larger is safer and slower.
        first: Number of levels before each round of elimination.
        budget: Largest number of network evaluations in all; None: no limit.

    Raises:
        InputError: A value is out of range, or the images cannot be used.

    Example:
        >>> from art_denoised.demo import digits_diffusion
        >>> from art_denoised.data import load_data
        >>> x = torch.stack([load_data("digits")[i][0] for i in range(8)])
        >>> classifier = DiffusionClassifier(digits_diffusion(), seed=0)
        >>> found = predict_anytime(classifier, x)
        >>> bool((found.predictions == classifier(x).argmax(1)).all())
        True
        >>> found.nfe < found.full_nfe / 3
        True
    """
    x, z = classifier.checked(x), checks.positive("z", z)
    first = max(checks.count("first", first), 2)
    count, classes = len(classifier.levels.sigmas), classifier.classes
    full = classifier.nfe(len(x))
    left = full if budget is None else checks.count("budget", budget, 0)
    noise, order = LevelNoise(classifier.seed), _spread(count)
    alive = torch.ones(len(x), classes, dtype=torch.bool, device=x.device)
    # Losses by level, in the order of evaluation; those of dropped classes stay zero.
    losses = torch.zeros(len(x), classes, count, dtype=torch.float64, device=x.device)
    prior = classifier.log_prior.double() * classifier.temperature / count  # as a loss a level
    done = torch.zeros(len(x), dtype=torch.long, device=x.device)
    spent = 0
    for start in range(0, count, first):
        chunk = order[start : start + first]
        racing = (alive.sum(1) > 1) & (done == start)  # none that the budget left behind
        cost = (alive.sum(1) * len(chunk)).where(racing, torch.zeros_like(done))
        racing &= cost.cumsum(0) <= left - spent
        rows = (racing[:, None] & alive).cpu().nonzero()
        if not len(rows):
            break
        for position, level in enumerate(chunk, start=start):
            for part in torch.split(rows, classifier.max_batch):
                image, label = part.unbind(1)
                at = (image, torch.full_like(image, level), label)
                losses[image, label, position] = classifier.errors(x[image], at, noise).double()
        checks.finite_answer(losses)
        spent += len(rows) * len(chunk)
        seen = start + len(chunk)
        done[racing] = seen
        if seen < count:  # after all levels the argmin decides
            alive &= ~(
                _behind(losses[:, :, :seen] - prior[:, None], alive, count, z) & racing[:, None]
            )
    # The prior counts for as many levels as the losses do; alone, where there are none.
    total = losses.sum(2) - prior * done.clamp_min(1)[:, None]
    predictions = total.masked_fill(~alive, torch.inf).argmin(1)
    decided = (alive.sum(1) == 1) | (done == count)
    return AnytimePrediction(predictions, decided, spent, full)


@torch.no_grad()
def disagreement(classifier: DiffusionClassifier, x: Images, **options: float) -> float:
    """Return the share of images for which `predict_anytime` and all levels disagree.

    Args:
        classifier: Diffusion classifier with a seed, so that both see the same noise.
        x: Images.
        **options: Options of `predict_anytime`.

    Raises:
        InputError: The classifier has no seed, a value is out of range, or the images cannot be
            used.

    Example:
        >>> from art_denoised.demo import digits_diffusion
        >>> from art_denoised.data import load_data
        >>> x = torch.stack([load_data("digits")[i][0] for i in range(20)])
        >>> disagreement(DiffusionClassifier(digits_diffusion(), seed=0), x)
        0.0
    """
    if classifier.seed is None:
        raise checks.InputError("the seed is None, so noise is fresh in every call; give a seed")
    found = predict_anytime(classifier, x, **options)  # type: ignore[arg-type]
    return float((found.predictions != classifier(x).argmax(1)).double().mean())


def _behind(losses: Tensor, alive: Tensor, count: int, z: float) -> Tensor:
    """Return which classes cannot catch up with the leader, (batch, classes)."""
    seen = losses.shape[2]
    leader = losses.sum(2).masked_fill(~alive, torch.inf).argmin(1)
    difference = losses - losses[torch.arange(len(losses)), leader][:, None]
    spread = difference.std(2) * (seen * (1 - seen / count)) ** 0.5
    return alive & (difference.sum(2) > z * spread)


def _spread(count: int) -> list[int]:
    """Return 0..count-1 in an order whose beginnings are spread evenly (van der Corput)."""
    bits = count.bit_length()
    reversed_bits = (int(f"{i:0{bits}b}"[::-1], 2) for i in range(2**bits))
    return [level for level in reversed_bits if level < count]
