"""U-Nets of diffusers as denoisers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from art_denoised.checks import InputError

if TYPE_CHECKING:
    from art_denoised.types import Images, Sigmas

SIGMA_DATA = 0.5  # scale of the images assumed by the input normalisation, as in EDM


class UNetDenoiser(nn.Module):
    """A diffusers UNet2DModel that predicts the noise, told the noise level.

    ``x_hat = x_noisy - sigma * unet(c_in * x_noisy, 1000 * c_noise)`` with c_in =
    1 / sqrt(sigma^2 + sigma_data^2) and c_noise = ln(sigma) / 4 (Karras et al., "EDM", NeurIPS
    2022, arXiv 2206.00364, table 1).

    Args:
        unet: The network, called as ``unet(sample, timestep).sample``, returning the input's shape.

    Example:
        >>> import torch
        >>> denoiser = UNetDenoiser.from_config(
        ...     sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16),
        ...     down_block_types=("DownBlock2D", "DownBlock2D"),
        ...     up_block_types=("UpBlock2D", "UpBlock2D"), norm_num_groups=4,
        ... )
        >>> denoiser(torch.rand(2, 1, 8, 8), torch.tensor([0.25, 0.5])).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    @classmethod
    def from_config(cls, **config: Any) -> UNetDenoiser:
        """Build an untrained UNet2DModel from its configuration; keyword arguments as there."""
        from diffusers import UNet2DModel

        return cls(UNet2DModel(**config))

    @classmethod
    def from_folder(cls, folder: Path | str) -> UNetDenoiser:
        """Load a diffusers folder (config.json and .safetensors), in eval mode.

        Raises:
            InputError: The folder holds no UNet2DModel with safetensors weights.
        """
        from diffusers import UNet2DModel

        try:
            unet = UNet2DModel.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False
            )
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"{folder} is no folder of a diffusers UNet2DModel with safetensors: {reason}"
            ) from None
        return cls(unet).eval()

    def forward(self, x_noisy: Images, sigma: Sigmas) -> Images:
        """Return x_hat; ``sigma`` is one number or one an image, in image units."""
        level = torch.as_tensor(sigma, dtype=x_noisy.dtype, device=x_noisy.device)
        level = level.reshape(-1).expand(len(x_noisy))
        scale = level.reshape(-1, 1, 1, 1)
        c_in = (scale**2 + SIGMA_DATA**2).rsqrt()
        noise: Images = self.unet(c_in * x_noisy, 250 * level.log()).sample
        return x_noisy - scale * noise
