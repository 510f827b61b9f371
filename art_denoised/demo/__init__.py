"""A small pretrained classifier and denoiser of 8x8 handwritten digits, and the demo over them.

Weights, card and provenance: README.md in this folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from art_denoised.denoisers.denoisers import load_denoiser
from art_denoised.diffusion.model import DiffusionModel
from art_denoised.diffusion.preconditioning import EDM
from art_denoised.models.loading import load_weights

if TYPE_CHECKING:
    from art_denoised.types import Images, Labels

_FOLDER = Path(__file__).parent


def digits_network() -> nn.Module:
    """Return the classifier's architecture, untrained: (batch, 1, 8, 8) in [0, 1] to 10 logits.

    Example:
        >>> sum(p.numel() for p in digits_network().parameters())
        9930
    """
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )


def digits_classifier() -> nn.Module:
    """Return the packaged classifier, trained on clean digits without any noise.

    Example:
        >>> digits_classifier()(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    model = digits_network()
    load_weights(model, _FOLDER / "digits_classifier.safetensors")
    return model.eval()


def digits_denoiser() -> nn.Module:
    """Return the packaged denoiser, a small DnCNN for noise of sigma up to about 0.5.

    Example:
        >>> digits_denoiser()(torch.rand(2, 1, 8, 8), 0.25).shape
        torch.Size([2, 1, 8, 8])
    """
    return load_denoiser(_FOLDER / "digits_denoiser.safetensors")


def digits_diffusion() -> DiffusionModel:
    """Return the packaged class-conditional diffusion model, with a null class.

    Example:
        >>> digits_diffusion()(torch.rand(2, 1, 8, 8), 0.25, torch.tensor([3, 4])).shape
        torch.Size([2, 1, 8, 8])
    """
    model = digits_diffusion_network()
    load_weights(model, _FOLDER / "digits_diffusion.safetensors")
    return model.eval()


def digits_diffusion_network() -> DiffusionModel:
    """Return the diffusion model of the digits before training.

    Example:
        >>> digits_diffusion_network().classes
        10
    """
    return DiffusionModel(DigitsMLP(), EDM(), classes=10, null_class=10)


class DigitsMLP(nn.Module):
    """Residual network over the 64 pixels, shifted by noise level and class."""

    frequencies: Tensor

    def __init__(self, width: int = 256, depth: int = 4) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.logspace(-1, 1.2, 16), persistent=False)
        self.pixels = nn.Linear(64, width)
        self.level = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(11, width)  # ten digits and none
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)
            )
            for _ in range(depth)
        )
        self.shifts = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.answer = nn.Linear(width, 64)

    def forward(self, x: Images, c_noise: Tensor, y: Labels) -> Images:
        """Return F(x; c_noise, y) of the EDM preconditioning."""
        phases = c_noise.to(x.dtype)[:, None] * self.frequencies.to(x.dtype)
        context = self.level(torch.cat([phases.sin(), phases.cos()], 1)) + self.label(y)
        h = self.pixels(x.flatten(1))
        for block, shift in zip(self.blocks, self.shifts, strict=True):
            h = h + block(h + shift(context))
        answer: Images = self.answer(h).reshape(x.shape)
        return answer
