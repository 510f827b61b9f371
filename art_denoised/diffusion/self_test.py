"""Is my diffusion model understood? A test on a few images, for models from elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.diffusion.model import DiffusionModel

if TYPE_CHECKING:
    from art_denoised.types import Images, Labels

_LEVELS = (0.05, 0.1, 0.25, 0.5)  # image units


class SelfTest(NamedTuple):
    """What the model does at one noise level.

    Attributes:
        sigma: Noise level in image units.
        left: Mean squared error in units of the noise's: below 1 where the model denoises.
        conditional: The same, told the right class; NaN for models without classes.
        apart: Mean squared difference of both answers in units of the noise's.
    """

    sigma: float
    left: float
    conditional: float
    apart: float


@torch.no_grad()
def self_test(model: DiffusionModel, x: Images, y: Labels | None = None) -> list[SelfTest]:
    """Check that a model denoises real images, with and without class, in the right units.

    Args:
        model: In eval mode.
        x: Some clean images like those of its training, (batch, channels, height, width) in [0, 1].
        y: Their classes, for a conditional model.

    Returns:
        A row for each of four noise levels that the model was trained on.

    Raises:
        InputError: The model cannot take the images, or does not denoise them, with or without
            class: the family, the prediction type or the range of the images is wrong.

    Example:
        >>> from art_denoised.demo import digits_diffusion
        >>> from art_denoised.data import load_data
        >>> data = [load_data("digits")[i] for i in range(50)]
        >>> x, y = torch.stack([x for x, _ in data]), torch.tensor([y for _, y in data])
        >>> rows = self_test(digits_diffusion(), x, y)
        >>> all(row.left < 0.9 and row.conditional < 0.9 for row in rows)
        True
    """
    x = checks.images(x)
    if y is not None and model.classes is not None:
        y = checks.labels(y, model.classes)
    levels = [sigma for sigma in _LEVELS if model.sigma_min <= sigma <= model.sigma_max]
    if not levels:
        raise InputError(
            f"the model was trained on sigma {model.sigma_min:g} to {model.sigma_max:g} (image "
            "units), where images are only noise; check its range"
        )
    first = None if y is None else y[:1]
    checks.denoises(lambda x, sigma: model(x, sigma, first), x[:1], levels[0])
    generator = torch.Generator().manual_seed(0)
    rows = []
    for sigma in levels:
        x_noisy = x + sigma * torch.randn(x.shape, generator=generator).to(x)
        told = None if y is None else model(x_noisy, sigma, y)
        needs_class = model.classes is not None and model.null_class is None
        free = told if told is not None and needs_class else model(x_noisy, sigma)
        left = float((free - x).square().mean()) / sigma**2
        conditional = apart = float("nan")
        if told is not None:
            conditional = float((told - x).square().mean()) / sigma**2
            apart = float((told - free).square().mean()) / sigma**2
        rows.append(SelfTest(sigma, left, conditional, apart))
        for share in (left,) if told is None else (left, conditional):
            if not share < 1:
                raise InputError(
                    f"at sigma {sigma:g} the model leaves {share:.2g} times the noise; check the "
                    "family, the prediction type and the range of its images"
                )
    return rows
