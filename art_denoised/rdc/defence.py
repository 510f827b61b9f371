"""The robust diffusion classifier: likelihood maximization before a diffusion classifier."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from art_denoised.checks import InputError
from art_denoised.rdc.classifier import DiffusionClassifier
from art_denoised.rdc.likelihood import LikelihoodMaximization

if TYPE_CHECKING:
    from art_denoised.types import Images, Labels, Logits


class RDC(nn.Module):
    """Likelihood maximization, then a diffusion model as Bayes classifier: images to logits.

    Source: Chen et al., "Robust Classification via a Single Diffusion Model" (ICML 2024, arXiv
    2305.15241).

    Args:
        maximization: Likelihood maximization.
        classifier: Diffusion classifier, as a rule over the same diffusion model.

    Attributes:
        gradients: The ways of taking gradients, "exact" and "bpda".

    Raises:
        InputError: The two parts have different seeds.

    Example:
        >>> from art_denoised.demo import digits_diffusion
        >>> from art_denoised.data import load_data
        >>> model = digits_diffusion()
        >>> maximization = LikelihoodMaximization(model, eta=0.1, seed=0)
        >>> rdc = RDC(maximization, DiffusionClassifier(model, seed=0))
        >>> x, label = load_data("digits")[0]
        >>> int(rdc(x[None]).argmax()) == label
        True
    """

    gradients: tuple[str, ...] = LikelihoodMaximization.gradients

    def __init__(
        self, maximization: LikelihoodMaximization, classifier: DiffusionClassifier
    ) -> None:
        super().__init__()
        first, second = maximization.seed, classifier.seed
        if first != second:
            raise InputError(
                f"the parts have the seeds {first} and {second}; give one seed to both"
            )
        self.maximization, self.classifier = maximization, classifier
        self.eval()

    def forward(self, x: Images) -> Logits:
        """Return logits of shape (batch, classes), differentiable in ``x``."""
        logits: Logits = self.classifier(self.maximization(x))
        return logits

    def purify(self, x: Images) -> Images:
        """Return what likelihood maximization makes of images, without a gradient."""
        return self.maximization.purify(x)

    def nfe(self, images: int = 1) -> int:
        """Return the number of network evaluations (NFE) of a prediction."""
        return self.maximization.nfe(images) + self.classifier.nfe(images)

    @torch.no_grad()
    def fit_temperature(self, x: Images, y: Labels) -> float:
        """Fit the classifier's temperature on purified validation images, and return it."""
        return self.classifier.fit_temperature(self.purify(x), y)

    @property
    def seed(self) -> int | None:
        """Seed of all noise; None: fresh noise in every call. It may be set."""
        return self.classifier.seed

    @seed.setter
    def seed(self, value: int | None) -> None:
        self.maximization.seed = self.classifier.seed = value

    @property
    def gradient(self) -> str:
        """Way of taking gradients of likelihood maximization: "exact" or "bpda"; may be set."""
        return self.maximization.gradient

    @gradient.setter
    def gradient(self, value: str) -> None:
        self.maximization.gradient = value
