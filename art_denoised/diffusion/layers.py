"""Layers that U-Nets of several families share."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from art_denoised.checks import InputError

if TYPE_CHECKING:
    from art_denoised.types import Images


def sinusoids(t: Tensor, width: int, *, endpoint: bool = False) -> Tensor:
    """Return cosines, then sines, of times (batch,) at ``width / 2`` frequencies from 1 downwards.

    The lowest frequency is 1e-4 with ``endpoint``, and one step of the grid above it without.
    """
    half = width // 2
    ramp = torch.arange(half, dtype=torch.float32, device=t.device) / (half - endpoint)
    angles = t.float()[:, None] * torch.exp(-math.log(10_000) * ramp)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q k / sqrt(width)) v of tensors (batch, heads, width, tokens)."""
    # Written out: fused kernels have no second derivative, which exact gradients through
    # likelihood maximization need.
    scale = q.shape[2] ** -0.25  # on both factors, so that half precision does not overflow
    weight = torch.einsum("nhct,nhcs->nhts", q * scale, k * scale).softmax(-1)
    return torch.einsum("nhts,nhcs->nhct", weight, v)


def check_images(x: Images, channels: int, size: int) -> None:
    """Check that images have the shape of a network's training."""
    if x.shape[1:] != (channels, size, size):
        raise InputError(
            f"images have shape {tuple(x.shape[1:])}, but the diffusion model was trained on "
            f"{(channels, size, size)}; resize them"
        )
