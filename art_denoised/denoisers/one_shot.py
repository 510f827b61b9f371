"""A diffusion model as denoiser, in one step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from art_denoised.checks import InputError
from art_denoised.diffusion.folders import embedded_classes, load_diffusion
from art_denoised.diffusion.model import DiffusionModel

if TYPE_CHECKING:
    from art_denoised.types import Images, Sigmas


class OneShotDenoiser(nn.Module):
    """The posterior mean of a diffusion model at the noise level of the certificate, clipped.

    The model is told t*, the smallest noise level of its training that is not below sigma; the
    noise on the image stays exactly sigma. So a certificate at sigma never rests on less noise
    than it states, and a model with few steps denoises a little too much, never too little.
    Certify at ``level(sigma)`` to lose nothing.

    Source: Carlini et al., "(Certified!!) Adversarial Robustness for Free!" (ICLR 2023, arXiv
    2206.10550), algorithm 1.

    Args:
        model: Diffusion model.

    Example:
        >>> from art_denoised.diffusion.preconditioning import Native
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
        """Load an unconditional diffusers folder, in eval mode.

        Raises:
            InputError: The folder cannot be loaded, or its U-Net is class-conditional.
        """
        if (embedded := embedded_classes(Path(folder))) is not None:
            raise InputError(
                f"the U-Net in {folder} is class-conditional ({embedded} class embeddings), and a "
                "denoiser is told no class; give an unconditional one, or if its last class is a "
                f"null class OneShotDenoiser(load_diffusion(..., classes={embedded - 1})) in Python"
            )
        return cls(load_diffusion(folder)).eval()

    def level(self, sigma: float) -> float:
        """Return the noise level that the model is told, at least ``sigma``; image units.

        Raises:
            InputError: The highest level of the training is below ``sigma``.
        """
        return self.model.at_least(sigma)

    def forward(self, x_noisy: Images, sigma: Sigmas) -> Images:
        """Return x_hat in [0, 1]; ``sigma`` is positive, one number or one per image.

        Raises:
            InputError: The highest level of the training is below ``sigma``.
        """
        if isinstance(sigma, torch.Tensor) and sigma.ndim:
            level: Sigmas = torch.tensor([self.level(s) for s in sigma.tolist()]).to(x_noisy.device)
        else:
            level = self.level(float(sigma))
        x_hat: Images = self.model(x_noisy, level)
        return x_hat.clamp(0, 1)
