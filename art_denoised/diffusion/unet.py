"""U-Nets of diffusers as networks of a diffusion model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.diffusion.model import DiffusionModel
from art_denoised.diffusion.preconditioning import EDM

if TYPE_CHECKING:
    from art_denoised.types import Images, Labels


class UNetNetwork(nn.Module):
    """Calls a UNet2DModel as `DiffusionModel` calls its network.

    Args:
        unet: UNet2DModel.
        patch: Side of the squares of pixels that are folded into channels and back.
    """

    def __init__(self, unet: Any, *, patch: int = 1) -> None:
        super().__init__()
        self.unet, self.patch = unet, checks.count("patch", patch)

    def forward(self, x: Images, c_noise: torch.Tensor, y: Labels | None) -> Images:
        """Return the U-Net's prediction."""
        folded = F.pixel_unshuffle(x, self.patch)
        return F.pixel_shuffle(self.unet(folded, c_noise, class_labels=y).sample, self.patch)


def unet_diffusion(
    channels: int,
    size: int,
    *,
    classes: int | None = None,
    widths: Sequence[int] = (32, 64, 64),
    layers: int = 1,
    patch: int = 1,
) -> DiffusionModel:
    """Build an untrained EDM over a small U-Net.

    Args:
        channels: Number of image channels.
        size: Height and width of the images; divisible by the patch, and then by 2 for each width
            after the first.
        classes: Number of classes, to which a null class is added; None: unconditional.
        widths: Number of channels at each resolution, the full one first; multiples of 8.
        layers: Number of residual blocks at each resolution.
        patch: Side of the squares of pixels that are folded into channels first: the same U-Net
            then costs 1 / patch^2 as much.

    Raises:
        InputError: The sizes do not fit together.

    Example:
        >>> model = unet_diffusion(1, 8, classes=10, widths=(8, 16))
        >>> model(torch.rand(2, 1, 8, 8), 0.5).shape
        torch.Size([2, 1, 8, 8])
    """
    from diffusers import UNet2DModel

    widths = tuple(checks.count("width", width, 8) for width in widths)
    if any(width % 8 for width in widths):
        raise InputError(f"widths are {widths}; give multiples of 8")
    halvings, patch = len(widths) - 1, checks.count("patch", patch)
    if checks.count("size", size) % (patch * 2**halvings):
        folded = f"folded by {patch} and " if patch > 1 else ""
        raise InputError(
            f"images of size {size} cannot be {folded}halved {halvings} times; give fewer widths"
            + (" or a smaller patch" if patch > 1 else "")
        )
    folded_channels = checks.count("channels", channels) * patch**2
    unet = UNet2DModel(
        sample_size=size // patch,
        in_channels=folded_channels,
        out_channels=folded_channels,
        block_out_channels=widths,
        down_block_types=("DownBlock2D",) * len(widths),
        up_block_types=("UpBlock2D",) * len(widths),
        layers_per_block=checks.count("layers", layers),
        norm_num_groups=8,
        num_class_embeds=None if classes is None else checks.count("classes", classes, 2) + 1,
        add_attention=False,
    )
    network = UNetNetwork(unet, patch=patch)
    return DiffusionModel(network, EDM(), classes=classes, null_class=classes)
