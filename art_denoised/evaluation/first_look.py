"""The accuracy of a base classifier on a few images, before anything is spent on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.data import ImageData
from art_denoised.evaluation.certify import choose

if TYPE_CHECKING:
    from art_denoised.smoothing.smoother import Smoother

_IMAGES = 32


@dataclass(frozen=True, slots=True)
class FirstLook:
    """How many of the first images a base classifier gets right.

    Attributes:
        images: Number of images.
        clean: Number of them that it gets right without noise.
        noisy: Number of them that it gets right in one noisy copy.
        sigma: Standard deviation of that noise.
    """

    images: int
    clean: int
    noisy: int
    sigma: float

    def __str__(self) -> str:
        """Return it in words, for the terminal."""
        return (
            f"the base classifier gets {self.clean} of the first {self.images} images right, and "
            f"{self.noisy} of them with noise of sigma = {self.sigma:g}"
        )


@torch.no_grad()
def first_look(smoother: Smoother, data: ImageData, indices: Sequence[int]) -> FirstLook:
    """Evaluate a base classifier on the first images of a run, clean and noisy.

    Images without the network's normalisation, or a denoiser that was trained for another noise
    level, show here in a second instead of in a log full of abstentions. The noise is a stream of
    its own and enters no certificate.

    Args:
        smoother: Smoothed classifier whose base, denoiser included, is evaluated.
        data: Pairs of an image and its class.
        indices: Indices of the images of the run, of which the first 32 are used.

    Raises:
        InputError: An image or the model cannot be used, or the base is query-only.

    Example:
        >>> from art_denoised.data import load_data
        >>> from art_denoised.demo import digits_classifier
        >>> from art_denoised.smoothing.smoother import Smoother
        >>> smoother = Smoother(digits_classifier(), sigma=0.25)
        >>> look = first_look(smoother, load_data("digits"), range(100))
        >>> look.images, look.clean > look.noisy
        (32, True)
    """
    network = smoother.network
    if network is None:
        raise InputError("the base classifier is query-only; a first look would cost queries")
    images, labels = choose(smoother, data, indices[:_IMAGES]).stack(indices[:_IMAGES])
    x = smoother.prepare(images)
    generator = torch.Generator().manual_seed(smoother.seed)
    noise = torch.randn(images.shape, generator=generator).to(x)
    clean, noisy = (
        int((network(z.to(checks.model_dtype(network))).argmax(1).cpu() == labels).sum())
        for z in (x, x + smoother.sigma * noise)
    )
    return FirstLook(len(images), clean, noisy, smoother.sigma)
