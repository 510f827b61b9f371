"""The diffusion model of noised images that a diffusion model of clean ones contains."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from art_denoised import checks
from art_denoised.diffusion.model import DiffusionModel

if TYPE_CHECKING:
    from art_denoised.types import Images, Labels, Sigmas


class NoisedDiffusion(DiffusionModel):
    """E[x_tau | x_s, y] of images x_tau that hold noise tau already: a diffusion model of these.

    x_s has noise of rho more, s^2 = tau^2 + rho^2. Given the clean image the noise of x_s is that
    of x_tau by a share of tau^2 / s^2, so, with D the model of clean images,

        E[x_tau | x_s, y] = x_s + (rho^2 / s^2) (D(x_s; s, y) - x_s)

    A `DiffusionClassifier` over it classifies noised images; with weights of the evidence bound
    this is the exact posterior noised diffusion classifier (EPNDC) of Chen et al., "Your Diffusion
    Model is Secretly a Certifiably Robust Classifier" (NeurIPS 2024, arXiv 2402.02316), whose loss
    at a step from rho to rho' is half of 1 / rho^2 - 1 / rho'^2 times the squared error at rho'
    (docs/rdc.md). It takes one pass of the network for each evaluation, as on clean images.

    Args:
        model: Of clean images.
        noise: tau, in image units; above 0.

    Raises:
        InputError: A noise that the model was not trained on.

    Example:
        >>> from art_denoised import DiffusionClassifier
        >>> from art_denoised.demo import digits_diffusion
        >>> from art_denoised.data import load_data
        >>> x = torch.stack([load_data("digits")[i][0] for i in range(4)])
        >>> noised = x + 0.25 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        >>> classifier = DiffusionClassifier(NoisedDiffusion(digits_diffusion(), 0.25), seed=0)
        >>> classifier(noised).argmax(1).tolist() == [load_data("digits")[i][1] for i in range(4)]
        True
    """

    def __init__(self, model: DiffusionModel, noise: float) -> None:
        super().__init__(
            model.network,
            model.family,
            classes=model.classes,
            null_class=model.null_class,
            image_range=model.image_range,
        )
        self.tau = checks.sigma(noise)
        model.at_least(self.tau)
        self.train(model.training)

    @property
    def noise(self) -> float:
        """Of the images themselves, image units."""
        return self.tau

    def extra_repr(self) -> str:
        """Return what it is, beside its network."""
        return f"{super().extra_repr()}, noise={self.tau}"

    @property
    def sigma_min(self) -> float:
        """Lowest noise to add: more than none, where tau is a level of the training."""
        return max(super().sigma_min ** 2 - self.noise**2, 0.0) ** 0.5

    @property
    def sigma_max(self) -> float:
        """Highest noise to add."""
        return float((super().sigma_max ** 2 - self.noise**2) ** 0.5)

    def at_least(self, sigma: float) -> float:
        """Return the smallest noise to add, not below ``sigma``, that the training had in all."""
        total = super().at_least((sigma**2 + self.noise**2) ** 0.5)
        return max((total**2 - self.noise**2) ** 0.5, sigma)

    def forward(self, x_noisy: Images, sigma: Sigmas, y: Labels | None = None) -> Images:
        """Return E[x_tau | x_s, y].

        Args:
            x_noisy: x_s.
            sigma: rho, the noise on top of tau, image units; one number or one an image.
            y: As for `DiffusionModel`.
        """
        rho = torch.as_tensor(sigma, device=x_noisy.device).reshape(-1).expand(len(x_noisy))
        total = (rho.double() ** 2 + self.noise**2).sqrt()
        share = (rho.double() / total).square().to(x_noisy.dtype).reshape(-1, 1, 1, 1)
        x_hat = super().forward(x_noisy, total.to(rho.dtype), y)
        return x_noisy + share * (x_hat - x_noisy)
