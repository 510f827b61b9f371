"""U-Nets of diffusers as denoisers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from art_denoised.checks import InputError
from art_denoised.diffusion.loading import read_unet

if TYPE_CHECKING:
    from art_denoised.types import Images, Sigmas

SIGMA_DATA = 0.5  # scale of the images assumed by the input normalisation, as in EDM


class UNetDenoiser(nn.Module):
    """A diffusers UNet2DModel that predicts the noise, told the noise level.

    ``x_hat = x_noisy - sigma * unet(c_in * x_noisy, 1000 * c_noise)`` with c_in =
    1 / sqrt(sigma^2 + sigma_data^2) and c_noise = ln(sigma) / 4 (Karras et al., "EDM", NeurIPS
    2022, arXiv 2206.00364, table 1). A U-Net trained as a DDPM is told other timesteps and scales:
    it is a diffusion model, not one of these.

    Args:
        unet: The network, called as ``unet(sample, timestep).sample``.

    Raises:
        InputError: Not a UNet2DModel, or one that predicts other channels than it is given, that
            needs class labels, or whose time embedding takes no negative timesteps.

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
        _check_unet(unet)
        self.unet = unet

    @classmethod
    def from_config(cls, **config: Any) -> UNetDenoiser:
        """Build an untrained UNet2DModel from its configuration; keyword arguments as there."""
        from diffusers import UNet2DModel

        return cls(UNet2DModel(**config))

    @classmethod
    def from_folder(cls, folder: Path | str) -> UNetDenoiser:
        """Load a diffusers folder (config.json and .safetensors) in its own dtype, in eval mode.

        Raises:
            InputError: The folder holds no UNet2DModel with safetensors weights that match it.
        """
        return cls(read_unet(Path(folder))).eval()

    def forward(self, x_noisy: Images, sigma: Sigmas) -> Images:
        """Return x_hat; ``sigma`` is positive, one number or one an image, in image units."""
        # In float32 at least: half precision would round the timestep to whole numbers.
        precision = torch.promote_types(x_noisy.dtype, torch.float32)
        level = torch.as_tensor(sigma, dtype=precision, device=x_noisy.device)
        level = level.reshape(-1).expand(len(x_noisy))
        scale = level.reshape(-1, 1, 1, 1)
        c_in = (scale**2 + SIGMA_DATA**2).rsqrt()
        noise = self.unet((c_in * x_noisy).to(x_noisy.dtype), 250 * level.log()).sample
        return (x_noisy - scale * noise).to(x_noisy.dtype)


def _check_unet(unet: nn.Module) -> None:
    from diffusers import UNet2DModel

    if not isinstance(unet, UNet2DModel):
        raise InputError(f"the network is a {type(unet).__name__}; give a diffusers UNet2DModel")
    config = unet.config
    if config.time_embedding_type != "positional":
        raise InputError(
            f"time_embedding_type is {config.time_embedding_type!r}; the timesteps 250 ln(sigma) "
            "are negative, which 'positional' alone takes"
        )
    if config.class_embed_type is not None or config.num_class_embeds is not None:
        raise InputError("the U-Net needs class labels; give one without class embeddings")
    if config.in_channels != config.out_channels:
        raise InputError(
            f"the U-Net maps {config.in_channels} channels to {config.out_channels}; "
            "give one that predicts the noise and nothing else"
        )
