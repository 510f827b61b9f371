"""The noise of diffusion models: the same in a forward pass and in its gradient."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from art_denoised.types import Images


class LevelNoise:
    """Standard normal noise for each (image, level), the same in a forward pass and its gradient.

    With a seed, all images share the noise of a level: the result for an image is then a
    deterministic function of its pixels, whatever its batch. Without one, every image of every call
    has its own noise, so copies of an image in a batch (EOT) see independent noise. The global
    random state is neither read nor changed.

    Args:
        seed: Seed of the noise; None: fresh noise.
        stream: Name of the user of the seed; other streams of a seed are independent.

    Example:
        >>> x = torch.zeros(2, 1, 8, 8)
        >>> noise = LevelNoise(0)
        >>> a = noise(x, [0, 1], [3, 3])
        >>> torch.equal(a[0], a[1]), torch.equal(LevelNoise(None)(x, [0, 1], [3, 3])[0], a[0])
        (True, False)
    """

    def __init__(self, seed: int | None, *, stream: tuple[int, ...] = ()) -> None:
        self._stream, self._shared = stream, seed is not None
        self._seed = secrets.randbits(63) if seed is None else seed
        self._drawn: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, x: Images, images: Sequence[int], levels: Sequence[int]) -> Images:
        """Return noise of shape (rows, ...) for rows of (image, level).

        Args:
            x: Any batch of such images: shape, type and device.
            images: Index of the image of each row, on the host.
            levels: Index of the level of each row, on the host.
        """
        pairs, rows = np.unique(np.stack([images, levels], 1), axis=0, return_inverse=True)
        if self._shared:
            pairs[:, 0] = 0
        elif len(pairs):  # rows of an image follow each other: forget those before
            first = pairs[0, 0]
            self._drawn = {k: v for k, v in self._drawn.items() if k[0] >= first - 1}
        drawn = torch.stack([self._of(x, image, level) for image, level in pairs.tolist()])
        return drawn[torch.from_numpy(rows.reshape(-1)).to(x.device, non_blocking=True)]

    def _of(self, x: Images, *key: int) -> Tensor:
        if key not in self._drawn:
            self._drawn[key] = self._draw(key, x)
        return self._drawn[key]

    def _draw(self, key: tuple[int, ...], x: Images) -> Tensor:
        generator = torch.Generator(x.device)
        sequence = np.random.SeedSequence(self._seed, spawn_key=(*self._stream, *key))
        # 63 bits: the generator of a GPU takes no more.
        generator.manual_seed(int(sequence.generate_state(1, np.uint64)[0]) >> 1)
        return torch.randn(x.shape[1:], generator=generator, device=x.device, dtype=x.dtype)
