"""Recipes of adversarial training: what is minimised, and against which attack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from art_denoised import checks
from art_denoised.attacks.ascent import Norm, cross_entropy, in_eval, perturb, random_point
from art_denoised.attacks.pgd import PGD
from art_denoised.checks import InputError
from art_denoised.networks.activations import attacking
from art_denoised.types import Images, Labels, Logits


class Recipe(Protocol):
    """A loss to train with, and the ball in which the classifier is to be robust."""

    @property
    def eps(self) -> float:
        """Radius in image units; 0: clean training."""
        ...

    @property
    def norm(self) -> Norm:
        """Norm of the ball."""
        ...

    def loss(self, model: nn.Module, x: Images, y: Labels, /) -> Tensor:
        """Return the loss of a batch; ``model`` is in training mode."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Adversarial:
    """Train on adversarial images alone: PGD training and its single-step and targeted kinds.

    During the attack all modules are in eval mode (batch norm uses its running statistics), as in
    Xie et al., and marked as `attacking`. The step is then taken in training mode.

    Attributes:
        eps: Radius of the ball, for images in [0, 1]; 0: no attack, clean training.
        norm: "linf" or "l2".
        steps: Number of steps of the attack.
        relative_step_size: Length of a step, relative to ``eps``; None: a step is max(1/255, eps /
            steps), as in Xie et al. (CVPR 2019), section 5.
        targeted: Whether the attack aims at a uniformly random wrong class.
        clean_starts: Share of batches in which the attack starts at the image and not at a random
            point of the ball.
        clip_starts: Whether random starts are clipped to [0, 1]. Steps always are.
        label_smoothing: Label smoothing of the loss that is minimised.

    Raises:
        InputError: A value is out of range.

    Example:
        >>> from art_denoised.demo import digits_network
        >>> x, y = torch.rand(8, 1, 8, 8), torch.arange(8)
        >>> Adversarial(eps=0.1, steps=2).loss(digits_network(), x, y).shape
        torch.Size([])
    """

    eps: float = 8 / 255
    norm: Norm = "linf"
    steps: int = 10
    relative_step_size: float | None = 0.25
    targeted: bool = False
    clean_starts: float = 0.0
    clip_starts: bool = True
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        _check_ball(self.eps, self.norm, self.steps)
        if self.relative_step_size is not None:
            checks.positive("relative_step_size", self.relative_step_size)
        for name in ("clean_starts", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}; give a share in [0, 1]")

    def loss(self, model: nn.Module, x: Images, y: Labels) -> Tensor:
        """Return the cross-entropy of adversarial images."""
        logits = _logits(model, self.attack(model, x, y) if self.eps else x)
        return F.cross_entropy(logits, y, label_smoothing=self.label_smoothing)

    @property
    def step_size(self) -> float:
        """Length of a step, in image units."""
        if self.relative_step_size is None:
            return max(1 / 255, self.eps / self.steps)
        return self.relative_step_size * self.eps

    def attack(self, model: nn.Module, x: Images, y: Labels) -> Images:
        """Return adversarial images; draws from torch's global random state."""
        clean = self.clean_starts > 0 and float(torch.rand(())) < self.clean_starts
        start = x if clean else random_point(x, self.eps, self.norm, clip=self.clip_starts)
        share = torch.rand(len(y), device=y.device) if self.targeted else None

        def loss(x_adv: Images) -> Tensor:
            logits: Logits = model(x_adv).float()
            target = None if share is None else _wrong_class(y, logits.shape[1], share)
            return cross_entropy(logits, y, target)

        with in_eval(model), attacking(model):
            return perturb(
                loss,
                x,
                start,
                eps=self.eps,
                step_size=self.step_size,
                steps=self.steps,
                norm=self.norm,
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Trades:
    """TRADES: clean cross-entropy plus the largest divergence from the clean prediction.

    CE(f(x), y) + beta max KL(p(x) || p(x')) over the ball; the attack starts at x + 0.001 n with n
    normal (Zhang et al., ICML 2019, equation 5 and algorithm 1).

    Attributes:
        eps: Radius of the ball, for images in [0, 1].
        norm: "linf" or "l2".
        steps: Number of steps of the attack.
        relative_step_size: Length of a step, relative to ``eps``.
        beta: Weight of the divergence, the paper's 1 / lambda.

    Raises:
        InputError: A value is out of range.

    Example:
        >>> from art_denoised.demo import digits_network
        >>> x, y = torch.rand(8, 1, 8, 8), torch.arange(8)
        >>> Trades(eps=0.1, steps=2).loss(digits_network(), x, y).shape
        torch.Size([])
    """

    eps: float = 8 / 255
    norm: Norm = "linf"
    steps: int = 10
    relative_step_size: float = 0.25
    beta: float = 6.0

    def __post_init__(self) -> None:
        _check_ball(self.eps, self.norm, self.steps)
        checks.positive("relative_step_size", self.relative_step_size)
        checks.positive("beta", self.beta)

    def loss(self, model: nn.Module, x: Images, y: Labels) -> Tensor:
        """Return the loss of TRADES."""
        x_adv = self.attack(model, x)
        clean, attacked = _logits(model, x), _logits(model, x_adv)
        return F.cross_entropy(clean, y) + self.beta * _divergence(clean, attacked).mean()

    def attack(self, model: nn.Module, x: Images) -> Images:
        """Return the images whose prediction differs most from that of ``x``."""
        with in_eval(model), attacking(model):
            # Not under no_grad: autocast would cache the weights that it casts there, without
            # gradient, for the step.
            clean = model(x).float().detach()
            return perturb(
                lambda x_adv: _divergence(clean, model(x_adv).float()),
                x,
                (x + 0.001 * torch.randn_like(x)).clamp(0, 1),
                eps=self.eps,
                step_size=self.relative_step_size * self.eps,
                steps=self.steps,
                norm=self.norm,
            )


def _wrong_class(y: Labels, classes: int, share: Tensor) -> Labels:
    """Return a class other than ``y`` for each number in [0, 1): uniform if these are."""
    # The product may round up to the last class's end.
    shift = (share * (classes - 1)).long().clamp_max(classes - 2)
    return (y + 1 + shift) % classes


def _divergence(clean: Tensor, attacked: Tensor) -> Tensor:
    """KL(p(x) || p(x')) of each image."""
    p, q = clean.log_softmax(1), attacked.log_softmax(1)
    return F.kl_div(q, p, reduction="none", log_target=True).sum(1)


def _check_ball(eps: float, norm: Norm, steps: int) -> None:
    PGD(eps, norm=norm, steps=steps)  # checks them


def _logits(model: nn.Module, x: Images) -> Logits:
    """Return the logits of a model in training mode."""
    logits = model(x)
    if not isinstance(logits, Tensor):
        raise InputError(
            f"the model returns {type(logits).__name__} in training mode, not logits; build it "
            "with aux_logits=False, or wrap it"
        )
    return logits.float()


RECIPES: dict[str, Adversarial | Trades] = {
    "clean": Adversarial(eps=0.0),
    "pgd": Adversarial(),  # Madry et al., ICLR 2018: steps of 2/255
    # Xie et al. 2020: as the paper describes it, and as its release trains, which takes starts,
    # smoothing and warm-up from the recipe of 2019.
    "sat": Adversarial(eps=4 / 255, steps=1, relative_step_size=1.0),
    "sat-release": Adversarial(
        eps=4 / 255,
        steps=1,
        relative_step_size=1.0,
        clean_starts=0.2,
        clip_starts=False,
        label_smoothing=0.1,
    ),
    "feature-denoising": Adversarial(  # Xie et al., CVPR 2019
        eps=16 / 255,
        steps=30,
        relative_step_size=None,
        targeted=True,
        clean_starts=0.2,
        label_smoothing=0.1,
    ),
    "trades": Trades(),
}


def find_recipe(recipe: str | Recipe) -> Recipe:
    """Return the recipe of this name, or the recipe itself.

    Raises:
        InputError: No recipe has this name.

    Example:
        >>> find_recipe("sat").eps == 4 / 255
        True
    """
    if not isinstance(recipe, str):
        return recipe
    if recipe not in RECIPES:
        raise InputError(f"recipe is {recipe!r}; give one of {', '.join(RECIPES)}")
    return RECIPES[recipe]
