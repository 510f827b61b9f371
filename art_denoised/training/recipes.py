"""Recipes of adversarial training: what is minimised, and against which attack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from art_denoised import checks
from art_denoised.attacks.ascent import Norm, in_eval, perturb, random_point
from art_denoised.attacks.losses import cross_entropy
from art_denoised.attacks.pgd import PGD
from art_denoised.checks import InputError
from art_denoised.networks.activations import attacking
from art_denoised.storage import weights_fingerprint
from art_denoised.types import Images, Labels, Logits


class Recipe(Protocol):
    """A loss to train with, and the ball in which the classifier is to be robust."""

    @property
    def eps(self) -> float:
        """Radius in image units; 0: clean training."""
        ...

    @property
    def norm(self) -> Norm:
        """Of the ball."""
        ...

    def loss(self, model: nn.Module, x: Images, y: Labels, /) -> Tensor:
        """Return the loss of a batch; ``model`` is in training mode."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Adversarial:
    """Train on adversarial images alone: PGD training and its single-step and targeted kinds.

    During the attack all modules are in eval mode (batch norm uses its running statistics), as in
    Xie et al., and marked as `attacking`; then the batch of adversarial images is one of training.

    Attributes:
        eps: Radius of the ball, in units of images in [0, 1]; 0: no attack, clean training.
        norm: "linf" or "l2".
        steps: Of the attack.
        stride: Length of a step, as a share of ``eps``; None: a step is max(1/255, eps / steps), as
            in Xie et al. (CVPR 2019), section 5.
        targeted: Towards a uniformly random wrong class.
        clean_starts: Share of batches in which the attack begins at the image and not at a random
            point of the ball.
        label_smoothing: Of the loss that is minimised.

    Raises:
        InputError: A value out of range.

    Example:
        >>> from art_denoised.demo import digits_network
        >>> x, y = torch.rand(8, 1, 8, 8), torch.arange(8)
        >>> Adversarial(eps=0.1, steps=2).loss(digits_network(), x, y).shape
        torch.Size([])
    """

    eps: float = 8 / 255
    norm: Norm = "linf"
    steps: int = 10
    stride: float | None = 0.25
    targeted: bool = False
    clean_starts: float = 0.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        _check_ball(self.eps, self.norm, self.steps)
        if self.stride is not None:
            checks.positive("stride", self.stride)
        for name in ("clean_starts", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}; give a share in [0, 1]")

    def loss(self, model: nn.Module, x: Images, y: Labels) -> Tensor:
        """Return the cross-entropy of adversarial images."""
        logits = _answer(model, self.attack(model, x, y) if self.eps else x)
        return F.cross_entropy(logits, y, label_smoothing=self.label_smoothing)

    @property
    def step_size(self) -> float:
        """Length of a step, image units."""
        if self.stride is None:
            return max(1 / 255, self.eps / self.steps)
        return self.stride * self.eps

    def attack(self, model: nn.Module, x: Images, y: Labels) -> Images:
        """Return adversarial images; draws from torch's global random state."""
        clean = self.clean_starts > 0 and float(torch.rand(())) < self.clean_starts
        start = x if clean else random_point(x, self.eps, self.norm)
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
    """TRADES: clean cross-entropy, and the worst divergence from the clean answer in the ball.

    CE(f(x), y) + beta max KL(p(x) || p(x')), the attack beginning at x + 0.001 n, n normal (Zhang
    et al., ICML 2019, equation 5 and algorithm 1).

    Attributes:
        eps: Radius of the ball, in units of images in [0, 1].
        norm: "linf" or "l2".
        steps: Of the attack.
        stride: Length of a step, as a share of ``eps``.
        beta: Weight of the divergence; the paper's 1 / lambda.

    Raises:
        InputError: A value out of range.

    Example:
        >>> from art_denoised.demo import digits_network
        >>> x, y = torch.rand(8, 1, 8, 8), torch.arange(8)
        >>> Trades(eps=0.1, steps=2).loss(digits_network(), x, y).shape
        torch.Size([])
    """

    eps: float = 8 / 255
    norm: Norm = "linf"
    steps: int = 10
    stride: float = 0.25
    beta: float = 6.0

    def __post_init__(self) -> None:
        _check_ball(self.eps, self.norm, self.steps)
        checks.positive("stride", self.stride)
        checks.positive("beta", self.beta)

    def loss(self, model: nn.Module, x: Images, y: Labels) -> Tensor:
        """Return the loss of TRADES."""
        x_adv = self.attack(model, x)
        clean, attacked = _answer(model, x), _answer(model, x_adv)
        return F.cross_entropy(clean, y) + self.beta * _divergence(clean, attacked).mean()

    def attack(self, model: nn.Module, x: Images) -> Images:
        """Return the images that are answered most differently from ``x``."""
        with in_eval(model), attacking(model):
            # Not under no_grad: autocast would keep the weights that it converts there, without
            # gradient, for the step.
            clean = model(x).float().detach()
            return perturb(
                lambda x_adv: _divergence(clean, model(x_adv).float()),
                x,
                (x + 0.001 * torch.randn_like(x)).clamp(0, 1),
                eps=self.eps,
                step_size=self.stride * self.eps,
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


def _answer(model: nn.Module, x: Images) -> Logits:
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
    "sat": Adversarial(eps=4 / 255, steps=1, stride=1.0),  # Xie et al. 2020
    "feature-denoising": Adversarial(  # Xie et al., CVPR 2019
        eps=16 / 255,
        steps=30,
        stride=None,
        targeted=True,
        clean_starts=0.2,
        label_smoothing=0.1,
    ),
    "trades": Trades(),
}


def find_recipe(recipe: str | Recipe) -> Recipe:
    """Return the recipe of this name, or the recipe itself.

    Raises:
        InputError: There is none of this name.

    Example:
        >>> find_recipe("sat").eps == 4 / 255
        True
    """
    if not isinstance(recipe, str):
        return recipe
    if recipe not in RECIPES:
        raise InputError(f"recipe is {recipe!r}; give one of {', '.join(RECIPES)}")
    return RECIPES[recipe]


def describe(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as plain values, for the log: the same for the same recipe in any process.

    Example:
        >>> describe(RECIPES["trades"])["recipe"], describe(RECIPES["trades"])["beta"]
        ('Trades', 6.0)
    """
    kind = type(recipe)
    if isinstance(recipe, (Adversarial, Trades)):
        return {"recipe": kind.__name__, **asdict(recipe)}
    return {
        "recipe": f"{kind.__module__}.{kind.__qualname__}",
        "eps": recipe.eps,
        "norm": recipe.norm,
        "options": {name: _plain(value) for name, value in _held(recipe).items()},
    }


def _plain(value: Any) -> Any:
    """Return a value as JSON holds it, equal in another process; of what it cannot, the type."""
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, nn.Module):
        return weights_fingerprint(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {name: _plain(item) for name, item in _held(value).items()}
    named = value if hasattr(value, "__qualname__") else type(value)  # a class, a function
    return f"{named.__module__}.{named.__qualname__}"


def _held(value: Any) -> dict[str, Any]:
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return dict(getattr(value, "__dict__", {}))
