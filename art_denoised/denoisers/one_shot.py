"""A diffusion model as denoiser, in one step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from art_denoised.diffusion.loading import load_diffusion
from art_denoised.diffusion.model import DiffusionModel

if TYPE_CHECKING:
    from art_denoised.types import Images, Sigmas


class OneShotDenoiser(nn.Module):
    """The posterior mean of a diffusion model at the noise level of the certificate, clipped.

    The level handed to the model is t*, the smallest of its training that is not below sigma. The
    noise on the image stays what smoothing added, exactly sigma: so a certificate at sigma never
    rests on less noise than it states, and a model with few steps denoises a little too much,
    never too little. `level` tells that level; certify at it to lose nothing.

    Source: Carlini et al., "(Certified!!) Adversarial Robustness for Free!" (ICLR 2023, arXiv
    2206.10550), algorithm 1.

    Args:
        model: The diffusion model, in the units of images in [0, 1].

    Example:
        >>> from art_denoised.diffusion.families import Native
        >>> class Shrink(nn.Module):
        ...     def forward(self, x, sigma, y):
        ...         return x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)
        >>> denoiser = OneShotDenoiser(DiffusionModel(Shrink(), Native()))
        >>> denoiser(torch.rand(2, 1, 8, 8), 0.25).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(self, model: DiffusionModel) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    @classmethod
    def from_folder(cls, folder: Path | str) -> OneShotDenoiser:
        """Load an unconditional diffusers model (`load_diffusion`), in eval mode.

        Raises:
            InputError: As for `load_diffusion`.
        """
        return cls(load_diffusion(folder)).eval()

    def level(self, sigma: float) -> float:
        """Return the noise level that the model is told, at least ``sigma``; image units.

        Raises:
            InputError: The training had none as high.
        """
        return self.model.at_least(sigma)

    def forward(self, x_noisy: Images, sigma: Sigmas) -> Images:
        """Return x_hat in [0, 1]; ``sigma`` is positive, one number or one an image.

        Raises:
            InputError: As for `level`.
        """
        if isinstance(sigma, torch.Tensor) and sigma.ndim:
            level: Sigmas = torch.tensor([self.level(s) for s in sigma.tolist()]).to(x_noisy.device)
        else:
            level = self.level(float(sigma))
        x_hat: Images = self.model(x_noisy, level)
        return x_hat.clamp(0, 1)
