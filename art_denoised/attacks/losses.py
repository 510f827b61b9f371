"""Losses that attacks maximise: one number per image, larger the more wrong the classifier is.

With ``target`` they are larger the closer the classifier is to answering ``target``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from art_denoised.checks import InputError

if TYPE_CHECKING:
    from art_denoised.types import Labels, Logits

LossName = Literal["ce", "margin", "dlr"]
Loss = Callable[["Logits", "Labels", "Labels | None"], Tensor]


def cross_entropy(logits: Logits, y: Labels, target: Labels | None = None) -> Tensor:
    """Cross-entropy to ``y``, or the negative of that to ``target``.

    Example:
        >>> cross_entropy(torch.zeros(1, 2), torch.tensor([0]))
        tensor([0.6931])
    """
    if target is None:
        return F.cross_entropy(logits, y, reduction="none")
    return -F.cross_entropy(logits, target, reduction="none")


def margin(logits: Logits, y: Labels, target: Labels | None = None) -> Tensor:
    """Difference between the best wrong logit, or the target's, and the logit of ``y``.

    It does not saturate, unlike cross-entropy (Carlini & Wagner 2017, f_6).

    Example:
        >>> margin(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0]))
        tensor([-1.])
    """
    right = logits.gather(1, y[:, None])[:, 0]
    if target is not None:
        return logits.gather(1, target[:, None])[:, 0] - right
    wrong = logits.scatter(1, y[:, None], -torch.inf).amax(1)
    return wrong - right


def dlr(logits: Logits, y: Labels, target: Labels | None = None) -> Tensor:
    """Difference of logits ratio: the margin, independent of the scale of the logits.

    (max_{i != y} z_i - z_y) / (z_pi1 - z_pi3), or with a target (z_t - z_y) / (z_pi1 - (z_pi3 +
    z_pi4) / 2); pi orders the logits (Croce & Hein, ICML 2020, equations 6 and 7).

    Raises:
        InputError: There are fewer than three classes, with a target four.

    Example:
        >>> dlr(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0]))
        tensor([-0.5000])
    """
    needed = 3 if target is None else 4
    if logits.shape[1] < needed:
        raise InputError(
            f"the model has {logits.shape[1]} classes and this DLR loss needs {needed}; "
            "use the margin loss"
        )
    top = logits.topk(needed, dim=1).values
    low = top[:, 2] if target is None else (top[:, 2] + top[:, 3]) / 2
    # Equal logits: no scale, and a margin of 0 unless the target is far behind.
    return margin(logits, y, target) / (top[:, 0] - low).clamp_min(1e-12)


LOSSES: dict[str, Loss] = {"ce": cross_entropy, "margin": margin, "dlr": dlr}
