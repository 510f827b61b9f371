"""One value forward, the gradient of another backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def straight_through(value: Tensor, stand_in: Tensor) -> Tensor:
    """Return ``value``, to the bit; gradients go to ``stand_in`` as if it had been returned.

    With the input as stand-in this is the straight-through estimator; with a differentiable
    approximation, backward pass differentiable approximation (Athalye et al., ICML 2018, section
    4.1). ``stand_in + (value - stand_in).detach()`` has the same gradient and rounds the value.

    Args:
        value: What is returned. No gradient flows into it.
        stand_in: Of the same shape.

    Example:
        >>> x = torch.tensor([0.2, 0.7], requires_grad=True)
        >>> y = straight_through(x.round(), x.square())
        >>> y.sum().backward()
        >>> y.tolist(), x.grad.tolist()
        ([0.0, 1.0], [0.4000000059604645, 1.399999976158142])
    """
    return _StraightThrough.apply(value, stand_in)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, stand_in: Tensor) -> Tensor:
        return value.detach().clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0]
