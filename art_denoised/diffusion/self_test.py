"""A test on a few images whether a diffusion model from elsewhere is wired up correctly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, get_args

import torch
from torch import Tensor

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.diffusion.model import DiffusionModel
from art_denoised.diffusion.preconditioning import DDPM, Prediction

if TYPE_CHECKING:
    from art_denoised.types import Images, Labels

_LEVELS = (0.05, 0.1, 0.25, 0.5)  # image units
_CLEARLY = 0.9  # another reading fits better if it leaves less than this share of the error


class SelfTest(NamedTuple):
    """Result at one noise level.

    Attributes:
        sigma: Noise level in image units.
        error: Mean squared error in units of the noise's variance: below 1 if the model denoises.
        conditional_error: The same, given the true class; NaN for unconditional models.
        class_effect: Mean squared difference of both answers, in the same units.
    """

    sigma: float
    error: float
    conditional_error: float
    class_effect: float


@torch.no_grad()
def self_test(model: DiffusionModel, x: Images, y: Labels | None = None) -> list[SelfTest]:
    """Check that a model denoises real images, with and without class, in the right units.

    The same network is also read in other ways: with every prediction type of a DDPM, and with the
    image ranges [-1, 1] and [0, 1]. What was declared must fit best, up to a tenth.

    Args:
        model: Diffusion model in eval mode.
        x: Clean images like those of its training, (batch, channels, height, width) in [0, 1].
        y: Classes of the images, for a conditional model.

    Returns:
        A row for each of four noise levels that the model was trained on.

    Raises:
        InputError: The model cannot take the images, does not denoise them, or fits clearly better
            in another reading, which is named.

    Example:
        >>> from art_denoised.demo import digits_diffusion
        >>> from art_denoised.data import load_data
        >>> data = [load_data("digits")[i] for i in range(50)]
        >>> x, y = torch.stack([x for x, _ in data]), torch.tensor([y for _, y in data])
        >>> rows = self_test(digits_diffusion(), x, y)
        >>> all(row.error < 0.9 and row.conditional_error < 0.9 for row in rows)
        True
    """
    x = checks.images(x)
    if y is not None and model.classes is not None:
        y = checks.labels(y, model.classes)
    levels = [sigma for sigma in _LEVELS if model.sigma_min <= sigma <= model.sigma_max]
    if not levels:
        raise InputError(
            f"the model was trained on sigma {model.sigma_min:g} to {model.sigma_max:g} (image "
            "units), where images are only noise; check its image_range"
        )
    first = None if y is None else y[:1]
    checks.denoises(lambda x, sigma: model(x, sigma, first), x[:1], levels[0])
    generator = torch.Generator().manual_seed(0)
    # One noise for all readings, drawn on the CPU for all devices.
    noise = {sigma: torch.randn(x.shape, generator=generator).to(x) for sigma in levels}
    rows = _errors(model, x, y, noise)
    _compare_readings(model, x, y, noise, rows)
    for row in rows:
        error = row.error if math.isnan(row.conditional_error) else max(row[1:3])
        if not error < 1:
            raise InputError(
                f"at sigma {row.sigma:g} the model leaves {error:.2g} times the noise; check its "
                "preconditioning, prediction type and image_range"
            )
    return rows


def _errors(
    model: DiffusionModel, x: Images, y: Labels | None, noise: Mapping[float, Tensor]
) -> list[SelfTest]:
    rows = []
    for sigma, eps in noise.items():
        x_noisy = x + sigma * eps
        told = None if y is None else model(x_noisy, sigma, y)
        needs_class = model.classes is not None and model.null_class is None
        free = told if told is not None and needs_class else model(x_noisy, sigma)
        error = float((free - x).square().mean()) / sigma**2
        conditional = effect = math.nan
        if told is not None:
            conditional = float((told - x).square().mean()) / sigma**2
            effect = float((told - free).square().mean()) / sigma**2
        rows.append(SelfTest(sigma, error, conditional, effect))
    return rows


def _compare_readings(
    model: DiffusionModel,
    x: Images,
    y: Labels | None,
    noise: Mapping[float, Tensor],
    declared: Sequence[SelfTest],
) -> None:
    """Raise if the same network leaves clearly less noise when it is read in another way."""
    most, left = sum(row.error for row in declared), {}
    for name, reading in _other_readings(model).items():
        if reading.sigma_min <= min(noise) and max(noise) <= reading.sigma_max:
            left[name] = sum(row.error for row in _errors(reading, x, y, noise))
    best = min(left, key=lambda name: left[name], default=None)
    if best is not None and left[best] < _CLEARLY * most:
        raise InputError(
            f"the network leaves less noise when it is read with {best} ({left[best]:.2g} times "
            f"the noise over {len(noise)} levels, not {most:.2g}); declare that instead"
        )


def _other_readings(model: DiffusionModel) -> dict[str, DiffusionModel]:
    """Return other declarations of the same network, by what they change."""
    if type(model) is not DiffusionModel:
        return {}
    declared, image_range = model.preconditioning, model.image_range
    others = {
        f"image_range {r}": (declared, r) for r in ((-1.0, 1.0), (0.0, 1.0)) if r != image_range
    }
    if isinstance(declared, DDPM):
        for name in get_args(Prediction):
            if name != declared.prediction:
                others[f"prediction {name!r}"] = (replace(declared, prediction=name), image_range)
    return {
        name: DiffusionModel(
            model.network,
            preconditioning,
            classes=model.classes,
            null_class=model.null_class,
            image_range=other_range,
        ).train(model.training)
        for name, (preconditioning, other_range) in others.items()
    }
