"""The accuracy of a base classifier on a few images, before anything is spent on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from art_denoised import checks
from art_denoised.data import ImageData

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
        InputError: An image or the model cannot be used.

    Example:
        >>> from art_denoised.data import load_data
        >>> from art_denoised.demo import digits_classifier
        >>> from art_denoised.smoothing.smoother import Smoother
        >>> smoother = Smoother(digits_classifier(), sigma=0.25)
        >>> look = first_look(smoother, load_data("digits"), range(100))
        >>> look.images, look.clean > look.noisy
        (32, True)
    """
    x, y = zip(*(data[index] for index in indices[:_IMAGES]), strict=True)
    images, labels = checks.images(torch.stack([*map(torch.as_tensor, x)])), checks.labels(y)
    checks.eval_mode(smoother.network)
    parameter = next(smoother.network.parameters(), torch.zeros(()))
    checks.class_count(smoother.network, images[:1].to(parameter))
    generator = torch.Generator().manual_seed(smoother.seed)
    noisy = images + smoother.sigma * torch.randn(images.shape, generator=generator)
    clean_right, noisy_right = (
        int((smoother.network(z.to(parameter)).argmax(1).cpu() == labels).sum())
        for z in (images, noisy)
    )
    return FirstLook(len(images), clean_right, noisy_right, smoother.sigma)
