"""Gradient ascent within a ball of images: the steps of attacks and of adversarial training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from art_denoised.types import Images

Norm = Literal["linf", "l2"]


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
    gradient = gradient.nan_to_num()
    if norm == "linf":
        return project(torch.add(x_adv, gradient.sign(), alpha=step_size), x, eps, norm)
    # First by the largest entry, so that squares of small ones do not underflow.
    largest = gradient.abs().flatten(1).amax(1).reshape(-1, 1, 1, 1)
    gradient = gradient / largest.clamp_min(torch.finfo(gradient.dtype).tiny)
    direction = gradient / _length(gradient).clamp_min(1e-30)
    return project(torch.add(x_adv, direction, alpha=step_size), x, eps, norm)


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
    """Return the end of some steps of ascent, without bookkeeping: for training.

    Args:
        loss: Function from images to one value each, which is maximised.
        x: Centre of the ball.
        start: First point, in the ball.
        eps: Radius of the ball, image units.
        step_size: Length of a step, image units.
        steps: Number of steps.
        norm: Norm of ball and steps.

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
    """Put all modules into eval mode, and each back into its own mode.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm1d(2).eval(), nn.Dropout())
        >>> with in_eval(net):
        ...     inside = [m.training for m in net]
        >>> inside, [m.training for m in net]
        ([False, False], [False, True])
    """
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
