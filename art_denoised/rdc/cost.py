"""The cost of a prediction and its gradient before a run: evaluations, FLOP and memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.diffusion.levels import Levels
from art_denoised.rdc.classifier import DiffusionClassifier, LevelNoise
from art_denoised.rdc.likelihood import RDC, LikelihoodMaximization, Momentum, State

if TYPE_CHECKING:
    from art_denoised.types import Images

_Parts = tuple[int, float, float, int]  # NFE, FLOP, FLOP with gradient, and memory of a part
_TEMPORARIES = 1.5  # memory of a gradient over what autograd keeps for it: 1.35 to 1.5 measured


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
        images = "1 image" if self.images == 1 else f"{self.images:,} images"
        return (
            f"{images}: {self.nfe:,} network evaluations, {_si(self.flop)}FLOP, "
            f"{_si(self.gradient_flop)}FLOP with gradient, about {self.memory / 2**20:,.0f} MiB "
            "at once"
        )


def preview_cost(
    defence: nn.Module, shape: tuple[int, int, int], *, images: int = 1, batch: int | None = None
) -> Cost:
    """Return the cost of a defence. It evaluates the network once, with its gradients.

    Args:
        defence: `DiffusionClassifier`, `LikelihoodMaximization`, `RDC`, or an nn.Sequential of
            them.
        shape: (channels, height, width) of an image.
        images: Number of images in the run.
        batch: Number of images at once, for the memory of likelihood maximization; None: all. The
            memory of the diffusion classifier is bounded by its ``max_batch``.

    Raises:
        InputError: The module is another one, or the network does not take such images.

    Example:
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
    costs = []
    for stage in _stages(defence):
        x = x.to(next((p for p in stage.parameters()), x))
        if isinstance(stage, DiffusionClassifier):
            costs.append(_classifier(stage, x, images))
        elif isinstance(stage, LikelihoodMaximization):
            costs.append(_likelihood(stage, x, images, batch))
        else:
            raise InputError(
                f"the cost of a {type(stage).__name__} is not known; give DiffusionClassifier, "
                "LikelihoodMaximization, RDC or a Sequential of them"
            )
    nfe, flop, gradient_flop, memory = zip(*costs, strict=True)
    return Cost(images, sum(nfe), sum(flop), sum(gradient_flop), max(memory))


def _stages(defence: nn.Module) -> list[nn.Module]:
    if isinstance(defence, (nn.Sequential, RDC)):
        return [stage for part in defence.children() for stage in _stages(part)]
    return [defence]


def _classifier(stage: DiffusionClassifier, x: Images, images: int) -> _Parts:
    nfe = stage.nfe(images)

    def evaluate(x: Images) -> Tensor:
        zero = torch.zeros(1, dtype=torch.long, device=x.device)
        return stage.errors(x, (zero, zero, zero), LevelNoise(0))

    forward, both = _flop(evaluate, x)
    saved = _saved(lambda: evaluate(x.detach().requires_grad_()), stage)
    gradient = both + forward if stage.recompute else both
    memory = _weights(stage) + saved * min(stage.max_batch, nfe)
    return nfe, forward * nfe, gradient * nfe, memory


def _likelihood(stage: LikelihoodMaximization, x: Images, images: int, batch: int) -> _Parts:
    form = stage.form
    if isinstance(form, Momentum):  # its levels are evaluated one after another
        form = Momentum(Levels(form.levels.sigmas[:1], form.levels.weights[:1]))
    one = LikelihoodMaximization(
        stage.model, steps=1, form=form, gradient=stage.gradient, seed=0, bf16=stage.bf16
    )
    exact, nfe = stage.gradient == "exact", stage.nfe(images)
    forward, both = _flop(one, x)
    zero = torch.zeros_like(x)

    def step() -> object:
        leaf = x.detach().requires_grad_()
        return one.step(leaf, State(leaf, zero, zero), 0, LevelNoise(0), exact)

    states = 3 * x.numel() * x.element_size() * (stage.steps if exact else 1)
    memory = _weights(stage) + (_saved(step, stage) + states) * batch
    return nfe, forward * nfe, both * nfe, memory


def _flop(function: Callable[[Tensor], Tensor], x: Images) -> tuple[float, float]:
    """Operations of a call, and of a call with its gradient in ``x``."""
    try:
        with torch.no_grad(), FlopCounter() as forward:
            function(x)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"the network failed on an image of shape {tuple(x.shape[1:])} ({reason}); give the "
            "shape it was made for"
        ) from error
    with torch.enable_grad(), FlopCounter() as both:
        leaf = x.detach().requires_grad_()
        torch.autograd.grad(function(leaf).sum(), leaf)
    return forward.flop, both.flop


class FlopCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations by torch's own table; its FlopCounterMode fails on second derivatives."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flop = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flop += count(*args, **kwargs, out_val=result)
        return result


def _saved(function: Callable[[], object], stage: nn.Module) -> int:
    """Bytes that autograd keeps during a call, weights aside."""
    weights = {p.untyped_storage().data_ptr() for p in stage.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # held, because a freed address is used again

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.enable_grad(), saved_tensors_hooks(keep, lambda tensor: tensor):
        result = function()
    del result
    return int(_TEMPORARIES * sum(storage.nbytes() for storage in kept.values()))


def _weights(stage: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in stage.parameters())


def _si(number: float) -> str:
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.3g} {prefix}"
    return f"{number:.0f} "
