"""Random states of a training, each seeded by a key of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch


def derived(key: Sequence[int]) -> int:
    """Return a seed of 64 bits, which differs between keys of equal length.

    Zeros at the end of a key are ignored: [0, 1, 0] has the seed of [0, 1].

    Example:
        >>> derived([0, 1]) == derived([0, 1]), derived([0, 1]) == derived([0, 2])
        (True, False)
    """
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


@contextmanager
def seeded(key: Sequence[int] | int, device: torch.device) -> Iterator[None]:
    """Seed torch's random states of the CPU and of one device, and restore them afterwards.

    Unlike `torch.manual_seed`, it leaves other devices alone.

    Args:
        key: Key from which a seed is derived; an integer is the seed itself.
        device: Device whose state is seeded. That of accelerators other than CUDA is not restored.

    Example:
        >>> with seeded([0, 1], torch.device("cpu")):
        ...     first = torch.rand(2)
        >>> with seeded([0, 1], torch.device("cpu")):
        ...     torch.equal(torch.rand(2), first)
        True
    """
    seed = key if isinstance(key, int) else derived(key)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        elif device.type != "cpu":
            torch.get_device_module(device).manual_seed(seed)
        yield
