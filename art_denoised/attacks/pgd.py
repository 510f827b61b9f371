"""PGD in a ball of images: the ball, the losses that are climbed, restarts, targets and EOT.

The steps are those of evaluation and of adversarial training alike; evaluation keeps the worst
image seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from art_denoised import checks
from art_denoised.checks import InputError

if TYPE_CHECKING:
    from art_denoised.types import Images, Labels, Logits

Norm = Literal["linf", "l2"]
NORMS: tuple[str, ...] = get_args(Norm)
LossName = Literal["ce", "margin", "dlr"]
Loss = Callable[["Logits", "Labels", "Labels | None"], Tensor]
Target = Literal["random", "least_likely", "likeliest"]


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


@dataclass(frozen=True, slots=True)
class PGD:
    """Projected gradient descent (Madry et al., ICLR 2018): an `Attack`.

    It returns the point visited that most draws of the model get wrong, and among those the one
    with the highest loss; or the last point, as many published attacks do. An image is fooled when
    it is no longer classified as ``y``, also if the steps went towards a target.

    Each image has its own random numbers, determined by the seed, the restart and its index in the
    call: results do not depend on ``batch_size``, up to the rounding of the model. The global
    random state and the training flags, weights and gradients of the model are left alone; the
    model runs in eval mode, on copies of the images.

    Args:
        eps: Radius of the ball, in units of images in [0, 1].
        norm: "linf" or "l2".
        steps: Number of steps of each restart.
        step_size: Length of a step; None: 2.5 eps / steps.
        loss: "ce", "margin" or "dlr".
        targeted: False; or kind of the wrong class to aim at: "random", "least_likely", or
            "likeliest" (the likeliest one in the first restart, the second in the second).
        restarts: Number of starts.
        random_start: Whether to begin at a uniformly random point of the ball instead of the image.
        eot: Number of draws of a randomised model over which gradients are averaged, one after
            another: memory is that of one.
        keep: Point that is returned: the "worst" one visited, or the "last" one.
        seed: Seed of the starts and random targets.
        batch_size: Number of images at once; None: all.

    Raises:
        InputError: A value is out of range. When called: the images are not in [0, 1], the model
            returns no logits or NaN, or has too few classes for the loss.

    Example:
        >>> from art_denoised.demo import digits_classifier
        >>> from art_denoised.data import load_data
        >>> x, y = zip(*(load_data("digits")[i] for i in range(50)))
        >>> x, y, model = torch.stack(x), torch.tensor(y), digits_classifier()
        >>> x_adv = PGD(0.2, steps=10)(model, x, y)
        >>> bool((model(x_adv).argmax(1) == y).float().mean() < 0.2)
        True
    """

    eps: float = 8 / 255
    _: KW_ONLY
    norm: Norm = "linf"
    steps: int = 50
    step_size: float | None = None
    loss: LossName = "ce"
    targeted: Target | Literal[False] = False
    restarts: int = 1
    random_start: bool = True
    eot: int = 1
    keep: Literal["worst", "last"] = "worst"
    seed: int = 0
    batch_size: int | None = None

    def __post_init__(self) -> None:
        checks.plain_fields(self)
        for name, known in (("norm", Norm), ("loss", LossName), ("targeted", Target)):
            value = getattr(self, name)
            if value not in get_args(known) and (name, value) != ("targeted", False):
                raise InputError(f"{name} is {value!r}; give one of {', '.join(get_args(known))}")
        checks.flag("random_start", self.random_start)
        checks.choice("keep", self.keep, ("worst", "last"))
        checks.eps(self.eps, self.norm)
        for name in ("steps", "restarts", "eot"):
            checks.count(name, getattr(self, name))
        checks.count("seed", self.seed, 0)
        if self.step_size is not None:
            checks.positive("step_size", self.step_size)
        if self.batch_size is not None:
            checks.count("batch_size", self.batch_size)

    @property
    def nfe(self) -> int:
        """Number of function evaluations for an image: forward passes, most with a gradient."""
        return self.restarts * (self.steps + 1) * self.eot

    def __call__(self, model: nn.Module, x: Images, y: Labels) -> Images:
        """Return ``x_adv``, shaped like ``x``, within ``eps`` of it and in [0, 1].

        Args:
            model: Images to logits; log-probabilities will do. Of an ART estimator its module is
                attacked.
            x: Images in [0, 1], on the device of the model.
            y: True labels.
        """
        from art_denoised.attacks.suites import as_module  # which imports this module

        model = as_module(model)
        x = checks.images(x)
        y = checks.labels(y).to(x.device)
        checks.one_each(x, y)
        size = len(x) if self.batch_size is None else self.batch_size
        parts = []
        with torch.inference_mode(False), torch.enable_grad(), in_eval(model):
            x, y = x.detach().clone(), y.clone()  # normal tensors, also of inference tensors
            classes = checks.class_count(model, x)
            checks.labels(y, classes)
            for first in range(0, len(x), size):
                part = slice(first, min(first + size, len(x)))
                parts.append(self._attack(model, x[part], y[part], first, classes))
        return torch.cat(parts)

    def _attack(self, model: nn.Module, x: Images, y: Labels, first: int, classes: int) -> Images:
        """Attack one batch; ``first`` is the index of its first image."""
        worst = _Worst(x)
        size = 2.5 * self.eps / self.steps if self.step_size is None else self.step_size
        wrong_classes = self._wrong_classes(model, x, y)
        for restart in range(self.restarts):
            generators = [_generator(self.seed, restart, first + i) for i in range(len(x))]
            target = self._target(y, wrong_classes, restart, classes, generators)
            x_adv = self._start(x, generators)
            for _ in range(self.steps):
                gradient, seen = self._gradient(model, x_adv, y, target)
                worst.see(x_adv, *seen)
                x_adv = ascend(x_adv, gradient, x, eps=self.eps, step_size=size, norm=self.norm)
            seen = x.new_zeros(2, len(x))
            with torch.no_grad():
                for _ in range(self.eot):
                    seen += self._draw(model, x_adv, y, target)
            worst.see(x_adv, *seen)
            worst.check()
        return worst.x_adv if self.keep == "worst" else x_adv

    def _gradient(
        self, model: nn.Module, x_adv: Images, y: Labels, target: Labels | None
    ) -> tuple[Images, Tensor]:
        """Return the gradient of the loss, and what `_draw` returns, each summed over draws."""
        gradient, seen = torch.zeros_like(x_adv), x_adv.new_zeros(2, len(x_adv))
        for one, draw in self._gradients(model, x_adv, y, target):
            gradient += one
            seen += draw
        return gradient, seen

    def _gradients(
        self, model: nn.Module, x_adv: Images, y: Labels, target: Labels | None
    ) -> Iterator[tuple[Images, Tensor]]:
        """Yield the gradient of the loss, and what `_draw` returns, of each draw."""
        for _ in range(self.eot):
            leaf = x_adv.detach().requires_grad_()
            draw = self._draw(model, leaf, y, target)
            if not draw.requires_grad:
                raise InputError(
                    "autograd does not reach the images through the model; put BPDA into it, or "
                    "attack without gradients"
                )
            # In the images alone: weights take part in no gradient and accumulate none.
            yield torch.autograd.grad(draw[1].sum(), leaf)[0], draw.detach()

    def _draw(self, model: nn.Module, x_adv: Images, y: Labels, target: Labels | None) -> Tensor:
        """Return whether each image is fooled, NaN if there is no answer, and its loss."""
        logits, losses = self._losses(
            model, x_adv.clone(), y, target
        )  # it may write into its input
        fooled = (logits.argmax(1) != y).to(losses.dtype)
        return torch.stack([fooled.masked_fill(checks.unreadable(logits), torch.nan), losses])

    def _losses(
        self, model: nn.Module, x_adv: Images, y: Labels, target: Labels | None
    ) -> tuple[Tensor, Tensor]:
        """Return logits, and the loss of each image that is climbed."""
        logits = checks.unwrapped(model(x_adv))
        return logits, LOSSES[self.loss](logits, y, target)

    @torch.no_grad()
    def _wrong_classes(self, model: nn.Module, x: Images, y: Labels) -> Labels | None:
        """Return all classes but ``y``, the likeliest first, if they are asked for."""
        if self.targeted not in ("least_likely", "likeliest"):
            return None
        answers = [checks.logits(model(x.clone()), len(x)) for _ in range(self.eot)]
        score = torch.stack(answers).log_softmax(2).mean(0)
        return score.scatter(1, y[:, None], -torch.inf).argsort(1, descending=True)[:, :-1]

    def _target(
        self,
        y: Labels,
        wrong_classes: Labels | None,
        restart: int,
        classes: int,
        generators: list[torch.Generator],
    ) -> Labels | None:
        if not self.targeted:
            return None
        if wrong_classes is not None:
            likeliest = restart % wrong_classes.shape[1]
            return wrong_classes[:, -1 if self.targeted == "least_likely" else likeliest]
        shift = torch.cat([torch.randint(1, classes, (1,), generator=g) for g in generators])
        return (y + shift.to(y.device)) % classes

    def _start(self, x: Images, generators: list[torch.Generator]) -> Images:
        if not self.random_start:
            return x
        # Drawn on the CPU, so that all devices begin at the same points.
        centres = torch.split(x.cpu(), 1)
        points = zip(centres, generators, strict=True)
        return torch.cat([random_point(c, self.eps, self.norm, g) for c, g in points]).to(x.device)


class _Worst:
    """Of all points seen, for each image the one with the most fooled draws, then highest loss."""

    def __init__(self, x: Images) -> None:
        self.x_adv = x
        self._fooled, self._loss = x.new_full((2, len(x)), -1)  # the first point seen is worse
        self._unread = x.new_zeros((), dtype=torch.bool)

    def check(self) -> None:
        """Raise if logits were NaN at a point seen. Once a restart: it waits for the device."""
        if bool(self._unread):
            raise InputError(
                "the model returned NaN or infinite logits under attack; mend the model"
            )

    def see(self, x_adv: Images, fooled: Tensor, loss: Tensor) -> None:
        self._unread |= fooled.isnan().any()
        worse = (fooled > self._fooled) | ((fooled == self._fooled) & (loss > self._loss))
        self.x_adv = torch.where(worse.reshape(-1, 1, 1, 1), x_adv, self.x_adv)
        self._fooled = torch.where(worse, fooled, self._fooled)
        self._loss = torch.where(worse, loss, self._loss)


def _generator(*key: int) -> torch.Generator:
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64).item()
    return torch.Generator().manual_seed(seed)
