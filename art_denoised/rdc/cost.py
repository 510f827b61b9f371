"""What a prediction and its gradient will cost, before a run: passes, FLOP and memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.diffusion.weights import Levels
from art_denoised.rdc.classifier import DiffusionClassifier
from art_denoised.rdc.likelihood import LikelihoodMaximization, _State
from art_denoised.rdc.noise import LevelNoise

if TYPE_CHECKING:
    from art_denoised.types import Images


_TEMPORARIES = 1.5  # what a gradient takes, by what autograd keeps for it: 1.35 to 1.5 measured


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of a defence on some images.

    Attributes:
        images: How many.
        evaluations: Passes of the network that a prediction of them takes; at most, where classes
            are eliminated.
        least: Passes that it takes at least: all of them, but for elimination.
        flop: Floating-point operations of the prediction: two for a multiplication and addition;
            convolutions and matrix products are counted.
        gradient_flop: Of the prediction and its gradient, for a loss that involves every class; a
            step of PGD. 0 where there is no gradient.
        memory: Estimate of the bytes held at once for a gradient: weights, what autograd keeps of
            the largest batch, and half as much again for temporaries.
    """

    images: int
    evaluations: int
    least: int
    flop: float
    gradient_flop: float
    memory: int

    def __str__(self) -> str:
        """Return it in words, for the terminal."""
        at_least = f"{self.least:,} to " if self.least < self.evaluations else ""
        gradient = f", {_si(self.gradient_flop)}FLOP with gradient" if self.gradient_flop else ""
        images = "1 image" if self.images == 1 else f"{self.images:,} images"
        return (
            f"{images}: {at_least}{self.evaluations:,} passes of the network, "
            f"{_si(self.flop)}FLOP{gradient}, about {self.memory / 2**20:,.0f} MiB at once"
        )


def preview_cost(
    defence: nn.Module, shape: tuple[int, int, int], *, images: int = 1, batch: int | None = None
) -> Cost:
    """Count what a defence will take. It runs a single pass of the network, with its gradients.

    Args:
        defence: `DiffusionClassifier`, `LikelihoodMaximization`, or both in an nn.Sequential.
        shape: (channels, height, width) of an image.
        images: Images of the run.
        batch: Of them at once, for the memory of likelihood maximization; None: all. The memory of
            the diffusion classifier is bounded by its ``max_batch`` whatever the images.

    Raises:
        InputError: Another module, or images that the network does not take.

    Example:
        >>> from art_denoised.demo import digits_diffusion
        >>> classifier = DiffusionClassifier(digits_diffusion(), seed=0)
        >>> cost = preview_cost(classifier, (1, 8, 8), images=100)
        >>> cost.evaluations == 100 * 10 * 32
        True
        >>> print(cost)  # doctest: +ELLIPSIS
        100 images: 32,000 passes of the network, 57.1 GFLOP, 150 GFLOP with gradient, about ...
    """
    images = checks.count("images", images)
    batch = min(images, images if batch is None else checks.count("batch", batch))
    x = torch.full((1, *shape), 0.5)
    stages = list(defence) if isinstance(defence, nn.Sequential) else [defence]
    costs = []
    for stage in stages:
        x = x.to(next((p for p in stage.parameters()), x))
        if isinstance(stage, DiffusionClassifier):
            costs.append(_classifier(stage, x, images))
        elif isinstance(stage, LikelihoodMaximization):
            costs.append(_likelihood(stage, x, images, batch))
        else:
            raise InputError(
                f"the cost of a {type(stage).__name__} is not known; give DiffusionClassifier, "
                "LikelihoodMaximization or a Sequential of them"
            )
    return Cost(
        images=images,
        evaluations=sum(c.evaluations for c in costs),
        least=sum(c.least for c in costs),
        flop=sum(c.flop for c in costs),
        gradient_flop=sum(c.gradient_flop for c in costs),
        memory=max(c.memory for c in costs),
    )


def preview_anytime(
    classifier: DiffusionClassifier,
    shape: tuple[int, int, int],
    *,
    images: int = 1,
    first: int = 4,
    budget: int | None = None,
) -> Cost:
    """Bound what `predict_anytime` will take: how many classes it can drop depends on the images.

    Args:
        classifier: As for `predict_anytime`.
        shape: (channels, height, width) of an image.
        images: Images of the run.
        first: As for `predict_anytime`.
        budget: As for `predict_anytime`.

    Example:
        >>> from art_denoised.demo import digits_diffusion
        >>> cost = preview_anytime(DiffusionClassifier(digits_diffusion()), (1, 8, 8), images=10)
        >>> cost.least, cost.evaluations
        (400, 3200)
    """
    whole = preview_cost(classifier, shape, images=images)
    most = whole.evaluations if budget is None else checks.count("budget", budget, 0)
    most = min(most, whole.evaluations)
    looked = min(max(checks.count("first", first), 2), len(classifier.levels.sigmas))
    return Cost(
        images=whole.images,
        evaluations=most,
        least=min(most, whole.images * classifier.classes * looked),
        flop=whole.flop * most / whole.evaluations,
        gradient_flop=0.0,
        memory=whole.memory,
    )


