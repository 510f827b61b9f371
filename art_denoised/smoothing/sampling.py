"""Noise, reproducible to the last bit: one stream for each (seed, image index, stage).

A stream is made of parts of `PART` samples, each from a generator of its own. So the noise of a
sample depends neither on the batch it travels in nor on what was sampled before, and a stream can
be entered anywhere. The global random state is never touched.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np
import torch

from art_denoised.smoothing.procedures import Stage

if TYPE_CHECKING:
    from art_denoised.types import Image, Images

PART = 100


def fresh_seed() -> int:
    """Return a seed from the operating system's entropy, below 2^63.

    Example:
        >>> 0 <= fresh_seed() < 2**63
        True
    """
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


class Part(Protocol):
    """The samples of one part, in order."""

    def take(self, n: int) -> Images:
        """Return the next ``n`` samples of noise, (n, channels, height, width)."""
        ...


class Noise(Protocol):
    """A kind of noise around an image. Final: `Gaussian`, and `QuantisedGaussian` for 8 bits."""

    name: ClassVar[str]

    @property
    def sigma(self) -> float:
        """Standard deviation in image units."""
        ...

    def tv(self, dimensions: int) -> float:
        """Bound the distance in total variation from exact noise on so many pixel values."""
        ...

    def centre(self, x: Image) -> torch.Tensor:
        """Return what noise is added to."""
        ...

    def add(self, centre: torch.Tensor, noise: Images) -> Images:
        """Return noisy images, float32."""
        ...

    def part(self, key: StreamKey, part: int, shape: Sequence[int], device: torch.device) -> Part:
        """Open one part of a stream."""
        ...


@dataclass(frozen=True, slots=True)
class Gaussian:
    """N(0, sigma^2 I) in float32. What it does not guarantee: docs/certificates.md.

    Attributes:
        sigma: Standard deviation in image units.

    Example:
        >>> noise = Gaussian(0.25)
        >>> key = StreamKey(seed=0, index=0, stage=Stage.VOTE)
        >>> samples = noise.part(key, 0, (3, 8, 8), torch.device("cpu")).take(5)
        >>> noise.add(noise.centre(torch.zeros(3, 8, 8)), samples).shape
        torch.Size([5, 3, 8, 8])
    """

    sigma: float
    name: ClassVar[str] = "gaussian"

    def tv(self, dimensions: int) -> float:
        """Return 0: the distance of floating-point noise is not known, and not corrected for."""
        return 0.0

    def centre(self, x: Image) -> torch.Tensor:
        """Return the image itself."""
        return x

    def add(self, centre: torch.Tensor, noise: Images) -> Images:
        """Return ``centre + sigma * noise``."""
        return torch.add(centre, noise, alpha=self.sigma)

    def part(self, key: StreamKey, part: int, shape: Sequence[int], device: torch.device) -> Part:
        """Open one part: numpy's SFC64 on a CPU, the device's own generator elsewhere."""
        if device.type == "cpu":
            return _NumpyNormal(key.sequence(part), shape)
        return _DeviceNormal(key.sequence(part), shape, device)


class _NumpyNormal:
    def __init__(self, sequence: np.random.SeedSequence, shape: Sequence[int]) -> None:
        channels, height, width = shape
        self._size = (height, width, channels)  # channels-last in memory, as networks like it
        self._normal = np.random.Generator(np.random.SFC64(sequence)).standard_normal

    def take(self, n: int) -> Images:
        noise = torch.from_numpy(self._normal((n, *self._size), dtype=np.float32))
        return noise.permute(0, 3, 1, 2)


class _DeviceNormal:
    """Parallel generators fill other shapes in another order, so the part is drawn whole."""

    def __init__(
        self, sequence: np.random.SeedSequence, shape: Sequence[int], device: torch.device
    ) -> None:
        channels, height, width = shape
        seed = int(sequence.generate_state(1, np.uint64)[0])
        generator = torch.Generator(device).manual_seed(seed)
        noise = torch.randn((PART, height, width, channels), generator=generator, device=device)
        self._rest = noise.permute(0, 3, 1, 2)

    def take(self, n: int) -> Images:
        taken, self._rest = self._rest[:n], self._rest[n:]
        return taken


class Stream:
    """Consecutive samples of one noise stream.

    Args:
        noise: Kind of noise.
        key: Which stream.
        shape: (channels, height, width) of one sample.
        device: Where the samples are wanted. A seed fixes them on one kind of device.
        start: First sample.

    Attributes:
        position: The next sample.

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
        self._device = torch.device(device)
        self.position = start
        self._part: Part  # opened when its first sample is wanted
        if start % PART:
            self._part = self._open()
            self._part.take(start % PART)

    def pieces(self, n: int) -> Iterator[Images]:
        """Yield the next ``n`` samples in pieces, none beyond the end of a part."""
        while n:
            if self.position % PART == 0:
                self._part = self._open()
            size = min(n, PART - self.position % PART)
            yield self._part.take(size)
            self.position += size
            n -= size

    def _open(self) -> Part:
        part = self.position // PART
        return self._noise.part(self._key, part, self._shape, self._device)

    def take(self, n: int) -> Images:
        """Return the next ``n`` samples of noise, (n, channels, height, width)."""
        pieces = list(self.pieces(n))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def model_dtype(base: object) -> torch.dtype:
    """Return the floating-point type a model computes in: that of its first such parameter.

    Example:
        >>> model_dtype(torch.nn.Linear(2, 2).bfloat16())
        torch.bfloat16
    """
    if isinstance(base, torch.nn.Module):
        for parameter in base.parameters():
            if parameter.is_floating_point():
                return parameter.dtype
    return torch.float32


def model_device(base: object) -> torch.device:
    """Return the device of a model's first parameter, the CPU where it has none.

    Example:
        >>> model_device(torch.nn.ReLU())
        device(type='cpu')
    """
    if isinstance(base, torch.nn.Module):
        for parameter in base.parameters():
            return parameter.device
    return torch.device("cpu")
