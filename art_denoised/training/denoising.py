"""Training of denoisers, by what they restore and by what a classifier makes of their output.

Source: Salman et al., "Denoised Smoothing: A Provable Defense for Pretrained Classifiers" (NeurIPS
2020, arXiv 2003.01908), section 3. Diffusion models are trained in the preconditioning of EDM.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from art_denoised import checks
from art_denoised.attacks.pgd import in_eval
from art_denoised.checks import InputError
from art_denoised.diffusion.levels import P_MEAN, P_STD
from art_denoised.diffusion.model import DiffusionModel
from art_denoised.diffusion.preconditioning import EDM
from art_denoised.runs.journal import fingerprint
from art_denoised.training.config import Batches, TrainingConfig, stack_pairs
from art_denoised.training.loop import EpochRow, Evaluation, train
from art_denoised.types import Classifier, Images, Labels

DenoiserLoss = Callable[[Images, Images, Labels, "Classifier | None"], Tensor]


def mse(x_hat: Images, x: Images, y: Labels, classifier: Classifier | None) -> Tensor:
    """Return the mean squared error to the clean image (equation 4)."""
    return F.mse_loss(x_hat.float(), x)


def stability(x_hat: Images, x: Images, y: Labels, classifier: Classifier | None) -> Tensor:
    """Return the cross-entropy to the classifier's label of the clean image (equation 5)."""
    classifier = _needed(classifier)
    with torch.no_grad():
        target = classifier(x).argmax(1)
    return F.cross_entropy(classifier(x_hat).float(), target)


def classification(x_hat: Images, x: Images, y: Labels, classifier: Classifier | None) -> Tensor:
    """Return the cross-entropy to the true label."""
    return F.cross_entropy(_needed(classifier)(x_hat).float(), y)


LOSSES: dict[str, DenoiserLoss] = {
    "mse": mse,
    "stability": stability,
    "classification": classification,
}


@dataclass(frozen=True, slots=True)
class Objective:
    """What a denoiser is trained for.

    With a classifier alone it is the white-box case: the denoiser is trained through the classifier
    that it is to defend. With surrogates it is the black-box case: the denoiser is trained through
    them in turn, one a batch, and the classifier is only evaluated.

    Attributes:
        loss: "mse", "stability", "classification"; "hybrid", which is mse and then stability at a
            hundredth of the learning rate; or a function ``loss(x_hat, x, y, classifier)``.
        sigma: Noise level in image units, or the lowest and the highest, between which it is drawn
            uniformly for each image.
        classifier: Classifier to defend, in eval mode, from images in [0, 1] to logits.
        surrogates: Classifiers to train through in its place.
        fine_epochs: Number of epochs of the second part of "hybrid"; by default 2/9 of the first.

    Raises:
        InputError: A value is out of range, a classifier is needed, one is in training mode, or the
            classifier is among the surrogates.

    Example:
        >>> from art_denoised.demo import digits_classifier
        >>> Objective("stability", sigma=0.25, classifier=digits_classifier()).levels
        (0.25, 0.25)
    """

    loss: str | DenoiserLoss
    sigma: float | tuple[float, float]
    classifier: nn.Module | None = None
    surrogates: Sequence[nn.Module] = ()
    fine_epochs: int | None = None

    def __post_init__(self) -> None:
        checks.plain_fields(self)
        if isinstance(self.loss, str):
            checks.choice("objective", self.loss, (*LOSSES, "hybrid"))
        if self.fine_epochs is not None:
            if self.loss != "hybrid":
                raise InputError(
                    f"fine_epochs is {self.fine_epochs} but the objective is not hybrid; leave it "
                    "out"
                )
            checks.count("fine_epochs", self.fine_epochs)
        low, high = self.levels
        if checks.sigma(low) > checks.sigma(high):
            raise InputError(f"sigma goes from {low:g} to {high:g}; give the lower one first")
        needing = ("stability", "classification", "hybrid", stability, classification)
        if self.loss in needing and not self.teachers:
            raise InputError(f"objective {self.loss} needs a classifier; give one, or surrogates")
        for classifier in self.classifiers:
            checks.eval_mode(classifier)
        target = self.classifier
        if target is not None and any(_shared(one, target) for one in self.surrogates):
            raise InputError(
                "the classifier to defend is among the surrogates; in the black-box case it must "
                "not be, so leave it out there"
            )

    @property
    def levels(self) -> tuple[float, float]:
        """Lowest and highest noise level."""
        if not isinstance(self.sigma, tuple):
            return self.sigma, self.sigma
        if len(self.sigma) != 2:
            raise InputError(
                f"sigma is {self.sigma}; give one noise level, or the lowest and the highest"
            )
        return self.sigma

    @property
    def classifiers(self) -> tuple[nn.Module, ...]:
        """All classifiers, the surrogates first."""
        return (*self.surrogates, *([] if self.classifier is None else [self.classifier]))

    @property
    def teachers(self) -> tuple[nn.Module, ...]:
        """Classifiers to train through."""
        return tuple(self.surrogates) or self.classifiers

    @property
    def judge(self) -> nn.Module | None:
        """Classifier that validation figures are about: the one to defend, if it is known."""
        return next(iter((*self.classifiers[len(self.surrogates) :], *self.surrogates)), None)

    def parts(self, config: TrainingConfig) -> list[tuple[str, DenoiserLoss, TrainingConfig]]:
        """Return name, loss and config of each training."""
        if callable(self.loss):
            return [(getattr(self.loss, "__name__", "objective"), self.loss, config)]
        if self.loss != "hybrid":
            return [(self.loss, LOSSES[self.loss], config)]
        # As in the paper: 20 epochs after 90, and lr 1e-5 after 1e-3.
        epochs = self.fine_epochs or max(1, round(2 / 9 * config.epochs))
        fine = replace(config, epochs=epochs, lr=0.01 * config.lr, schedule="constant")
        return [("mse", mse, config), ("stability", stability, fine)]


