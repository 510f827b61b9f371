"""The denoising block of Xie et al. as a module; `operations` has its mathematics."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

from torch import Tensor, nn

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.networks import operations

if TYPE_CHECKING:
    from art_denoised.networks.operations import Features

Operation = Literal[
    "gaussian",
    "dot_product",
    "bilateral_gaussian",
    "bilateral_dot_product",
    "mean",
    "median",
    "none",
]
"""Names of the denoising operations."""


class _Kind(NamedTuple):
    function: Callable[..., Tensor]
    pairwise: bool = False  # takes theta and phi
    windowed: bool = False  # takes kernel_size


def _identity(x: Tensor) -> Tensor:
    return x


_KINDS = {
    "gaussian": _Kind(operations.non_local_gaussian, pairwise=True),
    "dot_product": _Kind(operations.non_local_dot_product, pairwise=True),
    "bilateral_gaussian": _Kind(operations.bilateral_gaussian, pairwise=True, windowed=True),
    "bilateral_dot_product": _Kind(operations.bilateral_dot_product, pairwise=True, windowed=True),
    "mean": _Kind(operations.local_mean, windowed=True),
    "median": _Kind(operations.local_median, windowed=True),
    "none": _Kind(_identity),
}


class FeatureDenoising(nn.Module):
    """Denoising block: y = x + BN(conv1x1(op(x))), features of one shape in and out.

    Source: Xie et al., "Feature Denoising for Improving Adversarial Robustness" (CVPR 2019, arXiv
    1812.03411), figures 4 and 5. The scale of the batch norm starts at zero, so a new block is
    exactly the identity and can be put into a trained network.

    Args:
        channels: Number of channels of the features.
        operation: "gaussian" or "dot_product" over all positions, "bilateral_gaussian" or
            "bilateral_dot_product" over a window, "mean" or "median" over a window, or "none": the
            1x1 convolution alone, which is the control for the parameters of a block.
        embedding: Whether positions are compared through two 1x1 convolutions to half the channels
            (theta, phi) or by the features themselves. Only the first four operations use it.
        kernel_size: Size of the window, odd.
        conv: Ablation (section 6.1): False removes the convolution and its batch norm, so op(x) is
            added as it is. Such a block is **not** the identity at the start.
        residual: Ablation: False gives y = BN(conv1x1(op(x))). Its scale starts at one, because
            zero would cut the network in two.

    Raises:
        InputError: An unknown operation, an odd number of channels with embeddings, or a size that
            is not odd.

    Example:
        >>> import torch
        >>> block, x = FeatureDenoising(8), torch.rand(2, 8, 7, 7)
        >>> torch.equal(block(x), x)
        True
    """

    def __init__(
        self,
        channels: int,
        operation: Operation = "gaussian",
        *,
        embedding: bool = True,
        kernel_size: int = 3,
        conv: bool = True,
        residual: bool = True,
    ) -> None:
        super().__init__()
        self.channels = channels = checks.count("channels", channels)
        size = checks.count("kernel_size", kernel_size)
        checks.choice("operation", operation, _KINDS)
        if size % 2 == 0:
            raise InputError(f"kernel_size is {size}; give an odd one")
        kind = _KINDS[operation]
        if kind.pairwise and embedding and channels % 2:
            raise InputError(
                f"channels is {channels}; embeddings halve the channels: give an even number, "
                "or embedding=False"
            )
        self.operation, self.embedding, self.residual = operation, embedding, residual
        self._options: dict[str, object] = {"embedding": embedding} if kind.pairwise else {}
        self._options |= {"kernel_size": size} if kind.windowed else {}
        self._options |= {"conv": conv, "residual": residual}
        self.denoise = partial(kind.function, kernel_size=size) if kind.windowed else kind.function
        self.embeddings = nn.ModuleDict()
        for name in ("theta", "phi") if kind.pairwise else ():
            halve = nn.Conv2d(channels, channels // 2, 1, bias=False) if embedding else None
            self.embeddings[name] = halve or nn.Identity()
        self.conv: nn.Module = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(channels)
        if not conv:
            self.conv, self.bn = nn.Identity(), nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial weights again. ART's ``reset`` calls this after those of the parts."""
        for embed in self.embeddings.values():
            if isinstance(embed, nn.Conv2d):
                nn.init.normal_(embed.weight, std=0.01)
        if isinstance(self.conv, nn.Conv2d):
            nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(self.bn, nn.BatchNorm2d) and self.residual:
            nn.init.zeros_(self.bn.weight)

    def forward(self, x: Features) -> Features:
        """Return denoised features, in the shape, dtype and layout of ``x``."""
        y = self.denoise(x, *(embed(x) for embed in self.embeddings.values()))
        y = self.bn(self.conv(y))
        return x + y if self.residual else y

    def extra_repr(self) -> str:
        """Return the options that the operation takes, which tell two blocks apart."""
        options = ", ".join(f"{name}={value}" for name, value in self._options.items())
        return f"{self.channels}, {self.operation!r}, {options}"
