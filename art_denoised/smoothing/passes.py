"""Forward passes of one fixed shape, by which a network is one function of each noisy image."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch.nn import functional

from art_denoised import checks
from art_denoised.checks import InputError

if TYPE_CHECKING:
    from art_denoised.types import Classifier, Image, Images, Labels, Logits

NearTies = Literal["in_batch", "alone"]

_BATCH_SIZES = (16, 32, 64, 128, 256, 512, 1024)
_LIMIT = 6.0  # seconds for all of them, and for a last round
_ROUNDS = 10


@dataclass(frozen=True)
class Passes:
    """How noisy images are passed to a network (docs/decisions/0011-fixed-shapes.md).

    Attributes:
        batch_size: Number of images in every pass. The last pass is padded.
        order: Memory order of the images.
        near_ties: "in_batch" if the answer to an image was bitwise the same in every place of a
            batch and beside other images. "alone" if not: a sample whose leading logits are near
            each other is then decided by a pass over it alone.
    """

    batch_size: int
    order: torch.memory_format
    near_ties: NearTies

    @classmethod
    def tried(
        cls, network: Classifier, x: Image, batch_size: int, near_ties: NearTies | None = None
    ) -> Passes:
        """Return the passes of a network, after a trial on noisy copies of an image.

        ``near_ties`` is the rule of a run that this is a part of; None: what the trial finds.
        """
        order = memory_order(network, x)
        try:
            holds = near_ties != "alone" and _answers_each_alike(network, x, batch_size, order)
        except torch.OutOfMemoryError:
            raise _too_large(batch_size) from None
        if near_ties == "in_batch" and not holds:
            raise InputError(
                "here the network's answer depends on the place in a batch, but not where the run "
                "was begun; compute on machines of one kind"
            )
        return cls(batch_size, order, "in_batch" if holds else "alone")

    @torch.no_grad()
    def __call__(self, network: Classifier, x: Images) -> tuple[Labels, int]:
        """Classify up to ``batch_size`` images, without waiting for the device.

        Returns:
            The class of each image, or the number of classes where it has none (`unreadable`); and
            the number of classes.
        """
        n, missing = len(x), self.batch_size - len(x)
        padded = functional.pad(x, (0, 0, 0, 0, 0, 0, 0, missing)) if missing else x
        batch = padded.to(checks.model_dtype(network)).contiguous(memory_format=self.order)
        given = batch if self.near_ties == "in_batch" else batch.clone()  # may be written into
        logits = checks.logit_rows(network(given), self.batch_size)[:n]
        labels = logits.argmax(1)
        if self.near_ties == "alone":
            for i in _near_ties(logits, batch):
                labels[i] = checks.logits(network(batch[i : i + 1].contiguous()), 1).argmax(1)[0]
        classes = logits.shape[1]
        return labels.masked_fill(checks.unreadable(logits), classes), classes


def _near_ties(logits: Logits, batch: Images) -> list[int]:
    """Return the samples whose two leading logits rounding may part. It waits for the device."""
    first, second = logits.topk(2, dim=1).values.unbind(1)
    clear = first - second > logits.abs().amax(1) * checks.near(logits, batch)
    return (~clear & ~checks.unreadable(logits)).nonzero().flatten().tolist()


@torch.no_grad()
def _answers_each_alike(
    network: Classifier, x: Image, batch_size: int, order: torch.memory_format
) -> bool:
    """Return whether logits are bitwise equal in other places and beside other images."""
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn((batch_size, *x.shape), generator=draw)
    places = torch.randperm(batch_size, generator=draw)
    batch = (x + 0.25 * noise.to(x)).to(checks.model_dtype(network))
    mixed, kept = batch[places], batch_size // 2 + 1
    mixed[kept:] = torch.rand(mixed[kept:].shape, generator=draw).to(mixed)
    mixed[(kept + batch_size) // 2 :] = 0  # as the last pass is padded

    def answers(images: Images) -> Logits:
        given = images.contiguous(memory_format=order)
        given = given.clone() if given is images else given  # it may be written into
        return checks.logits(network(given), batch_size)

    return torch.equal(answers(mixed)[:kept], answers(batch)[places[:kept]])


@torch.no_grad()
def memory_order(network: Classifier, x: Image) -> torch.memory_format:
    """Return the memory order of images for a network: channels-last if it can take that.

    Networks that flatten with ``view`` cannot.
    """
    two = torch.stack([x, x]).to(checks.model_dtype(network))
    try:
        network(two.contiguous(memory_format=torch.channels_last))
    except RuntimeError:
        return torch.contiguous_format
    return torch.channels_last


@torch.no_grad()
def best_batch_size(network: Classifier, x: Image) -> int:
    """Return the batch size with the most images in a second, measured in a few seconds.

    A wrong one costs a factor of time on a CPU. Votes of near ties depend on the batch size, so a
    run keeps the one that it was begun with.

    Args:
        network: Module or function from images to logits, in eval mode.
        x: An image (channels, height, width).

    Raises:
        InputError: Not even the smallest batch that is tried fits into memory.

    Example:
        >>> best_batch_size(torch.nn.Flatten(), torch.zeros(1, 8, 8)) >= 16
        True
    """
    x = checks.placed(x, network)
    order = memory_order(network, x)
    start, rates = time.perf_counter(), dict[int, float]()
    for size in _BATCH_SIZES:
        try:
            _rate(network, x, size, order)  # warms up
            rates[size] = _rate(network, x, size, order)
        except torch.OutOfMemoryError:
            if rates:
                break
            raise _too_large(size) from None
        if rates[size] < 0.8 * max(rates.values()) or time.perf_counter() - start > _LIMIT:
            break
    # Other programs disturb a pass, so that the sizes take turns and each has its best one.
    for _ in range(_ROUNDS):
        for size in [size for size, rate in rates.items() if rate > 0.5 * max(rates.values())]:
            rates[size] = max(rates[size], _rate(network, x, size, order))
        if time.perf_counter() - start > _LIMIT:
            break
    near = 0.98 * max(rates.values())
    return next(size for size, rate in rates.items() if rate >= near)  # of equals the smallest


def _too_large(batch_size: int) -> InputError:
    return InputError(
        f"a batch of {batch_size} images does not fit into memory; give a smaller batch size"
    )


def _rate(network: Classifier, x: Image, size: int, order: torch.memory_format) -> float:
    """Return images in a second, in one pass."""
    batch = x.expand(size, *x.shape).contiguous(memory_format=order)
    before = time.perf_counter()
    network(batch)
    if batch.is_cuda:
        torch.cuda.synchronize(batch.device)
    return size / max(time.perf_counter() - before, 1e-9)
