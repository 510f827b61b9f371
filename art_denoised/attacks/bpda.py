"""BPDA: attack through an image transform that has no useful gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.straight_through import straight_through
from art_denoised.types import Images

Transform = Callable[[Images], Images]


class BPDA(nn.Module):
    """An image transform with the gradient of another one.

    Use it for transforms without a useful gradient: JPEG, quantisation, code outside torch.
    Gradient attacks on ``nn.Sequential(BPDA(transform), classifier)`` then see through it. It is an
    approximation: attack without gradients (Square) as well, and believe the stronger attack.

    Source: Athalye et al., "Obfuscated Gradients Give a False Sense of Security" (ICML 2018, arXiv
    1802.00420), section 4.1.

    Args:
        transform: Function from images to images; called without gradients on a copy.
        backward: Differentiable approximation of ``transform``, used for its gradient alone; None:
            the identity, for transforms with t(x) close to x.

    Raises:
        InputError: When called: transform and backward return different shapes.

    Example:
        >>> quantise = BPDA(lambda x: (x * 7).round() / 7)
        >>> x = torch.rand(2, 3, 4, 4, requires_grad=True)
        >>> quantise(x).sum().backward()
        >>> bool((x.grad == 1).all())
        True
    """

    def __init__(self, transform: Transform, backward: Transform | None = None) -> None:
        super().__init__()
        self.transform, self.backward = transform, backward
        self.training = checks.in_training(transform, backward)

    def forward(self, x: Images) -> Images:
        """Return ``transform(x)``."""
        with torch.no_grad():
            value = self.transform(x.clone())  # it may write into its input
        if not (torch.is_grad_enabled() and x.requires_grad):
            return value
        stand_in = x if self.backward is None else self.backward(x)
        if stand_in.shape != value.shape:
            raise InputError(
                f"the transform returned shape {tuple(value.shape)} and backward "
                f"{tuple(stand_in.shape)}; give a backward of the transform's shape"
            )
        return straight_through(value, stand_in)
