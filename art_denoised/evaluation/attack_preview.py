"""What a run of attacks will cost, from two passes of a batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.data.images import Chosen, ImageData
from art_denoised.evaluation.preview import duration, machine
from art_denoised.evaluation.target import LOOKED, Target, columns
from art_denoised.models.cost import forward_cost, gradient_cost
from art_denoised.types import Images


@dataclass(frozen=True, slots=True)
class AttackPreview:
    """The expected cost of a run of attacks, masking checks aside.

    Attributes:
        images: Number of images of the run.
        nfe: Number of function evaluations (forward passes of an image), about and at most: images
            that the model gets wrong are not attacked.
        unknown: Names of attacks whose number is not known; they are not included.
        flop: Floating-point operations; evaluations of attacks that take gradients count with one.
        seconds: Time at the speed of two batches.
        memory: Estimate of the bytes held at once.
    """

    images: int
    nfe: int
    unknown: tuple[str, ...]
    flop: float
    seconds: float
    memory: int

    def __str__(self) -> str:
        """Return it in words, for the terminal."""
        words = f"{self.images} images: up to {self.nfe:,} forward passes, {duration(self.seconds)}"
        words += machine(self.flop, self.memory)
        if self.unknown:
            words += f"; without {', '.join(self.unknown)}, whose cost is not known"
        return words + "; masking checks come on top"


def preview_attack(
    model: Any,
    data: ImageData,
    attacks: Sequence[Any] | Mapping[str, Any],
    *,
    indices: Sequence[int] | None = None,
    noise: str | None = None,
    gradients: Sequence[str] | None = None,
    repeats: int = 10,
    batch_size: int = 64,
) -> AttackPreview:
    """Estimate passes, operations, memory and time of `evaluate` before it is begun.

    The model is called as `evaluate` calls it at first, to detect randomness, and evaluates one
    batch, with a gradient and without.

    Args:
        model: Module or estimator to attack.
        data: Pairs of an image and its class.
        attacks: Sequence of attacks or of pairs of a name and an attack.
        indices: Indices of the images; None: all.
        noise: Noise of the defence, "fixed" or "fresh"; None: the model's own setting.
        gradients: Ways of taking gradients; None: all that the defence has.
        repeats: Number of later evaluations of a randomised model.
        batch_size: Number of images attacked at once.

    Raises:
        InputError: There are no images, or the model or an attack cannot be used.

    Example:
        >>> from art_denoised import PGD
        >>> from art_denoised.data import load_data
        >>> from art_denoised.demo import digits_classifier
        >>> cost = preview_attack(
        ...     digits_classifier(), load_data("digits"), [PGD(0.1, steps=9)], indices=range(20)
        ... )
        >>> cost.nfe == 20 * (2 + 10 + 1), cost.unknown
        (True, ())
    """
    images = Chosen(data, indices)
    if not images.whole:
        raise InputError("there are no images; give at least one")
    x, _ = images.stack(images.whole[: checks.count("batch_size", batch_size)])
    target = Target(model, x[:LOOKED], noise=noise, repeats=repeats, seed=0, batch_size=batch_size)
    used, x = list(columns(attacks, target.gradients(gradients))), x.to(target.device)
    module = target.module
    with target.as_asked(), target.session(0), torch.no_grad():
        forward, seconds = forward_cost(module, x), _seconds(module, x)
    nfe = target.repeats if target.randomised else 2  # without attack
    flop, time_each, memory = nfe * forward.flop, nfe * seconds, forward.memory(len(x))
    unknown = []
    for column in used:
        passes, seeing = getattr(column.attack, "nfe", None), column.gradient != "none"
        if passes is None:
            unknown.append(column.name)
            continue
        one, each = forward, seconds
        if seeing:
            with target.as_asked(), target.session(0), target.taking(column.gradient):
                one, each = gradient_cost(module, x), _seconds(_gradient(module), x)
        later = target.repeats  # evaluations of the attacked images
        nfe += passes + later
        flop += passes * one.flop + later * forward.flop
        time_each += passes * each + later * seconds
        memory = max(memory, one.memory(len(x)))
    number = len(images.indices)
    return AttackPreview(
        images=number,
        nfe=number * nfe,
        unknown=tuple(unknown),
        flop=number * flop,
        seconds=number * time_each,
        memory=memory,
    )


def _gradient(module: Callable[[Images], Any]) -> Callable[[Images], object]:
    def call(x: Images) -> object:
        with torch.enable_grad():
            leaf = x.detach().clone().requires_grad_()
            output = module(leaf)
            return torch.autograd.grad(getattr(output, "logits", output).float().sum(), leaf)

    return call


def _seconds(function: Callable[[Images], object], x: Images) -> float:
    """Return the time of a pass for each image of a batch; a first pass warms up."""
    for _ in range(2):
        begin = time.perf_counter()
        function(x)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
    return (time.perf_counter() - begin) / len(x)