def largest_batch(
    classifier: DiffusionClassifier, shape: tuple[int, int, int], memory: float
) -> int:
    """Return the ``max_batch`` with which a gradient keeps to a budget of memory, estimated.

    Args:
        classifier: Whose ``max_batch`` is to be chosen.
        shape: (channels, height, width) of an image.
        memory: Bytes for weights and all.

    Raises:
        InputError: Not even one pass fits.

    Example:
        >>> from art_denoised.demo import digits_diffusion
        >>> classifier = DiffusionClassifier(digits_diffusion())
        >>> classifier.max_batch = largest_batch(classifier, (1, 8, 8), 100 * 2**20)
        >>> 1000 < classifier.max_batch < 10000
        True
    """
    x = torch.full((1, *shape), 0.5).to(next((p for p in classifier.parameters()), torch.ones(1)))
    weights, one = _weights(classifier), _bytes_of_pass(classifier, x)
    if weights + one > checks.positive("memory", memory):
        raise InputError(
            f"memory is {memory:,.0f} bytes, but a single pass takes {weights + one:,}; give more"
        )
    return int((memory - weights) // one)


def _bytes_of_pass(classifier: DiffusionClassifier, x: Images) -> int:
    return _saved(lambda: _pass(classifier, x.detach().requires_grad_()), classifier)


def _pass(classifier: DiffusionClassifier, x: Images) -> Tensor:
    zero = torch.zeros(1, dtype=torch.long, device=x.device)
    return classifier._errors(x, torch.zeros_like(x), zero, zero)


def _classifier(stage: DiffusionClassifier, x: Images, images: int) -> Cost:
    evaluations = stage.evaluations(images)
    forward, both = _flop(partial(_pass, stage), x)
    return Cost(
        images=images,
        evaluations=evaluations,
        least=evaluations,
        flop=forward * evaluations,
        gradient_flop=(both + forward if stage.recompute else both) * evaluations,
        memory=_weights(stage) + _bytes_of_pass(stage, x) * min(stage.max_batch, evaluations),
    )


def _likelihood(stage: LikelihoodMaximization, x: Images, images: int, batch: int) -> Cost:
    levels = 1 if stage.form == "adam" else len(stage.levels.sigmas)
    exact = stage.gradient == "exact"
    one = LikelihoodMaximization(
        stage.model,
        steps=1,
        form=stage.form,
        gradient=stage.gradient,
        levels=Levels(stage.levels.sigmas[:1], stage.levels.weights[:1]),
        seed=0,
    )
    forward, both = _flop(one, x)

    def one_step() -> object:
        leaf = x.detach().requires_grad_()
        start = _State(leaf, torch.zeros_like(x), torch.zeros_like(x))
        return one._step(leaf, start, 0, LevelNoise(0), exact)

    saved = _saved(one_step, stage)
    states = 3 * x.numel() * x.element_size() * (stage.steps if exact else 1)
    passes = images * stage.steps * levels
    return Cost(
        images=images,
        evaluations=passes,
        least=passes,
        flop=forward * passes,
        gradient_flop=both * passes,
        memory=_weights(stage) + (saved + states) * batch,
    )


def _flop(function: Callable[[Tensor], Tensor], x: Images) -> tuple[float, float]:
    """Operations of a call, and of a call with its gradient in ``x``."""
    try:
        with torch.no_grad(), _Counter() as forward:
            function(x)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"the network failed on an image of shape {tuple(x.shape[1:])} ({reason}); give the "
            "shape it was made for"
        ) from error
    with torch.enable_grad(), _Counter() as both:
        leaf = x.detach().requires_grad_()
        torch.autograd.grad(function(leaf).sum(), leaf)
    return forward.flop, both.flop


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations by torch's own table; FlopCounterMode fails on gradients of gradients."""

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
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), saved_tensors_hooks(keep, lambda tensor: tensor):
        result = function()
    del result
    return int(_TEMPORARIES * sum(kept.values()))


def _weights(stage: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in stage.parameters())


def _si(number: float) -> str:
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.3g} {prefix}"
    return f"{number:.0f} "
