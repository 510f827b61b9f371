"""Adversarial training: recipes of the papers (a loss and its attack), and their trainer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from art_denoised import checks
from art_denoised.attacks.pgd import PGD, Norm, cross_entropy, in_eval, perturb, random_point
from art_denoised.checks import InputError
from art_denoised.networks.activations import attacking
from art_denoised.training.config import Batches, TrainingConfig, stack_pairs
from art_denoised.training.loop import EpochRow, Evaluation, train
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
class _Ascent:
    """A recipe whose attack is projected gradient ascent in a ball."""

    eps: float = 8 / 255
    norm: Norm = "linf"
    steps: int = 10
    relative_step_size: float | None = 0.25

    def __post_init__(self) -> None:
        checks.plain_fields(self)
        PGD(self.eps, norm=self.norm, steps=self.steps)  # checks them
        if self.relative_step_size is not None:
            checks.positive("relative_step_size", self.relative_step_size)

    @property
    def step_size(self) -> float:
        """Length of a step, in image units."""
        if self.relative_step_size is None:
            return max(1 / 255, self.eps / self.steps)
        return self.relative_step_size * self.eps

    def _ascend(self, loss: Callable[[Images], Tensor], x: Images, start: Images) -> Images:
        step_size, steps, norm = self.step_size, self.steps, self.norm
        return perturb(loss, x, start, eps=self.eps, step_size=step_size, steps=steps, norm=norm)


@dataclass(frozen=True, slots=True, kw_only=True)
class Adversarial(_Ascent):
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

    targeted: bool = False
    clean_starts: float = 0.0
    clip_starts: bool = True
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        _Ascent.__post_init__(self)
        for name in ("targeted", "clip_starts"):
            checks.flag(name, getattr(self, name))
        for name in ("clean_starts", "label_smoothing"):
            if not 0 <= checks.real(name, getattr(self, name)) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}; give a share in [0, 1]")

    def loss(self, model: nn.Module, x: Images, y: Labels) -> Tensor:
        """Return the cross-entropy of adversarial images."""
        logits = _logits(model, self.attack(model, x, y) if self.eps else x)
        return F.cross_entropy(logits, y, label_smoothing=self.label_smoothing)

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
            return self._ascend(loss, x, start)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trades(_Ascent):
    """TRADES: clean cross-entropy plus the largest divergence from the clean prediction.

    CE(f(x), y) + beta max KL(p(x) || p(x')) over the ball; the attack starts at x + 0.001 n with n
    normal (Zhang et al., ICML 2019, equation 5 and algorithm 1).

    Attributes:
        eps: Radius of the ball, for images in [0, 1].
        norm: "linf" or "l2".
        steps: Number of steps of the attack.
        relative_step_size: Length of a step, relative to ``eps``; None: as in `Adversarial`.
        beta: Weight of the divergence, the paper's 1 / lambda.

    Raises:
        InputError: A value is out of range.

    Example:
        >>> from art_denoised.demo import digits_network
        >>> x, y = torch.rand(8, 1, 8, 8), torch.arange(8)
        >>> Trades(eps=0.1, steps=2).loss(digits_network(), x, y).shape
        torch.Size([])
    """

    beta: float = 6.0

    def __post_init__(self) -> None:
        _Ascent.__post_init__(self)
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
            start = (x + 0.001 * torch.randn_like(x)).clamp(0, 1)
            return self._ascend(lambda x_adv: _divergence(clean, model(x_adv).float()), x, start)


def _wrong_class(y: Labels, classes: int, share: Tensor) -> Labels:
    """Return a class other than ``y`` for each number in [0, 1): uniform if these are."""
    # The product may round up to the last class's end.
    shift = (share * (classes - 1)).long().clamp_max(classes - 2)
    return (y + 1 + shift) % classes


def _divergence(clean: Tensor, attacked: Tensor) -> Tensor:
    """KL(p(x) || p(x')) of each image."""
    p, q = clean.log_softmax(1), attacked.log_softmax(1)
    return F.kl_div(q, p, reduction="none", log_target=True).sum(1)


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
"""Recipes of adversarial training by name (docs/tutorials/robust-training.md)."""

ROBUST_CONFIG = TrainingConfig(
    optimizer="sgd", lr=0.1, weight_decay=5e-4, clip=0.0, schedule="one-cycle", average=0.995
)
"""Settings of `train_robust` unless others are given."""


class OverfittingWarning(UserWarning):
    """A training has overfitted catastrophically."""


@dataclass(frozen=True, slots=True)
class Validation:
    """A validation set of adversarial training, and what follows from its figures.

    Attributes:
        data: Pairs of image and label that are not trained on. They are attacked after each epoch.
        steps: Number of steps of that attack, PGD at the eps of the recipe.
        keep_best: Return the weights of the epoch with the highest robust accuracy. The accuracy of
            that epoch is then no longer unbiased.
        stop_on_overfitting: End the training when it overfits catastrophically (docs/
            robust-training.md). Otherwise the training goes on, with a warning.

    Raises:
        InputError: ``steps`` is out of range.

    Example:
        >>> Validation([(torch.zeros(1, 8, 8), 3)], keep_best=True).steps
        10
    """

    data: Any
    steps: int = 10
    keep_best: bool = False
    stop_on_overfitting: bool = False

    def __post_init__(self) -> None:
        checks.plain_fields(self)
        checks.count("steps", self.steps)
        for name in ("keep_best", "stop_on_overfitting"):
            checks.flag(name, getattr(self, name))


def train_robust(
    network: nn.Module,
    data: Any,
    recipe: str | Recipe = "pgd",
    config: TrainingConfig = ROBUST_CONFIG,
    *,
    validation: Any = None,
    run: Path | str | None = None,
    resume: bool = False,
    progress: bool = True,
) -> list[EpochRow]:
    """Train a classifier in place to be robust; return a row for each epoch.

    Args:
        network: Classifier on its device, from images in [0, 1] to logits; normalisation belongs
            into it.
        data: Images in [0, 1] and labels, as `train` takes them.
        recipe: "pgd", "sat", "sat-release", "trades", "feature-denoising" or "clean" (`RECIPES`);
            one of them with other values, as in ``replace(RECIPES["sat"], eps=8 / 255)``; or a
            `Recipe` of your own.
        config: How to train; by default SGD, one cycle, averaged weights.
        validation: `Validation`, or its pairs of image and label. It gives the figures
            ``accuracy``, ``robust`` (under PGD), ``one_step`` (under a single step of length eps)
            and ``overfitting``, 1 or 0.
        run: Folder for log and checkpoint; None keeps neither.
        resume: Continue the training in the folder if there is one.
        progress: Show a progress bar.

    Raises:
        InputError: A value is out of range, the model cannot take the images, or `train` refuses.

    Example:
        >>> from art_denoised.demo import digits_network
        >>> data = torch.utils.data.TensorDataset(torch.rand(64, 1, 8, 8), torch.arange(64) % 10)
        >>> config = TrainingConfig(epochs=1, batch_size=32, optimizer="sgd", lr=0.05)
        >>> rows = train_robust(
        ...     digits_network(), data, "sat", config, validation=data, progress=False
        ... )
        >>> sorted(rows[0].figures)
        ['accuracy', 'one_step', 'overfitting', 'robust']
    """
    if isinstance(recipe, str):
        recipe = RECIPES[checks.choice("recipe", recipe, RECIPES)]
    classes = _class_count(network, Batches(data, config).one()[0])
    evaluation = None
    if validation is not None:
        if not isinstance(validation, Validation):
            validation = Validation(validation)
        x, y = stack_pairs(validation.data, classes)
        _class_count(network, x[:1])
        attack = PGD(recipe.eps, norm=recipe.norm, steps=validation.steps, batch_size=256)
        evaluation = Evaluation(
            _Attacked(x, y, attack),
            keep_best="robust" if validation.keep_best else None,
            stop=_has_overfitted if validation.stop_on_overfitting else None,
        )
    loss = _RecipeLoss(recipe, classes)
    return train(
        network,
        data,
        loss,
        config,
        evaluation=evaluation,
        run=run,
        resume=resume,
        progress=progress,
    )


@dataclass(frozen=True, slots=True)
class _RecipeLoss:
    """Loss of a recipe, on labels that are checked."""

    recipe: Recipe
    classes: int

    def __call__(self, network: nn.Module, x: Images, y: Labels, step: int) -> Tensor:
        return self.recipe.loss(network, x, checks.labels(y, self.classes))


@dataclass(frozen=True, slots=True)
class _Attacked:
    """Figures of a classifier on a validation set."""

    x: Images
    y: Labels
    attack: PGD

    def __call__(self, network: nn.Module, rows: Sequence[EpochRow]) -> dict[str, float]:
        figures = measure_classifier(network, self.x, self.y, self.attack)
        figures["overfitting"] = float(overfits([*(row.figures for row in rows), figures]))
        if figures["overfitting"]:
            warnings.warn(
                f"epoch {len(rows) + 1}: catastrophic overfitting, accuracy is "
                f"{figures['robust']:.1%} under PGD and {figures['one_step']:.1%} under a single "
                "step; take more steps, a smaller step size, or the best epoch",
                OverfittingWarning,
                stacklevel=2,
            )
        return figures


def _has_overfitted(rows: Sequence[EpochRow]) -> bool:
    return bool(rows[-1].figures["overfitting"])


def overfits(figures: Sequence[Mapping[str, float]]) -> bool:
    """Whether the last of some epochs shows catastrophic overfitting (Wong et al., ICLR 2020).

    A single step no longer fools the network, but many steps do. Either robust accuracy is below
    half of an earlier epoch's while accuracy under a single step is above it. Or, which the first
    epoch can show as well, accuracy under a single step is above .75 of the clean accuracy and
    above .25, and robust accuracy is below a quarter of it.
    """
    *earlier, last = figures
    robust, one_step = last["robust"], last["one_step"]
    highest = max((epoch["robust"] for epoch in earlier), default=0.0)
    fell = robust < highest / 2 and one_step > highest
    # A network merely not robust falls to single steps too (digits at eps .3: to a quarter).
    most = one_step > max(0.75 * last["accuracy"], 0.25)
    return fell or (most and robust < one_step / 4)


def measure_classifier(network: nn.Module, x: Images, y: Labels, attack: PGD) -> dict[str, float]:
    """Return the accuracy on clean images, under an attack, and under one step of length eps."""
    device = next(network.parameters()).device
    x, y = x.to(device), y.to(device)
    single = replace(attack, steps=1, step_size=attack.eps or None)
    size = attack.batch_size or len(x)
    figures = {}
    for name, images in {
        "accuracy": x,
        "robust": attack(network, x, y),
        "one_step": single(network, x, y),
    }.items():
        with torch.no_grad():
            predictions = torch.cat([network(part).argmax(1) for part in torch.split(images, size)])
        figures[name] = int((predictions == y).sum()) / len(y)
    return figures


def _class_count(network: nn.Module, x: Images) -> int:
    """Classify one image, to find a misfit before the work starts."""
    with in_eval(network):
        return checks.class_count(network, x.to(checks.model_device(network)))
