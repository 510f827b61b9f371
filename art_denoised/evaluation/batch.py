"""One batch under one attack: what becomes of its images, and the rows that say so."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from art_denoised.attacks.suites import distances
from art_denoised.evaluation.attack_rows import AttackRow, ImageRow
from art_denoised.evaluation.columns import Column, verified
from art_denoised.evaluation.target import Target
from art_denoised.types import Images, Labels


@dataclass(frozen=True)
class Batch:
    """Images that are attacked together, with random numbers of their own.

    Attributes:
        indices: Indices of the images in the data set.
        x: Images.
        y: True classes.
        seed: Seed of all that is drawn for them.
    """

    indices: Sequence[int]
    x: Images
    y: Labels
    seed: int


class Found(NamedTuple):
    """What became of a batch.

    Attributes:
        x_adv: Images after the attack.
        clean: Whether each was right without attack, (batch,).
        counted: Whether each was right by the attack's own count, (batch,).
        right: Whether each was right in the later evaluations, (repeats, batch).
        flags: Warnings of the attack about the model.
    """

    x_adv: Images
    clean: Tensor
    counted: Tensor
    right: Tensor
    flags: tuple[str, ...] = ()


def unattacked(target: Target, batch: Batch) -> Found:
    """Evaluate images without attack.

    Raises:
        InputError: A model that seemed deterministic is randomised, or the model failed.
    """
    if target.randomised:
        right = target.right(batch.x, batch.y, batch.seed)
    else:
        right = target.steady(batch.x, batch.y, batch.seed, batch.indices)
    return Found(batch.x, right.any(0), right[0], right)


def attacked(target: Target, column: Column, batch: Batch, clean: Tensor) -> Found:
    """Attack those images that are right without attack, and evaluate them again.

    Raises:
        InputError: The model or the attack failed, or returned what it may not.
    """
    x_adv, counted = batch.x.clone(), torch.zeros(len(clean), dtype=torch.bool)
    right = torch.zeros(target.repeats, len(clean), dtype=torch.bool)
    if not bool(clean.any()):
        return Found(x_adv, clean, counted, right)
    mine = clean.to(batch.x.device)
    x, y = batch.x[mine], batch.y[mine]
    found = target.attempt(column.attack, column.gradient, x, y, batch.seed)
    numbers = [index for index, ever in zip(batch.indices, clean.tolist(), strict=True) if ever]
    x_adv[mine] = verified(column, numbers, x, found.x_adv)
    right[:, clean] = later = target.right(x_adv[mine], y, batch.seed + 1)
    if found.counted is not None:
        counted[clean] = found.counted.cpu()
    elif target.randomised:  # a draw of its own, which no later evaluation shares
        counted[clean] = target.right(x_adv[mine], y, batch.seed + 2, repeats=1)[0]
    else:
        counted[clean] = later[0]
    return Found(x_adv, clean, counted, right, found.flags)


def rows(column: Column, batch: Batch, found: Found, seconds: float) -> list[AttackRow]:
    """Return one row for each image; the time is divided over those that were attacked."""
    attack, gradient, eps = column.key
    far = distances(batch.x, found.x_adv)
    each = round(seconds / max(int(found.clean.sum()), 1), 6)
    return [
        AttackRow(
            index=index,
            label=int(batch.y[i]),
            attack=attack,
            gradient=gradient,
            norm=column.attack.norm,
            eps=eps,
            clean=clean,
            counted=clean and bool(found.counted[i]),
            fresh=tuple(clean and right for right in found.right[:, i].tolist()),
            distance_linf=float(far["linf"][i]),
            distance_l2=float(far["l2"][i]),
            seconds=each if clean else 0.0,
        )
        for i, (index, clean) in enumerate(zip(batch.indices, found.clean.tolist(), strict=True))
    ]


def pictures(
    target: Target, column: Column, batch: Batch, found: Found, wanted: Collection[int]
) -> Iterator[ImageRow]:
    """Yield pictures of the wanted images, before and after the defence's purification."""
    attack, gradient, eps = column.key
    stages = ("attacked", "attacked and denoised") if eps else ("clean", "denoised")
    for i, index in enumerate(batch.indices):
        x = found.x_adv[i : i + 1]
        for stage in stages if index in wanted else ():
            image = target.denoised(x) if stage.endswith("denoised") else x
            if image is not None:
                pixels = image[0].detach().cpu()
                yield ImageRow.of(
                    pixels, index=index, attack=attack, gradient=gradient, eps=eps, stage=stage
                )