def train_denoiser(
    denoiser: nn.Module,
    data: Any,
    objective: Objective,
    config: TrainingConfig | None = None,
    *,
    validation: Any = None,
    run: Path | str | None = None,
    resume: bool = False,
    progress: bool = True,
) -> list[EpochRow]:
    """Train a denoiser in place, classifiers as they are; return a row for each epoch.

    Args:
        denoiser: Network called as ``denoiser(x_noisy, sigma)``, on its device.
        data: Images in [0, 1] and labels, as `train` takes them.
        objective: What the denoiser is trained for.
        config: How to train; by default `TrainingConfig()`. For "hybrid", its first part.
        validation: Pairs of image and label that are not trained on. After each epoch they give
            the figures ``mse`` and, with a classifier, ``accuracy``, both at the highest sigma.
            Without a classifier to defend it is the accuracy of the first surrogate, which the
            denoiser was trained through.
        run: Folder for log and checkpoint; None keeps neither. "hybrid" uses the folders ``mse``
            and ``stability`` inside it.
        resume: Continue the training in the folder if there is one.
        progress: Show a progress bar.

    Raises:
        InputError: Networks cannot take the images, the folder holds another training, or `train`
            refuses.

    Example:
        >>> from art_denoised import DnCNN
        >>> from art_denoised.demo import digits_classifier
        >>> x = torch.rand(64, 1, 8, 8)
        >>> data = torch.utils.data.TensorDataset(x, torch.zeros(64).long())
        >>> objective = Objective(
        ...     "hybrid", sigma=0.25, classifier=digits_classifier(), fine_epochs=1
        ... )
        >>> config = TrainingConfig(epochs=2, batch_size=32)
        >>> rows = train_denoiser(DnCNN(1, 3, 4), data, objective, config, progress=False)
        >>> [row.epoch for row in rows]
        [1, 2, 1]
    """
    config = TrainingConfig() if config is None else config
    parts, (low, high) = objective.parts(config), objective.levels
    if run is not None:
        other = Path(run, "." if len(parts) > 1 else "stability", "checkpoint.pt")
        if other.exists():
            raise InputError(f"{run} holds another training ({other}); choose another folder")
    classes = _class_counts(denoiser, objective, Batches(data, config).one()[0])
    evaluation = None
    if validation is not None:
        x, y = stack_pairs(validation)
        _class_counts(denoiser, objective, x[:1])
        evaluation = Evaluation(_Restored(objective.judge, x, y, high))
    rows: list[EpochRow] = []
    for name, function, part in parts:
        limit = classes if function is classification else None
        with _frozen(objective.classifiers):
            rows += train(
                denoiser,
                data,
                _Denoising(function, (low, high), objective.teachers, limit),
                part,
                evaluation=evaluation,
                run=run if run is None or len(parts) == 1 else Path(run, name),
                resume=resume,
                progress=progress,
            )
    return rows


