"""The denoising operations of Xie et al. as pure functions, and their block as a module.

Source: Xie et al., "Feature Denoising for Improving Adversarial Robustness" (CVPR 2019, arXiv
1812.03411), section 4. Each is a mean over positions j, weighted by f(x_i, x_j) / C(x) (eq. 1-3),
or a median. Features have shape (batch, channels, height, width) and any floating-point dtype.
All operations can be differentiated twice. The fast form of each was chosen by measurement
(benchmarks/networks.py).

Windows are cut off at the border of the image and normalised by the positions that are left. Only
the median repeats the outermost pixels, because it must be one of an odd number of values.

The operations that compare positions take two embeddings of x: theta, the queries, and phi, the
keys, with d channels each. Without embeddings both are x itself. ``kernel_size`` is the odd size of
the window.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from art_denoised import checks
from art_denoised.checks import InputError

Features: TypeAlias = Float[Tensor, "batch channels height width"]
Embedded: TypeAlias = Float[Tensor, "batch embedded height width"]
CACHE_ELEMENTS = 1 << 18  # elements of one step on a CPU; larger temporaries leave its cache
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


def non_local_gaussian(x: Features, theta: Embedded, phi: Embedded) -> Features:
    """Mean of x over all positions, weighted by a softmax of theta_i . phi_j / sqrt(d).

    Section 4.1, "Gaussian (softmax)". A CPU has no fused kernel for embeddings narrower than the
    values, so it computes the weights of a few images at a time, which fit in its cache. Elsewhere
    this is the fused attention, whose memory is linear in the number of positions.

    Example:
        >>> x = torch.rand(2, 4, 5, 5)
        >>> flat = torch.zeros_like(x)  # equal weights: the mean over the image
        >>> torch.allclose(non_local_gaussian(x, flat, flat), x.mean((2, 3), keepdim=True))
        True
    """
    t, p, g = (features.flatten(2) for features in (theta, phi, x))
    if not _in_chunks(x) or not len(x):
        query, key, value = (features.transpose(1, 2)[:, None] for features in (t, p, g))
        y = F.scaled_dot_product_attention(query, key, value)[:, 0].transpose(1, 2)
    else:
        size = max(1, CACHE_ELEMENTS // t.shape[2] ** 2)  # images whose weights stay in the cache
        parts = zip(*(f.split(size) for f in (t * t.shape[1] ** -0.5, p, g)), strict=True)
        y = torch.cat([gi @ torch.softmax(ti.mT @ pi, -1).mT for ti, pi, gi in parts])
    return y.reshape(x.shape)


def non_local_dot_product(x: Features, theta: Embedded, phi: Embedded) -> Features:
    """Sum of theta_i . phi_j x_j over all positions j, divided by their number.

    Section 4.1, "Dot product". The product of three matrices is associative; the cheaper order is
    computed, through positions x positions or through channels x channels.

    Example:
        >>> x = torch.ones(2, 3, 4, 4)
        >>> non_local_dot_product(x, x, x).unique()
        tensor([3.])
    """
    t, p, g = (features.flatten(2) for features in (theta, phi, x))
    d, c, n = t.shape[1], g.shape[1], g.shape[2]
    if n * (d + c) < 2 * d * c:
        y = g @ _bmm_mean(t.transpose(1, 2), p, n).transpose(1, 2)
    else:
        y = _bmm_mean(g, p.transpose(1, 2), n) @ t
    return y.reshape(x.shape)


def bilateral_gaussian(
    x: Features, theta: Embedded, phi: Embedded, kernel_size: int = 3
) -> Features:
    """Mean of x over a window, weighted by a softmax of theta_i . phi_j / sqrt(d) over the window.

    Section 4.2, with the weights of `non_local_gaussian`. Neighbours outside the image weigh 0.

    Example:
        >>> x = torch.ones(2, 3, 4, 4)
        >>> torch.allclose(bilateral_gaussian(x, x, x), x)
        True
    """
    outside = ~_inside(x, kernel_size)
    parts = []
    for xi, ti, pi in _image_chunks(x, theta, phi):
        f = _window_products(ti * ti.shape[1] ** -0.5, pi, kernel_size)
        weights = torch.softmax(f.masked_fill(outside, -math.inf), 1)
        parts.append(_window_sum(weights, xi, kernel_size))
    return torch.cat(parts)


def bilateral_dot_product(
    x: Features, theta: Embedded, phi: Embedded, kernel_size: int = 3
) -> Features:
    """Sum of theta_i . phi_j x_j over a window, divided by its number of positions in the image.

    Section 4.2, with the weights of `non_local_dot_product`.

    Example:
        >>> x = torch.ones(2, 3, 4, 4)
        >>> torch.allclose(bilateral_dot_product(x, x, x), 3 * x)
        True
    """
    count = _inside(x, kernel_size).sum(0, dtype=x.dtype)
    parts = []
    for xi, ti, pi in _image_chunks(x, theta, phi):
        f = _window_products(ti, pi, kernel_size)
        parts.append(_window_sum(f / count, xi, kernel_size))
    return torch.cat(parts)


def local_mean(x: Features, kernel_size: int = 3) -> Features:
    """Mean of each channel over a window (section 4.3).

    On a CPU, for contiguous features, a depthwise convolution is several times faster than pooling.

    Example:
        >>> local_mean(torch.eye(3)[None, None])[0, 0, 1]
        tensor([0.3333, 0.3333, 0.3333])
    """
    r, c = kernel_size // 2, x.shape[1]
    if x.device.type != "cpu" or x.is_contiguous(memory_format=torch.channels_last):
        return F.avg_pool2d(x, kernel_size, 1, r, count_include_pad=False)
    ones = x.new_ones(c, 1, kernel_size, kernel_size)
    return F.conv2d(x, ones, padding=r, groups=c).div_(_inside(x, kernel_size).sum(0))


def local_median(x: Features, kernel_size: int = 3) -> Features:
    """Median of each channel over a window (section 4.4), with the outermost pixels repeated.

    A 3x3 window goes through a network of comparators that shares sorted columns. The gradient
    goes to the value that is the median; of several equal values, to one.

    Example:
        >>> local_median(torch.eye(4)[None, None])[0, 0, 1]
        tensor([0., 0., 0., 0.])
    """
    planes = x.flatten(0, 1)
    if kernel_size != 3:
        y = torch.cat([_median_by_sorting(chunk, kernel_size) for chunk in _chunks(planes)])
    elif _traced():
        y = _median_3x3(_repeat_border(planes, 1))
    else:
        records = torch.is_grad_enabled() and x.requires_grad
        y = _Median.apply(planes)[0] if records else _median_of_chunks(planes, None)
    return y.reshape(x.shape)


class _Median(torch.autograd.Function):
    """The 3x3 median, which remembers in one byte a value which neighbour it was."""

    @staticmethod
    def forward(planes: Tensor) -> tuple[Tensor, Tensor]:
        neighbour = torch.zeros_like(planes, dtype=torch.uint8)
        return _median_of_chunks(planes, neighbour), neighbour

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: None) -> Tensor:
        (neighbour,) = ctx.saved_tensors
        h, w = neighbour.shape[1:]
        rows = torch.arange(h, device=neighbour.device)[:, None]
        columns = torch.arange(w, device=neighbour.device)
        parts = []
        for part, chosen in zip(_chunks(gradient), _chunks(neighbour), strict=True):
            row = (rows + (chosen // 3).long() - 1).clamp(0, h - 1)
            column = (columns + (chosen % 3).long() - 1).clamp(0, w - 1)
            place, part = (row * w + column).flatten(1), part.flatten(1)
            parts.append(torch.zeros_like(part).scatter_add(1, place, part))
        return torch.cat(parts).reshape(gradient.shape)


def _median_of_chunks(planes: Tensor, neighbour: Tensor | None) -> Tensor:
    """3x3 medians of (planes, height, width); ``neighbour`` receives which of 0..8 each was."""
    h, w = planes.shape[1:]
    out = torch.empty_like(planes)
    places = [None] * len(_chunks(out)) if neighbour is None else _chunks(neighbour)
    for chunk, y, place in zip(_chunks(planes), _chunks(out), places, strict=True):
        padded = _repeat_border(chunk, 1)
        y.copy_(_median_3x3(padded))
        if place is not None:
            for number, (i, j) in enumerate(_shifts(3)):
                found = (padded[:, i : i + h, j : j + w] == y).view(torch.uint8)
                torch.maximum(place, found * number, out=place)
    return out


def _median_3x3(padded: Tensor) -> Tensor:
    """Median of nine: the median of the largest low, the middle mid and the smallest high.

    Each column of three is sorted into low, mid and high once, for the three windows it is in.
    """
    h, w = padded.shape[1] - 2, padded.shape[2] - 2
    a, b, c = (padded[:, i : i + h] for i in range(3))
    low, high = torch.minimum(a, b), torch.maximum(a, b)
    mid = torch.maximum(low, torch.minimum(high, c))
    low, high = torch.minimum(low, c), torch.maximum(high, c)
    lows, mids, highs = ([t[..., j : j + w] for j in range(3)] for t in (low, mid, high))
    return _median_of_three(
        torch.maximum(torch.maximum(lows[0], lows[1]), lows[2]),
        _median_of_three(*mids),
        torch.minimum(torch.minimum(highs[0], highs[1]), highs[2]),
    )


def _median_of_three(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return torch.maximum(torch.minimum(a, b), torch.minimum(torch.maximum(a, b), c))


def _median_by_sorting(planes: Tensor, kernel_size: int) -> Tensor:
    padded = _repeat_border(planes, kernel_size // 2)
    windows = padded.unfold(1, kernel_size, 1).unfold(2, kernel_size, 1)
    return windows.flatten(3).median(3).values


def _bmm_mean(a: Tensor, b: Tensor, n: int) -> Tensor:
    """Return a @ b / n, divided before it is rounded, so that float16 sums do not overflow."""
    return torch.baddbmm(a.new_zeros(1, 1, 1), a, b, beta=0, alpha=1 / n)


def _window_products(theta: Tensor, phi: Tensor, kernel_size: int) -> Tensor:
    """theta_i . phi_j of each neighbour j, (batch, kernel_size^2, height, width)."""
    return torch.stack([(theta * view).sum(1) for view in _views(phi, kernel_size)], 1)


def _window_sum(weights: Tensor, x: Tensor, kernel_size: int) -> Tensor:
    """Weighted sum of the neighbours of x, which are views and not copies."""
    views = _views(x, kernel_size)
    y = weights[:, :1] * views[0]
    for number, view in enumerate(views[1:], 1):
        y = torch.addcmul(y, weights[:, number : number + 1], view)
    return y


def _views(x: Tensor, kernel_size: int) -> list[Tensor]:
    h, w = x.shape[2:]
    padded = F.pad(x, [kernel_size // 2] * 4)
    return [padded[:, :, i : i + h, j : j + w] for i, j in _shifts(kernel_size)]


def _inside(x: Tensor, kernel_size: int) -> Tensor:
    """Which neighbours of each position are in the image, (kernel_size^2, height, width)."""
    one = torch.ones(1, 1, *x.shape[2:], dtype=torch.bool, device=x.device)
    return torch.cat([view[0] for view in _views(one, kernel_size)])


def _shifts(kernel_size: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(kernel_size) for j in range(kernel_size)]


def _repeat_border(planes: Tensor, width: int) -> Tensor:
    return F.pad(planes[:, None], [width] * 4, mode="replicate")[:, 0]


def _image_chunks(x: Tensor, *others: Tensor) -> list[tuple[Tensor, ...]]:
    """Split the batch of several features alike, by the size of the first."""
    if not _in_chunks(x):
        return [(x, *others)]
    return list(zip(*(torch.split(f, _rows(x)) for f in (x, *others)), strict=True))


def _chunks(x: Tensor) -> tuple[Tensor, ...]:
    """Split along the first axis into parts that fit in the cache of a CPU; elsewhere do not."""
    if not _in_chunks(x):
        return (x,)
    return torch.split(x, _rows(x))


def _rows(x: Tensor) -> int:
    return max(1, CACHE_ELEMENTS // math.prod(x.shape[1:]))


def _in_chunks(x: Tensor) -> bool:
    return x.device.type == "cpu" and not _traced()


def _traced() -> bool:
    """Whether a compiler or exporter traces this: it needs one plain graph, and fuses it itself."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]


class _Kind(NamedTuple):
    function: Callable[..., Tensor]
    pairwise: bool = False  # takes theta and phi
    windowed: bool = False  # takes kernel_size


def _identity(x: Tensor) -> Tensor:
    return x


_KINDS = {
    "gaussian": _Kind(non_local_gaussian, pairwise=True),
    "dot_product": _Kind(non_local_dot_product, pairwise=True),
    "bilateral_gaussian": _Kind(bilateral_gaussian, pairwise=True, windowed=True),
    "bilateral_dot_product": _Kind(bilateral_dot_product, pairwise=True, windowed=True),
    "mean": _Kind(local_mean, windowed=True),
    "median": _Kind(local_median, windowed=True),
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
