"""One value in the forward pass, the gradient of another in the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def straight_through(value: Tensor, stand_in: Tensor) -> Tensor:
    """Return ``value`` to the bit; its gradient goes to ``stand_in``, of the same shape.

    With the input as stand-in this is the straight-through estimator; with a differentiable
    approximation it is BPDA (Athalye et al., ICML 2018, section 4.1). The usual expression
    ``stand_in + (value - stand_in).detach()`` has the same gradient, but rounds the value.

    Args:
        value: Tensor that is returned. No gradient flows into it.
        stand_in: Tensor that gets the gradient as if it had been returned.

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
