"""DnCNN, the denoiser of most published denoised-smoothing results."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from art_denoised import checks

if TYPE_CHECKING:
    from art_denoised.types import Images, Sigmas


class DnCNN(nn.Module):
    """Residual convolutional denoiser: the network predicts the noise and subtracts it.

    Source: Zhang et al., "Beyond a Gaussian Denoiser" (TIP 2017, arXiv 1608.03981). Layer numbers
    and names are those of the denoised-smoothing release, so its checkpoints load as they are.

    Args:
        image_channels: 1 for grey, 3 for colour.
        depth: Number of convolutions, at least 2; 17 in the release.
        width: Channels inside; 64 in the release, 128 in its wide form.

    Raises:
        InputError: A value too small.

    Example:
        >>> import torch
        >>> denoiser = DnCNN()
        >>> sum(p.numel() for p in denoiser.parameters())
        558400
        >>> denoiser(torch.rand(2, 3, 32, 32), 0.25).shape
        torch.Size([2, 3, 32, 32])
    """

    def __init__(self, image_channels: int = 3, depth: int = 17, width: int = 64) -> None:
        super().__init__()
        checks.count("image_channels", image_channels)
        checks.count("depth", depth, 2)
        checks.count("width", width)
        layers: list[nn.Module] = [nn.Conv2d(image_channels, width, 3, padding=1), nn.ReLU()]
        for _ in range(depth - 2):
            layers += [
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width, eps=1e-4, momentum=0.95),
                nn.ReLU(),
            ]
        layers.append(nn.Conv2d(width, image_channels, 3, padding=1, bias=False))
        self.dncnn = nn.Sequential(*layers)
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.orthogonal_(layer.weight)

    def forward(self, x_noisy: Images, sigma: Sigmas | None = None) -> Images:
        """Return x_hat. The network is blind: ``sigma`` is accepted and not used."""
        return x_noisy - self.dncnn(x_noisy)
