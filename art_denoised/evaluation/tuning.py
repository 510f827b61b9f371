"""Batch size and memory order that a network runs fastest with here: measured, then remembered.

No result depends on either; a wrong batch size costs a factor on a CPU.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from art_denoised.checks import InputError
from art_denoised.smoothing.packing import takes_channels_last
from art_denoised.smoothing.sampling import model_device, model_dtype
from art_denoised.types import Classifier, Image

_BATCH_SIZES = (16, 32, 64, 128, 256, 512, 1024)
_BUDGET = 6.0  # seconds in all
_TRIAL = 0.1  # seconds a setting, at least


@dataclass(frozen=True, slots=True)
class Tuning:
    """How to run a network.

    Attributes:
        batch_size: Images at once.
        channels_last: Memory order of the images.
        rate: Images a second that were measured with it.
    """

    batch_size: int
    channels_last: bool
    rate: float


def tune(base: Classifier, x: Image, *, cache: Path | None = None) -> Tuning:
    """Return the fastest setting for images like ``x``, measured or as found in the cache.

    Args:
        base: Images to logits, in eval mode.
        x: An image (channels, height, width).
        cache: A JSON file; by default ``art_denoised/tuning.json`` in the user's cache folder. A
            setting is remembered for one network, image shape, device, number of threads and
            version of torch. A cache that cannot be read or written is done without.

    Raises:
        InputError: Not even the smallest batch that is tried fits into memory.

    Example:
        >>> from art_denoised.demo import digits_classifier
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cache = Path(folder, "tuning.json")
        ...     first = tune(digits_classifier(), torch.zeros(1, 8, 8), cache=cache)
        ...     again = tune(digits_classifier(), torch.zeros(1, 8, 8), cache=cache)
        >>> first == again  # not measured a second time
        True
    """
    cache = _default_cache() if cache is None else cache
    x = x.to(model_device(base), model_dtype(base))
    key, known = _key(base, x), _read(cache)
    if key not in known:
        known[key] = asdict(_measure(base, x))
        _write(cache, known)
    found = Tuning(**known[key])
    # The key does not see how a network flattens.
    return replace(found, channels_last=found.channels_last and takes_channels_last(base, x))


def _measure(base: Classifier, x: Image) -> Tuning:
    orders = [True, False] if takes_channels_last(base, x) else [False]
    start, best = time.perf_counter(), Tuning(1, False, 0.0)
    for batch_size in _BATCH_SIZES:
        try:
            at_this_size = [
                Tuning(batch_size, channels_last, _rate(base, x, batch_size, channels_last))
                for channels_last in orders
            ]
        except torch.OutOfMemoryError:
            if best.rate:
                break
            raise InputError(
                f"a batch of {batch_size} images does not fit into memory; give a smaller "
                "batch size"
            ) from None
        fastest = max(at_this_size, key=lambda t: t.rate)
        if fastest.rate > 1.02 * best.rate:  # of equals the smaller batch
            best, orders = fastest, [fastest.channels_last]
        elif fastest.rate < 0.9 * best.rate:
            break
        if time.perf_counter() - start > _BUDGET:
            break
    return best


@torch.no_grad()
def _rate(base: Classifier, x: Image, batch_size: int, channels_last: bool) -> float:
    order = torch.channels_last if channels_last else torch.contiguous_format
    batch = x.expand(batch_size, *x.shape).contiguous(memory_format=order)
    base(batch)
    best, start = 0.0, time.perf_counter()
    while time.perf_counter() - start < _TRIAL or best == 0.0:
        before = time.perf_counter()
        base(batch)
        if x.device.type == "cuda":
            torch.cuda.synchronize(x.device)
        best = max(best, batch_size / (time.perf_counter() - before))
    return best


def _key(base: Classifier, x: Image) -> str:
    name = torch.cuda.get_device_name(x.device) if x.device.type == "cuda" else platform.machine()
    machine = [str(x.device), name, torch.get_num_threads(), os.cpu_count(), torch.__version__]
    what = [repr(base), list(x.shape), str(x.dtype), *machine]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]


def _default_cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root, "art_denoised", "tuning.json")


def _read(cache: Path) -> dict[str, dict[str, Any]]:
    try:
        known = json.loads(cache.read_text())
        return {key: asdict(Tuning(**value)) for key, value in known.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write(cache: Path, known: dict[str, dict[str, Any]]) -> None:
    temporary = cache.with_name(f".{os.getpid()}.{cache.name}")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(known, indent=1))
        os.replace(temporary, cache)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
