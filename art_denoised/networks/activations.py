"""Smooth activations, and ReLU with a smooth backward pass.

Source: Xie et al., "Smooth Adversarial Training" (2020, arXiv 2006.14536). SiLU, GELU, ELU, CELU
and Mish are torch's own. ELU is smooth (C1) only at alpha = 1, CELU always.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from art_denoised import checks
from art_denoised.checks import InputError

Step = Literal["attacker", "optimiser", "both"]
_LINEAR = 40.0  # beyond, exp(-t) is below the rounding of what it is added to


class ParametricSoftplus(nn.Module):
    """(1 / alpha) log(1 + exp(alpha x)): ReLU with a rounded corner (section 4.1).

    Args:
        alpha: Sharpness of the corner, fixed. The paper uses 10.

    Raises:
        InputError: alpha is not positive and finite.

    Example:
        >>> ParametricSoftplus(10.0)(torch.tensor([-1e30, 0.0, 1e30]))
        tensor([0.0000e+00, 6.9315e-02, 1.0000e+30])
    """

    def __init__(self, alpha: float = 10.0) -> None:
        super().__init__()
        self.alpha = checks.positive("alpha", alpha)

    def forward(self, x: Tensor) -> Tensor:
        """Return the activations, in the shape and dtype of ``x``."""
        return F.softplus(x, beta=self.alpha, threshold=_LINEAR)

    def extra_repr(self) -> str:
        """Return the options that ``print`` shows."""
        return f"alpha={self.alpha}"


class SmoothReLU(nn.Module):
    """x - (1 / alpha) log(alpha x + 1) for x >= 0, and 0 below (section 5.1).

    alpha is the square of a learnt ``root``, as in the release, so it stays positive. Half
    precision is computed in float32.

    Args:
        alpha: Initial value of alpha. The release uses 400, a root of 20.
        learnable: Whether ``root`` is a parameter; otherwise it is a buffer.

    Raises:
        InputError: alpha is not positive and finite.

    Example:
        >>> SmoothReLU(alpha=1.0)(torch.tensor([-3.0, 0.0, 1.0])).detach()
        tensor([0.0000, 0.0000, 0.3069])
        >>> SmoothReLU().root
        Parameter containing:
        tensor(20., requires_grad=True)
    """

    root: Tensor

    def __init__(self, alpha: float = 400.0, *, learnable: bool = True) -> None:
        super().__init__()
        self.started = checks.positive("alpha", alpha)
        root = torch.tensor(math.sqrt(self.started))
        if learnable:
            self.root = nn.Parameter(root)
        else:
            self.register_buffer("root", root)

    def reset_parameters(self) -> None:
        """Set alpha to its initial value."""
        nn.init.constant_(self.root, math.sqrt(self.started))

    def forward(self, x: Tensor) -> Tensor:
        """Return the activations, in the shape and dtype of ``x``."""
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        alpha = self.root.to(wide.dtype).square()
        positive = wide.clamp_min(0)
        scaled = (alpha * positive).clamp_max(torch.finfo(wide.dtype).max)  # it may overflow
        return (positive - scaled.log1p() / alpha).to(x.dtype)

    def extra_repr(self) -> str:
        """Return the options of the constructor, which training does not change."""
        return f"alpha={self.started}, learnable={isinstance(self.root, nn.Parameter)}"


class SplitReLU(nn.Module):
    """ReLU in the forward pass; in the backward pass the derivative of a smooth function.

    The study of section 3: better gradients for the attacker, the optimiser or both, without a
    change of the function. A step belongs to the attacker inside ``with attacking(model):``, and
    outside of it to the optimiser in training mode. In eval mode it has the gradient of ReLU, so
    attacks that evaluate networks can be compared. Copies are never `attacking`.

    Args:
        smooth: Function whose derivative is taken. The default, as in the paper, is
            `ParametricSoftplus` (10).
        smooth_in: "attacker", "optimiser" or "both": steps that take the smooth derivative.

    Raises:
        InputError: Another ``smooth_in``, or a smooth function with parameters. These would not
            learn, because the forward pass does not depend on them.

    Example:
        >>> split = SplitReLU(smooth_in="attacker")
        >>> x = torch.tensor([-0.1, 0.1], requires_grad=True)
        >>> torch.autograd.grad(split(x).sum(), x)[0]
        tensor([0., 1.])
        >>> with attacking(split):
        ...     torch.autograd.grad(split(x).sum(), x)[0]
        tensor([0.2689, 0.7311])
    """

    def __init__(self, smooth: nn.Module | None = None, *, smooth_in: Step = "both") -> None:
        super().__init__()
        checks.choice("smooth_in", smooth_in, get_args(Step))
        self.smooth = ParametricSoftplus() if smooth is None else smooth
        if any(p.requires_grad for p in self.smooth.parameters()):
            raise InputError(
                f"{type(smooth).__name__} learns, and the forward pass of SplitReLU does not "
                "depend on it; give one without parameters, such as SmoothReLU(learnable=False)"
            )
        self.smooth_in = smooth_in
        self.attacking = False

    def forward(self, x: Tensor) -> Tensor:
        """Return ReLU(x), with the gradient of the current step."""
        step = "attacker" if self.attacking else "optimiser" if self.training else "evaluation"
        smooth = self.smooth_in == step or (self.smooth_in == "both" and step != "evaluation")
        if not (smooth and torch.is_grad_enabled()):
            return F.relu(x)
        s = self.smooth(x)
        # s + (relu(x) - s).detach() in another order, which adds an exact 0 in the forward pass.
        return F.relu(x).detach() + (s - s.detach())

    def extra_repr(self) -> str:
        """Return the options that ``print`` shows."""
        return f"smooth_in={self.smooth_in!r}"

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy: `attacking` would never end for one made inside it."""
        return {**self.__dict__, "attacking": False}


@contextmanager
def attacking(model: nn.Module) -> Iterator[None]:
    """Mark the steps inside as the attacker's, for every `SplitReLU` of the model.

    Threads that share a model share the mark. A program made by `torch.export` keeps the step that
    it was exported in.

    Example:
        >>> model = nn.Sequential(SplitReLU())
        >>> with attacking(model):
        ...     model[0].attacking
        True
        >>> model[0].attacking
        False
    """
    before = [(m, m.attacking) for m in model.modules() if isinstance(m, SplitReLU)]
    try:
        for module, _ in before:
            module.attacking = True
        yield
    finally:
        for module, was in before:
            module.attacking = was
