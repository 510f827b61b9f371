"""Exactly quantised Gaussian noise for 8-bit images: certificates that hold on real computers.

Rounding a noisy image to the grid of 8-bit values makes the base classifier a function on integer
vectors. For an 8-bit image x, round(255 (x + eps)) = 255 x + round(255 eps): so the rounded noise
is drawn as integers, from a table of 64-bit thresholds, and no floating-point sum is ever taken.

Source: Voracek and Hein, "Sound Randomized Smoothing in Floating-Point Arithmetic" (ICLR 2023,
arXiv 2207.07209). docs/certificates.md has the statement, and what of it is left to assume.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import mpmath
import numpy as np
import torch

from art_denoised.checks import InputError
from art_denoised.smoothing.sampling import Part, StreamKey

if TYPE_CHECKING:
    from art_denoised.types import Image, Images

LEVELS = 255
_UNDECIDED = np.iinfo(np.int16).min
_LOW_BITS = np.uint64(48)


@dataclass(frozen=True, slots=True)
class QuantisedGaussian:
    """round(255 eps) / 255 for eps from N(0, sigma^2 I), drawn in integer arithmetic.

    Attributes:
        sigma: Standard deviation of eps in image units.

    Example:
        >>> from art_denoised.smoothing.procedures import Stage
        >>> noise, x = QuantisedGaussian(0.25), torch.full((1, 8, 8), 51 / 255)
        >>> part = noise.part(StreamKey(0, 0, Stage.VOTE), 0, x.shape, torch.device("cpu"))
        >>> noisy = noise.add(noise.centre(x), part.take(3))
        >>> bool(torch.allclose(noisy * 255, (noisy * 255).round(), atol=1e-4))
        True
        >>> noise.tv(3 * 32 * 32) < 1e-12
        True
    """

    sigma: float
    name: ClassVar[str] = "quantised"

    def tv(self, dimensions: int) -> float:
        """Bound the distance between the sampled noise and the exactly rounded Gaussian.

        Each threshold is rounded by less than 2^-64, and what lies beyond the outermost ones has a
        probability of less than 2^-64 a side; distances of independent pixel values add up.
        """
        return dimensions * (len(_cells(self.sigma).thresholds) + 3) * 2.0**-64

    def centre(self, x: Image) -> torch.Tensor:
        """Return the image as integers.

        Raises:
            InputError: It is not made of multiples of 1/255.
        """
        whole = (x * LEVELS).round()
        if bool((x * LEVELS - whole).abs().max() > 1e-3):
            raise InputError(
                "the image is not an 8-bit one: its pixels are no multiples of 1/255; "
                "quantise it, or use noise 'gaussian'"
            )
        return whole.to(torch.int32)

    def add(self, centre: torch.Tensor, noise: Images) -> Images:
        """Return ``(centre + noise) / 255``: float32, a function of the integers alone."""
        return (centre + noise).to(torch.float32) / LEVELS

    def part(self, key: StreamKey, part: int, shape: Sequence[int], device: torch.device) -> Part:
        """Open one part. The numbers are the same on all devices: they are drawn on the CPU."""
        return _QuantisedPart(_cells(self.sigma), key, part, shape, device)


class _Cells(NamedTuple):
    """P(value <= lowest + i) = thresholds[i] / 2^64, ascending; lookup has the first 16 bits."""

    lowest: int
    thresholds: np.ndarray
    lookup: np.ndarray


@lru_cache(maxsize=16)
def _cells(sigma: float) -> _Cells:
    """Tabulate the rounded Gaussian, in 60 digits."""
    with mpmath.workdps(60):
        scale, whole = mpmath.mpf(sigma) * LEVELS, mpmath.mpf(2) ** 64
        left: list[int] = []  # Phi((j + 1/2) / scale) for j = -1, -2, ...
        while not left or left[-1] > 0:
            left.append(
                int(mpmath.floor(whole * mpmath.ncdf((mpmath.mpf(0.5) - len(left) - 1) / scale)))
            )
    left.pop()
    thresholds = np.array(left[::-1] + [2**64 - t for t in left], dtype=np.uint64)
    lowest = -len(left)
    first = np.arange(2**16, dtype=np.uint64) << _LOW_BITS
    last = first | np.uint64(2**48 - 1)
    low, high = (np.searchsorted(thresholds, u, side="right") for u in (first, last))
    lookup = np.where(low == high, low + lowest, _UNDECIDED).astype(np.int16)
    return _Cells(lowest, thresholds, lookup)


class _QuantisedPart:
    """64 uniform bits a value; the last 48 are drawn only where the first 16 leave it open."""

    def __init__(
        self,
        cells: _Cells,
        key: StreamKey,
        part: int,
        shape: Sequence[int],
        device: torch.device,
    ) -> None:
        self._cells, self._shape, self._device = cells, shape, device
        self._first, self._more = (np.random.SFC64(key.sequence(part, extra)) for extra in (1, 2))

    def take(self, n: int) -> Images:
        channels, height, width = self._shape
        values = channels * height * width
        words = self._first.random_raw((n, -(-values // 4)))  # whole words a sample
        prefix = words.view(np.uint16)[:, :values]
        noise = self._cells.lookup[prefix]
        rows, columns = np.nonzero(noise == _UNDECIDED)
        rest = self._more.random_raw(len(rows)) >> np.uint64(16)
        u = (prefix[rows, columns].astype(np.uint64) << _LOW_BITS) | rest
        found = np.searchsorted(self._cells.thresholds, u, side="right")
        noise[rows, columns] = found + self._cells.lowest
        whole = torch.from_numpy(noise).reshape(n, height, width, channels)
        return whole.permute(0, 3, 1, 2).to(self._device)
