"""The denoiser of these results before training, by the name that ``--architecture`` takes."""

from __future__ import annotations

from torch import nn

from art_denoised import UNetDenoiser


def unet() -> nn.Module:
    """Return an untrained U-Net of 0.7 M parameters that works on squares of 2x2 pixels."""
    return UNetDenoiser.from_config(
        patch=2,
        sample_size=32,
        in_channels=12,
        out_channels=12,
        block_out_channels=(24, 32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3,
        norm_num_groups=8,
        add_attention=False,
    )
