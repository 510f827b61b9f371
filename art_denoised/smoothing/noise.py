"""Noise, reproducible to the last bit: one stream for each (seed, image index, stage).

A stream is made of parts of `PART` samples, each from a generator of its own. So the noise of a
sample depends neither on the batch it travels in nor on what was sampled before, and a stream can
be entered anywhere. The global random state is never touched.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, TypeAlias

import mpmath
import numpy as np
import torch

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.smoothing.stops import Stage

if TYPE_CHECKING:
    from art_denoised.types import Image, Images

PART = 100
LEVELS = 255
_UNDECIDED = np.iinfo(np.int16).min
_LOW_BITS = np.uint64(48)

# An open part: returns its next n samples of noise, (n, channels, height, width).
Part: TypeAlias = "Callable[[int], Images]"


def fresh_seed() -> int:
    """Return a seed from the operating system's entropy, below 2^63."""
    return secrets.randbits(63)


@dataclass(frozen=True, slots=True)
class StreamKey:
    """Which noise stream: its seed, the index of the image in its data set, and the stage."""

    seed: int
    index: int
    stage: Stage

    def sequence(self, part: int, extra: int = 0) -> np.random.SeedSequence:
        """Return the seed sequence of one part; ``extra`` tells apart generators of one part."""
        spawn_key = (self.index, self.stage, part) + ((extra,) if extra else ())
        return np.random.SeedSequence(self.seed, spawn_key=spawn_key)


class Noise(Protocol):
    """A kind of noise around an image: `Gaussian`, or `QuantisedGaussian` for 8 bits."""

    name: ClassVar[str]

    @property
    def sigma(self) -> float:
        """Standard deviation in image units."""
        ...

    def tv(self, dimensions: int) -> float:
        """Bound the distance in total variation from exact noise on so many pixel values."""
        ...

    def check(self, x: Images) -> None:
        """Refuse images that this noise cannot be added to."""
        ...

    def centre(self, x: Image) -> torch.Tensor:
        """Return what noise is added to, of an image that was checked."""
        ...

    def add(self, centre: torch.Tensor, noise: Images) -> Images:
        """Return noisy images, float32."""
        ...

    def part(self, key: StreamKey, part: int, shape: Sequence[int], device: torch.device) -> Part:
        """Open one part of a stream, in channels-last memory order, which networks like."""
        ...


@dataclass(frozen=True, slots=True)
class Gaussian:
    """N(0, sigma^2 I) in float32. What it does not guarantee: docs/explanation/certificates.md."""

    sigma: float
    name: ClassVar[str] = "gaussian"

    def tv(self, dimensions: int) -> float:
        """Return 0: the distance of floating-point noise is not known, and not corrected for."""
        return 0.0

    def check(self, x: Images) -> None:
        """Take any image."""

    def centre(self, x: Image) -> torch.Tensor:
        """Return the image itself."""
        return x

    def add(self, centre: torch.Tensor, noise: Images) -> Images:
        """Return ``centre + sigma * noise``."""
        return torch.add(centre, noise, alpha=self.sigma)

    def part(self, key: StreamKey, part: int, shape: Sequence[int], device: torch.device) -> Part:
        """Open one part: numpy's SFC64 on a CPU, the device's own generator elsewhere."""
        channels, height, width = shape
        size, sequence = (height, width, channels), key.sequence(part)
        if device.type != "cpu":
            return drawn_whole(
                lambda g: torch.randn((PART, *size), generator=g, device=device), sequence, device
            )
        normal = np.random.Generator(np.random.SFC64(sequence)).standard_normal

        def take(n: int) -> Images:
            noise = torch.from_numpy(normal((n, *size), dtype=np.float32))
            return noise.permute(0, 3, 1, 2)

        return take


def drawn_whole(
    draw: Callable[[torch.Generator], torch.Tensor],
    sequence: np.random.SeedSequence,
    device: torch.device,
) -> Part:
    """Open a part that ``draw`` draws whole, channels last, from the device's own generator.

    Parallel generators fill other shapes in another order.
    """
    generator = torch.Generator(device)
    generator.manual_seed(sequence.generate_state(1, np.uint64).item())
    noise, taken = draw(generator).permute(0, 3, 1, 2), 0

    def take(n: int) -> Images:
        nonlocal taken
        taken += n
        return noise[taken - n : taken]

    return take


