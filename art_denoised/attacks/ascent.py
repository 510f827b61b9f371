"""Gradient ascent within a ball of images: the ball, the losses that are climbed, and the steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from art_denoised.checks import InputError

if TYPE_CHECKING:
    from art_denoised.types import Images, Labels, Logits

Norm = Literal["linf", "l2"]
NORMS: tuple[str, ...] = get_args(Norm)
LossName = Literal["ce", "margin", "dlr"]
Loss = Callable[["Logits", "Labels", "Labels | None"], Tensor]


def project(x_adv: Images, x: Images, eps: float, norm: Norm = "linf") -> Images:
    """Project ``x_adv`` to the images within ``eps`` of ``x`` and in [0, 1].

    For l_inf this is the nearest image. For l2 it is projected onto the ball and then clipped to
    [0, 1], which stays in the ball because ``x`` is in [0, 1]. Both hold up to the rounding of one
    addition.

    Example:
        >>> x = torch.full((1, 1, 1, 2), 0.9)
        >>> project(x + 0.5, x, 0.2), project(x - 3, x, 0.5, "l2").norm().round(decimals=4)
        (tensor([[[[1., 1.]]]]), tensor(0.7728))
    """
    if norm == "linf":
        return torch.maximum(torch.minimum(x_adv, x + eps), x - eps).clamp_(0, 1)
    offset = x_adv - x
    factor = (eps / _length(offset).clamp_min(1e-30)).clamp_max_(1)
    return (x + offset * factor).clamp_(0, 1)


def random_point(
    x: Images,
    eps: float,
    norm: Norm = "linf",
    generator: torch.Generator | None = None,
    *,
    clip: bool = True,
) -> Images:
    """Return points drawn uniformly from the balls about ``x``, clipped to [0, 1].

    Args:
        x: Images.
        eps: Radius of the ball.
        norm: Norm of the ball.
        generator: Generator on the device of ``x``; None: torch's global random state.
        clip: Whether points are clipped to [0, 1].

    Example:
        >>> x = torch.rand(2, 3, 8, 8)
        >>> bool((random_point(x, 0.1) - x).abs().max() <= 0.1 + 1e-7)
        True
    """
    like: dict[str, Any] = {"device": x.device, "dtype": x.dtype, "generator": generator}
    if norm == "linf":
        point = x + eps * (2 * torch.rand(x.shape, **like) - 1)
    else:
        normal = torch.randn(x.shape, **like)
        radius = torch.rand((len(x), 1, 1, 1), **like) ** (1 / x[0].numel())
        point = x + eps * radius * normal / _length(normal)
    return project(point, x, eps, norm) if clip else point


def within(x: Images, x_adv: Images, norm: str, eps: float) -> Tensor:
    """Return whether each image lies in its ball, up to rounding: eps (1 + 1e-4) + 1e-6."""
    return distances(x, x_adv)[norm] <= eps * (1 + 1e-4) + 1e-6


def distances(x: Images, x_adv: Images) -> dict[str, Tensor]:
    """Return the length of each change, in either norm.

    Example:
        >>> distances(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2))
        {'linf': tensor([1.]), 'l2': tensor([2.])}
    """
    change = (x_adv - x).flatten(1)
    return {"linf": change.abs().amax(1), "l2": change.norm(dim=1)}


def cross_entropy(logits: Logits, y: Labels, target: Labels | None = None) -> Tensor:
    """Cross-entropy to ``y``, or the negative of that to ``target``."""
    if target is None:
        return F.cross_entropy(logits, y, reduction="none")
    return -F.cross_entropy(logits, target, reduction="none")


def margin(logits: Logits, y: Labels, target: Labels | None = None) -> Tensor:
    """Difference between the best wrong logit, or the target's, and the logit of ``y``.

    It does not saturate, unlike cross-entropy (Carlini & Wagner 2017, f_6).
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


# One number per image, larger the more wrong the classifier is, or the nearer to the target.
LOSSES: dict[str, Loss] = {"ce": cross_entropy, "margin": margin, "dlr": dlr}
"""Losses of `PGD` by name."""


def ascend(
    x_adv: Images, gradient: Images, x: Images, *, eps: float, step_size: float, norm: Norm
) -> Images:
    """Take one step of projected steepest ascent: along the sign (l_inf) or the direction (l2).

    A gradient that is zero or NaN moves nothing.

    Example:
        >>> x = torch.full((1, 1, 1, 2), 0.5)
        >>> gradient = torch.tensor([3e-30, -4e-30]).reshape(x.shape)
        >>> ascend(x, gradient, x, eps=1, step_size=0.1, norm="l2")
        tensor([[[[0.5600, 0.4200]]]])
    """
    step = direction(gradient.nan_to_num(), norm)
    return project(torch.add(x_adv, step, alpha=step_size), x, eps, norm)


def direction(gradient: Images, norm: str) -> Images:
    """Return the change of length 1 that a linear function with this gradient grows most along."""
    if norm == "linf":
        return gradient.sign()
    # First by the largest entry, so that squares of small ones do not underflow.
    largest = gradient.abs().flatten(1).amax(1).reshape(-1, 1, 1, 1)
    gradient = gradient / largest.clamp_min(torch.finfo(gradient.dtype).tiny)
    return gradient / _length(gradient).clamp_min(1e-30)


def perturb(
    loss: Callable[[Images], Tensor],
    x: Images,
    start: Images,
    *,
    eps: float,
    step_size: float,
    steps: int,
    norm: Norm = "linf",
) -> Images:
    """Return the end of some steps of ascent from ``start``, without bookkeeping: for training.

    Example:
        >>> x = torch.full((1, 1, 2, 2), 0.5)
        >>> perturb(lambda x: x.flatten(1).sum(1), x, x, eps=0.25, step_size=0.125, steps=3)
        tensor([[[[0.7500, 0.7500],
                  [0.7500, 0.7500]]]])
    """
    x, x_adv = x.detach(), start.detach()
    with torch.enable_grad():
        for _ in range(steps):
            leaf = x_adv.detach().requires_grad_()
            # In the images alone: weights take part in no gradient and accumulate none.
            (gradient,) = torch.autograd.grad(loss(leaf).sum(), leaf)
            x_adv = ascend(x_adv, gradient, x, eps=eps, step_size=step_size, norm=norm)
    return x_adv


@contextmanager
def in_eval(model: nn.Module) -> Iterator[nn.Module]:
    """Put all modules into eval mode, and each back into its own mode."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield model
    finally:
        for module in training:
            module.training = True


def _length(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.flatten(1), dim=1).reshape(-1, 1, 1, 1)
