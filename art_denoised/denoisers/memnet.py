"""MemNet, the deeper denoiser of the denoised-smoothing release."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import torch
from torch import nn

from art_denoised import checks

if TYPE_CHECKING:
    from art_denoised.types import Images, Sigmas


class MemNet(nn.Module):
    """Chain of memory blocks with dense connections and a global residual.

    Source: Tai et al., "MemNet: A Persistent Memory Network for Image Restoration" (ICCV 2017,
    arXiv 1708.02209). Names are those of the denoised-smoothing release.

    Args:
        image_channels: 1 for grey, 3 for colour.
        width: Channels inside; 64 in the release.
        memory_blocks: 3 in the release.
        residual_blocks: Recursions in a memory block; 6 in the release.

    Raises:
        InputError: A value below 1.

    Example:
        >>> import torch
        >>> denoiser = MemNet()
        >>> sum(p.numel() for p in denoiser.parameters())
        1436678
        >>> denoiser(torch.rand(1, 3, 16, 16), 0.25).shape
        torch.Size([1, 3, 16, 16])
    """

    def __init__(
        self,
        image_channels: int = 3,
        width: int = 64,
        memory_blocks: int = 3,
        residual_blocks: int = 6,
    ) -> None:
        super().__init__()
        checks.count("image_channels", image_channels)
        checks.count("width", width)
        checks.count("memory_blocks", memory_blocks)
        checks.count("residual_blocks", residual_blocks)
        self.feature_extractor = _bn_relu_conv(image_channels, width)
        self.reconstructor = _bn_relu_conv(width, image_channels)
        self.dense_memory = nn.ModuleList(
            _MemoryBlock(width, residual_blocks, long_term=i + 1) for i in range(memory_blocks)
        )

    def forward(self, x_noisy: Images, sigma: Sigmas | None = None) -> Images:
        """Return x_hat. The network is blind: ``sigma`` is accepted and not used."""
        memories = [self.feature_extractor(x_noisy)]
        for block in self.dense_memory:
            memories.append(block(memories))
        return self.reconstructor(memories[-1]) + x_noisy


class _MemoryBlock(nn.Module):
    """Residual blocks in a row, and a gate over their outputs and all earlier memories."""

    def __init__(self, width: int, residual_blocks: int, long_term: int) -> None:
        super().__init__()
        self.recursive_unit = nn.ModuleList(_ResidualBlock(width) for _ in range(residual_blocks))
        self.gate_unit = _bn_relu_conv((residual_blocks + long_term) * width, width, kernel=1)

    def forward(self, memories: list[torch.Tensor]) -> torch.Tensor:
        short_term = []
        x = memories[-1]
        for layer in self.recursive_unit:
            x = layer(x)
            short_term.append(x)
        gated: torch.Tensor = self.gate_unit(torch.cat(short_term + memories, dim=1))
        return gated


class _ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.relu_conv1 = _bn_relu_conv(width, width)
        self.relu_conv2 = _bn_relu_conv(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu_conv2(self.relu_conv1(x)) + x


def _bn_relu_conv(in_channels: int, out_channels: int, kernel: int = 3) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
    layers = OrderedDict(bn=nn.BatchNorm2d(in_channels), relu=nn.ReLU(), conv=conv)
    return nn.Sequential(layers)
