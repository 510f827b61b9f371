"""Votes of a base classifier under Gaussian noise, reproducible to the last count.

Noise comes from one stream per (seed, image index, stage, part). A part is `PART` samples, the
first of which are the same however many are drawn. So the noise of a sample does not depend on
the batch it travels in, on the number of workers, or on what was sampled before. The global random
state is never touched.

The noise alone is not enough: the same image gives logits that differ in the last bits from one
batch size to another, because libraries choose other kernels. A sample whose two leading logits
are that close is therefore decided by a pass of its own (`_decide`), and the votes are those of
the classifier applied to one image at a time.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np
import torch

from art_denoised import checks

if TYPE_CHECKING:
    from art_denoised.types import Classifier, Image, Images, Labels

PART = 100


class Stage(IntEnum):
    """What a noise stream is for. Samples of different stages are independent."""

    SELECTION = 0
    ESTIMATION = 1
    VOTE = 2
    SMOOTHING = 3


def fresh_seed() -> int:
    """Return a seed from the operating system's entropy, below 2^63.

    Example:
        >>> 0 <= fresh_seed() < 2**63
        True
    """
    return secrets.randbits(63)


def standard_normal(
    n: int,
    shape: Sequence[int],
    *,
    seed: int,
    index: int,
    stage: Stage,
    part: int,
    device: torch.device | str = "cpu",
) -> Images:
    """Draw the first ``n`` samples of one part of a noise stream.

    Args:
        n: How many, at most `PART`.
        shape: (channels, height, width) of one sample.
        seed: Non-negative seed of the run.
        index: Index of the image in its data set.
        stage: What the noise is for.
        part: Which part of the stream.
        device: On a CPU the numbers come from numpy's SFC64, elsewhere from the device's own
            generator: a seed fixes them on one kind of device.

    Returns:
        float32 tensor (n, channels, height, width) in channels-last memory order.

    Example:
        >>> standard_normal(
        ...     5, (3, 8, 8), seed=0, index=0, stage=Stage.VOTE, part=0
        ... ).shape
        torch.Size([5, 3, 8, 8])
    """
    channels, height, width = shape
    key = np.random.SeedSequence(seed, spawn_key=(index, stage, part))
    size = (height, width, channels)
    device = torch.device(device)
    if device.type == "cpu":
        normal = np.random.Generator(np.random.SFC64(key)).standard_normal
        noise = torch.from_numpy(normal((n, *size), dtype=np.float32))
    else:
        # Parallel generators fill other shapes in another order: draw the part whole.
        generator = torch.Generator(device).manual_seed(int(key.generate_state(1, np.uint64)[0]))
        noise = torch.randn((PART, *size), generator=generator, device=device)[:n]
    return noise.permute(0, 3, 1, 2)


def noise_batches(
    n: int,
    shape: Sequence[int],
    *,
    seed: int,
    index: int,
    stage: Stage,
    batch_size: int,
    device: torch.device | str = "cpu",
) -> Iterator[Images]:
    """Yield the first ``n`` samples of a noise stream in batches of ``batch_size``.

    Example:
        >>> key = {"seed": 0, "index": 0, "stage": Stage.VOTE}
        >>> [len(batch) for batch in noise_batches(150, (1, 8, 8), **key, batch_size=64)]
        [64, 64, 22]
    """
    pieces: list[Images] = []
    have = 0
    for part, start in enumerate(range(0, n, PART)):
        block = standard_normal(
            min(PART, n - start),
            shape,
            seed=seed,
            index=index,
            stage=stage,
            part=part,
            device=device,
        )
        while len(block):
            piece, block = block[: batch_size - have], block[batch_size - have :]
            pieces.append(piece)
            have += len(piece)
            if have == batch_size:
                yield pieces[0] if len(pieces) == 1 else torch.cat(pieces)
                pieces, have = [], 0
    if pieces:
        yield torch.cat(pieces)


@torch.no_grad()
def class_counts(
    base: Classifier,
    x: Image,
    n: int,
    *,
    sigma: float,
    seed: int,
    index: int,
    stage: Stage,
    batch_size: int = 64,
) -> dict[int, int]:
    """Count the classes that ``base`` returns for ``n`` noisy copies of one image.

    Memory does not grow with ``n``, and the counts do not depend on ``batch_size``.

    Args:
        base: Images to logits.
        x: The image, (channels, height, width), float32, on the device of the base classifier.
        n: Number of noisy copies.
        sigma: Standard deviation of the noise in image units.
        seed: Non-negative seed of the run.
        index: Index of the image in its data set; selects the noise stream.
        stage: Selects the noise stream.
        batch_size: Copies classified at once.

    Returns:
        Class -> votes, classes without votes left out.

    Raises:
        InputError: ``base`` does not return a row of logits for each image, or returns NaN.

    Example:
        >>> base = lambda x: torch.stack([x.mean((1, 2, 3)), 0.5 - x.mean((1, 2, 3))], dim=1)
        >>> class_counts(
        ...     base, torch.ones(1, 8, 8), 50, sigma=0.25, seed=0, index=0, stage=Stage.VOTE
        ... )
        {0: 50}
    """
    dtype = model_dtype(base)
    votes: torch.Tensor | None = None
    for noise in noise_batches(
        n, x.shape, seed=seed, index=index, stage=stage, batch_size=batch_size, device=x.device
    ):
        noisy = torch.add(x, noise, alpha=sigma).to(dtype)
        logits = checks.logits(base(noisy), len(noisy))
        batch_votes = torch.bincount(_decide(base, noisy, logits), minlength=logits.shape[1])
        votes = batch_votes if votes is None else votes + batch_votes
    assert votes is not None
    return {int(c): int(votes[c]) for c in votes.nonzero()}


def _decide(base: Classifier, noisy: Images, logits: torch.Tensor) -> Labels:
    """Return the class of each sample as a pass over that sample alone would.

    Only samples whose leading logits are within sqrt(machine epsilon) of each other, relative to
    the largest logit, take that second pass: 0.03% of the scale in float32, far above what
    the choice of kernels changes.
    """
    (first, second), label = logits.topk(2, dim=1).values.unbind(1), logits.argmax(1)
    scale = logits.abs().amax(1)
    clear = first - second > scale * torch.finfo(logits.dtype).eps ** 0.5
    if len(noisy) > 1:
        for i in (~clear).nonzero().flatten().tolist():
            label[i] = base(noisy[i : i + 1]).argmax(1)[0]
    return label


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
