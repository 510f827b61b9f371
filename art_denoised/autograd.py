"""How functions appear to autograd, to tracers and to the compiler."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


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


def is_traced() -> bool:
    """Whether calls are recorded, by ``torch.jit.trace``, ``torch.export`` or ``make_fx``."""
    is_exporting = getattr(torch.compiler, "is_exporting", bool)  # since torch 2.7
    if torch.jit.is_tracing() or is_exporting():  # type: ignore[attr-defined, no-untyped-call]
        return True
    if torch.compiler.is_compiling():  # which leaves our noise alone, and cannot see what follows
        return False
    fx = sys.modules.get("torch.fx.experimental.proxy_tensor")  # slow to import, if nobody has
    return fx is not None and fx.get_proxy_mode() is not None


def uncompiled(function: Callable[P, T]) -> Callable[P, T]:
    """Keep a function out of compiled graphs, as ``torch.compiler.disable`` does.

    That decorator imports the compiler where a function is defined, which takes seconds. This one
    leaves it until something is compiled.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)  # type: ignore[no-untyped-call]
        return function(*args, **kwargs)

    return run