@dataclass(frozen=True, slots=True)
class QuantisedGaussian:
    """round(255 eps) / 255 for eps from N(0, sigma^2 I), drawn in integer arithmetic."""

    sigma: float
    name: ClassVar[str] = "quantised"

    def tv(self, dimensions: int) -> float:
        """Bound the distance between the sampled noise and the exactly rounded Gaussian.

        Each threshold is rounded by less than 2^-64, and what lies beyond the outermost ones has a
        probability of less than 2^-64 a side; distances of independent pixel values add up.
        """
        return dimensions * (len(cells(self.sigma).thresholds) + 3) * 2.0**-64

    def check(self, x: Images) -> None:
        """Refuse images that are not made of multiples of 1/255."""
        if bool((x * LEVELS - (x * LEVELS).round()).abs().max() > 1e-3):
            raise InputError(
                "the image is not an 8-bit one: its pixels are no multiples of 1/255; "
                "quantise it, or use noise 'gaussian'"
            )

    def centre(self, x: Image) -> torch.Tensor:
        """Return the integers that the pixels are, as float32, which holds them exactly."""
        return (x * LEVELS).round()

    def add(self, centre: torch.Tensor, noise: Images) -> Images:
        """Return ``(centre + noise) / 255``: float32, a function of the integers alone."""
        return noise.to(torch.float32).add_(centre).div_(LEVELS)

    def part(self, key: StreamKey, part: int, shape: Sequence[int], device: torch.device) -> Part:
        """Open one part, by inverse transform of 64 uniform bits a value.

        They come from numpy's SFC64 on a CPU, where the last 48 are drawn only if the first 16
        leave the value open, and from the device's own generator elsewhere.
        """
        table, (channels, height, width) = cells(self.sigma), shape
        values = channels * height * width
        if device.type != "cpu":
            whole = (PART, height, width, channels)
            return drawn_whole(lambda g: rounded_noise(table, whole, g), key.sequence(part), device)
        first, more = (np.random.SFC64(key.sequence(part, extra)) for extra in (1, 2))

        def take(n: int) -> Images:
            words = first.random_raw((n, -(-values // 4)))  # whole words a sample
            prefix = words.view(np.uint16)[:, :values]
            noise = table.lookup[prefix]
            rows, columns = np.nonzero(noise == _UNDECIDED)
            rest = more.random_raw(len(rows)) >> np.uint64(16)
            u = (prefix[rows, columns].astype(np.uint64) << _LOW_BITS) | rest
            noise[rows, columns] = table.lowest + np.searchsorted(table.thresholds, u, side="right")
            images = torch.from_numpy(noise).reshape(n, height, width, channels)
            return images.permute(0, 3, 1, 2)

        return take


class Cells(NamedTuple):
    """P(value <= lowest + i) = thresholds[i] / 2^64, ascending.

    ``lookup`` has the value by the first 16 bits, where they decide it: no threshold begins so.
    """

    lowest: int
    thresholds: np.ndarray
    lookup: np.ndarray


@lru_cache(maxsize=16)
def cells(sigma: float) -> Cells:
    """Tabulate the rounded Gaussian, in 60 digits."""
    with mpmath.workdps(60):
        scale, whole = mpmath.mpf(sigma) * LEVELS, mpmath.mpf(2) ** 64
        left: list[int] = []  # Phi((j + 1/2) / scale) for j = -1, -2, ...
        while not left or left[-1] > 0:
            z = (mpmath.mpf(0.5) - len(left) - 1) / scale
            left.append(int(mpmath.floor(whole * mpmath.ncdf(z))))
    left.pop()
    thresholds = np.array(left[::-1] + [2**64 - t for t in left], dtype=np.uint64)
    lowest = -len(left)
    prefixes = np.arange(2**16, dtype=np.uint64)
    below = np.searchsorted(thresholds, prefixes << _LOW_BITS, side="right")
    lookup = (below + lowest).astype(np.int16)
    lookup[thresholds >> _LOW_BITS] = _UNDECIDED
    return Cells(lowest, thresholds, lookup)


def rounded_noise(table: Cells, shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """Return integers drawn on the device of a generator, int32, by inverse transform."""
    # All bits at once: to find the values that 16 of them leave open would wait for the device.
    # The order of unsigned integers is that of signed ones after a shift.
    device, lowest = generator.device, -(2**63)
    u = torch.empty(tuple(shape), dtype=torch.int64, device=device)
    u.random_(lowest, None, generator=generator)
    shifted = (table.thresholds ^ np.uint64(2**63)).view(np.int64)
    found = torch.searchsorted(torch.from_numpy(shifted).to(device), u, right=True, out_int32=True)
    return found + table.lowest


_KINDS = {kind.name: kind for kind in (Gaussian, QuantisedGaussian)}


def find_noise(
    name: str, sigma: float, clip_values: tuple[Any, Any] = (0.0, 1.0)
) -> Gaussian | QuantisedGaussian:
    """Return the kind of noise called ``name``, if sigma and range of pixels suit it."""
    if name not in _KINDS:
        raise InputError(f"noise is {name!r}; give {' or '.join(map(repr, _KINDS))}")
    low, high = checks.pixel_range(clip_values)
    if name == QuantisedGaussian.name and (low, high) != (0, 1):
        raise InputError(
            f"clip_values are ({low:g}, {high:g}); quantised noise needs 8-bit images in [0, 1]"
        )
    return _KINDS[name](checks.sigma(sigma, clip_values))


class Stream:
    """Consecutive samples of one noise stream, from sample ``start`` on.

    Example:
        >>> key = StreamKey(seed=0, index=0, stage=Stage.VOTE)
        >>> whole = Stream(Gaussian(1.0), key, (1, 8, 8)).take(250)
        >>> torch.equal(Stream(Gaussian(1.0), key, (1, 8, 8), start=170).take(80), whole[170:])
        True
    """

    def __init__(
        self,
        noise: Noise,
        key: StreamKey,
        shape: Sequence[int],
        device: torch.device | str = "cpu",
        start: int = 0,
    ) -> None:
        self._noise, self._key, self._shape = noise, key, shape
        self._device = torch.device(device)  # a seed fixes the samples on one kind of device
        self.position = start - start % PART
        self.take(start % PART)

    def pieces(self, n: int) -> Iterator[Images]:
        """Yield the next ``n`` samples in pieces, none beyond the end of a part."""
        while n:
            if self.position % PART == 0:
                part = self.position // PART
                self._part = self._noise.part(self._key, part, self._shape, self._device)
            size = min(n, PART - self.position % PART)
            yield self._part(size)
            self.position += size
            n -= size

    def take(self, n: int) -> Images:
        """Return the next ``n`` samples of noise, (n, channels, height, width)."""
        pieces = list(self.pieces(n))
        return torch.cat(pieces) if pieces else torch.empty(0, *self._shape, device=self._device)
