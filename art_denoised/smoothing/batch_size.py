"""The batch size that a network is fastest with on this machine."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.smoothing.voters import takes_channels_last

if TYPE_CHECKING:
    from art_denoised.types import Classifier, Image

_BATCH_SIZES = (16, 32, 64, 128, 256, 512, 1024)
_LIMIT = 6.0  # seconds in all
_TRIAL = 0.1  # seconds for each size, at least


@torch.no_grad()
def best_batch_size(network: Classifier, x: Image) -> int:
    """Return the batch size with the most images in a second, measured in a few seconds.

    No vote depends on the batch size; a wrong one costs a factor of time on a CPU.

    Args:
        network: Module or function from images to logits, in eval mode.
        x: An image (channels, height, width).

    Raises:
        InputError: Not even the smallest batch that is tried fits into memory.

    Example:
        >>> best_batch_size(torch.nn.Flatten(), torch.zeros(1, 8, 8)) >= 16
        True
    """
    x = x.to(checks.model_device(network), checks.model_dtype(network))
    last = takes_channels_last(network, x)
    start, best, fastest = time.perf_counter(), 0, 0.0
    for size in _BATCH_SIZES:
        try:
            speed = _speed(network, x, size, last)
        except torch.OutOfMemoryError:
            if best:
                break
            raise InputError(
                f"a batch of {size} images does not fit into memory; give a smaller batch size"
            ) from None
        if speed > 1.02 * fastest:  # of equals the smaller batch
            best, fastest = size, speed
        elif speed < 0.9 * fastest:
            break
        if time.perf_counter() - start > _LIMIT:
            break
    return best


def _speed(network: Classifier, x: Image, size: int, channels_last: bool) -> float:
    """Return images in a second, the best of several passes."""
    order = torch.channels_last if channels_last else torch.contiguous_format
    batch = x.expand(size, *x.shape).contiguous(memory_format=order)
    network(batch)
    best, start = 0.0, time.perf_counter()
    while time.perf_counter() - start < _TRIAL or best == 0.0:
        before = time.perf_counter()
        network(batch)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        best = max(best, size / (time.perf_counter() - before))
    return best
