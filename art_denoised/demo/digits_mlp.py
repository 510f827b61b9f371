"""A small class-conditional diffusion model of the digits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from art_denoised.diffusion.model import DiffusionModel
from art_denoised.diffusion.preconditioning import EDM

if TYPE_CHECKING:
    from art_denoised.types import Images, Labels


class DigitsMLP(nn.Module):
    """Residual network over the 64 pixels, shifted by noise level and class.

    Args:
        width: Width of the hidden layers.
        depth: Number of residual blocks.

    Example:
        >>> DigitsMLP()(torch.zeros(2, 1, 8, 8), torch.zeros(2), torch.tensor([3, 10])).shape
        torch.Size([2, 1, 8, 8])
    """

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


def digits_diffusion_network() -> DiffusionModel:
    """Return the diffusion model of the digits before training.

    Example:
        >>> digits_diffusion_network().classes
        10
    """
    return DiffusionModel(DigitsMLP(), EDM(), classes=10, null_class=10)
