"""The cost of a prediction and its gradient before a run: evaluations, FLOP and memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.checks.values import counted, memory, operations
from art_denoised.models.cost import FlopCounter

if TYPE_CHECKING:
    from art_denoised.types import Images


@dataclass(frozen=True, slots=True)
class Part:
    """The cost of a part of a defence; the fields are those of `Cost`."""

    nfe: int
    flop: float
    gradient_flop: float
    memory: int

    def then(self, other: Part) -> Part:
        """Return the cost of this part and another one after it."""
        return Part(
            self.nfe + other.nfe,
            self.flop + other.flop,
            self.gradient_flop + other.gradient_flop,
            max(self.memory, other.memory),
        )


@runtime_checkable
class Priced(Protocol):
    """A module that knows its cost."""

    def part(self, x: Images, images: int, batch: int) -> Part:
        """Return the cost on so many images; ``x`` is one of them, ``batch`` are held at once."""
        ...


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of a defence on some images.

    Attributes:
        images: Number of images.
        nfe: Number of network evaluations of a prediction of them.
        flop: Floating-point operations of the prediction, two for a multiplication and addition;
            convolutions and matrix products are counted.
        gradient_flop: Operations of the prediction and its gradient, for a loss that involves every
            class: a step of PGD.
        memory: Estimate of the bytes held at once for a gradient: weights, what autograd keeps of
            the largest batch, and half as much again for temporaries.
    """

    images: int
    nfe: int
    flop: float
    gradient_flop: float
    memory: int

    def __str__(self) -> str:
        """Return it in words, for the terminal."""
        return (
            f"{counted(self.images, 'image')}: {self.nfe:,} network evaluations, "
            f"{operations(self.flop)}, {operations(self.gradient_flop)} with gradient, "
            f"{memory(self.memory)}"
        )


def preview_cost(
    defence: nn.Module, shape: tuple[int, int, int], *, images: int = 1, batch: int | None = None
) -> Cost:
    """Return the cost of a defence. It evaluates the network once, with its gradients.

    Args:
        defence: `DiffusionClassifier`, `LikelihoodMaximization`, `RDC`, `Purification`,
            `PurifiedClassifier`, or an nn.Sequential of them.
        shape: (channels, height, width) of an image.
        images: Number of images in the run.
        batch: Number of images at once, for the memory of likelihood maximization and
            purification; None: all. The memory of the diffusion classifier is bounded by its
            ``max_batch``.

    Raises:
        InputError: The module is another one, or the network does not take such images.

    Example:
        >>> from art_denoised import DiffusionClassifier
        >>> from art_denoised.demo import digits_diffusion
        >>> classifier = DiffusionClassifier(digits_diffusion(), seed=0)
        >>> cost = preview_cost(classifier, (1, 8, 8), images=100)
        >>> cost.nfe == 100 * 10 * 32
        True
        >>> print(cost)  # doctest: +ELLIPSIS
        100 images: 32,000 network evaluations, 57.1 GFLOP, 150 GFLOP with gradient, about ...
    """
    images = checks.count("images", images)
    batch = min(images, images if batch is None else checks.count("batch", batch))
    x = torch.full((1, *shape), 0.5)
    found = reduce(
        Part.then, (stage.part(on(stage, x), images, batch) for stage in _stages(defence))
    )
    return Cost(images, found.nfe, found.flop, found.gradient_flop, found.memory)


def _stages(defence: nn.Module) -> list[Any]:
    if isinstance(defence, Priced):
        return [defence]
    if isinstance(defence, nn.Sequential) and len(defence):
        return [stage for one in defence for stage in _stages(one)]
    raise InputError(
        f"the cost of a {type(defence).__name__} is not known; give DiffusionClassifier, "
        "LikelihoodMaximization, RDC, Purification, PurifiedClassifier or a Sequential of them"
    )


def on(stage: nn.Module, x: Images) -> Images:
    """Return images in the dtype and on the device of a module's weights."""
    return x.to(next((p for p in stage.parameters()), x))


def flop(function: Callable[[Tensor], Tensor], x: Images) -> tuple[float, float]:
    """Operations of a call, and of a call with its gradient in ``x``."""
    try:
        with torch.no_grad(), FlopCounter() as forward:
            function(x)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise InputError(
            f"the network failed on an image of shape {tuple(x.shape[1:])} "
            f"({checks.one_line(error)}); give the shape it was made for"
        ) from error
    with torch.enable_grad(), FlopCounter() as both:
        leaf = x.detach().requires_grad_()
        torch.autograd.grad(function(leaf).sum(), leaf)
    return forward.flop, both.flop