@dataclass(frozen=True, slots=True)
class _Denoising:
    """Loss of a denoiser on images with fresh noise."""

    objective: DenoiserLoss
    sigma: tuple[float, float]
    classifiers: tuple[nn.Module, ...]
    classes: int | None

    def __call__(self, denoiser: nn.Module, x: Images, y: Labels, step: int) -> Tensor:
        if self.classes is not None:
            checks.labels(y, self.classes)
        sigma = torch.empty(len(x), device=x.device).uniform_(*self.sigma)
        x_noisy = x + sigma.reshape(-1, 1, 1, 1) * torch.randn_like(x)
        turns = self.classifiers
        classifier = turns[step % len(turns)] if turns else None
        return self.objective(denoiser(x_noisy, sigma), x, y, classifier)


@dataclass(frozen=True, slots=True)
class _Restored:
    """Figures of a denoiser on a validation set."""

    classifier: nn.Module | None
    x: Images
    y: Labels
    sigma: float

    def __call__(self, denoiser: nn.Module, rows: Sequence[EpochRow]) -> dict[str, float]:
        return measure_denoiser(denoiser, self.classifier, self.x, self.y, self.sigma)


def measure_denoiser(
    denoiser: nn.Module, classifier: nn.Module | None, x: Images, y: Labels, sigma: float
) -> dict[str, float]:
    """Return the mean squared error of a denoiser and the accuracy of a classifier behind it.

    Each image is seen once, with noise from a stream of its own that is the same in every call.
    """
    device = next(denoiser.parameters()).device
    generator = torch.Generator().manual_seed(0)
    error, hits = 0.0, 0
    with torch.no_grad():
        for clean, labels in zip(torch.split(x, 128), torch.split(y, 128), strict=True):
            x_noisy = clean + sigma * torch.randn(clean.shape, generator=generator)
            x_hat = denoiser(x_noisy.to(device), sigma).float()
            error += float((x_hat.cpu() - clean).square().mean((1, 2, 3)).sum())
            if classifier is not None:
                hits += int((classifier(x_hat).argmax(1).cpu() == labels).sum())
    figures = {"mse": round(error / len(x), 6)}
    return figures if classifier is None else {**figures, "accuracy": hits / len(x)}


def _shared(a: nn.Module, b: nn.Module) -> bool:
    """Whether one classifier is the other or wraps it, whatever its weights are called there."""
    return _holds(a, b) or _holds(b, a)


def _holds(a: nn.Module, b: nn.Module) -> bool:
    if any(module is b for module in a.modules()):
        return True
    held, wanted = (Counter(fingerprint(p) for p in c.parameters()) for c in (a, b))
    return bool(wanted) and wanted <= held


def _class_counts(denoiser: nn.Module, objective: Objective, x: Images) -> int | None:
    """Denoise and classify one image; return the smallest number of classes of the teachers."""
    x = x.to(checks.model_device(denoiser))
    with in_eval(denoiser):
        checks.denoises(denoiser, x, objective.levels[1])
    counts = [checks.class_count(classifier, x) for classifier in objective.classifiers]
    return min(counts[: len(objective.teachers)], default=None)


@contextmanager
def _frozen(classifiers: Sequence[nn.Module]) -> Iterator[None]:
    """Train no weights of classifiers inside."""
    parameters = [p for c in classifiers for p in c.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def _needed(classifier: Classifier | None) -> Classifier:
    if classifier is None:
        raise InputError("this objective needs a classifier; give one, or surrogates")
    return classifier


@dataclass(frozen=True, slots=True, kw_only=True)
class EDMLoss:
    """E lambda(sigma) ||D(x + n; sigma, y) - x||^2 (Karras et al. 2022, equation 8 and table 1).

    ln(sigma) is normal, lambda(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2, and the
    error is averaged over pixels, in the units of the network.

    Attributes:
        p_mean: Mean of ln(sigma).
        p_std: Standard deviation of ln(sigma).
        drop: Share of images whose class is replaced by the null class, where there is one.

    Raises:
        InputError: A value is out of range.

    Example:
        >>> EDMLoss(p_mean=0.0).p_std
        1.2
    """

    p_mean: float = P_MEAN
    p_std: float = P_STD
    drop: float = 0.1

    def __post_init__(self) -> None:
        checks.plain_fields(self)
        if not 0 <= checks.real("drop", self.drop) < 1:
            raise InputError(f"drop is {self.drop}; give a share in [0, 1)")
        checks.positive("p_std", self.p_std)
        if not math.isfinite(checks.real("p_mean", self.p_mean)):
            raise InputError(f"p_mean is {self.p_mean}; give a finite number")

    def __call__(self, model: nn.Module, x: Images, y: Labels, step: int) -> Tensor:
        """Return the loss of a batch; draws from torch's global random state."""
        assert isinstance(model, DiffusionModel)
        assert isinstance(model.preconditioning, EDM)
        sigma = (self.p_mean + self.p_std * torch.randn(len(x), device=x.device)).exp()
        sigma = sigma / model.scale  # in image units
        x_noisy = x + sigma.reshape(-1, 1, 1, 1) * torch.randn_like(x)
        x_hat = model(x_noisy, sigma, self._labels(model, y)).float()
        level, sigma_data = sigma * model.scale, model.preconditioning.sigma_data
        weight = (level**2 + sigma_data**2) / (level * sigma_data) ** 2
        error = ((x_hat - x) * model.scale).square().mean((1, 2, 3))
        return (weight * error).mean()

    def _labels(self, model: DiffusionModel, y: Labels) -> Labels | None:
        if model.classes is None:
            return None
        checks.labels(y, model.classes)
        drop = self.drop if model.null_class is not None else 0.0
        dropped = torch.rand(len(y), device=y.device) < drop
        return torch.where(dropped, model.null_class or 0, y)


def train_diffusion(
    model: DiffusionModel,
    data: Any,
    loss: EDMLoss | None = None,
    config: TrainingConfig | None = None,
    *,
    run: Path | str | None = None,
    resume: bool = False,
    progress: bool = True,
) -> list[EpochRow]:
    """Train a diffusion model in place, with the loss of EDM; return a row for each epoch.

    Args:
        model: Diffusion model of the family `EDM`.
        data: Images in [0, 1] and labels, as `train` takes them.
        loss: Noise levels and share of dropped classes; by default `EDMLoss()`.
        config: How to train; by default `TrainingConfig()`.
        run: Folder for log and checkpoint; None keeps neither.
        resume: Continue the training in the folder if there is one.
        progress: Show a progress bar.

    Raises:
        InputError: The model is of another family, a label is out of range, or `train` refuses.

    Example:
        >>> class Zero(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.gain = torch.nn.Parameter(torch.ones(1))
        ...     def forward(self, x, c_noise, y):
        ...         return self.gain * x
        >>> data = torch.utils.data.TensorDataset(torch.rand(64, 1, 8, 8), torch.zeros(64).long())
        >>> config = TrainingConfig(epochs=2, batch_size=32)
        >>> rows = train_diffusion(
        ...     DiffusionModel(Zero(), EDM()), data, config=config, progress=False
        ... )
        >>> len(rows)
        2
    """
    if not isinstance(model.preconditioning, EDM):
        kind = type(model.preconditioning).__name__
        raise InputError(f"the preconditioning is {kind}; give a model of EDM")
    loss = EDMLoss() if loss is None else loss
    return train(model, data, loss, config, run=run, resume=resume, progress=progress)
