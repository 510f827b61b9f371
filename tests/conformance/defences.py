"""Every defence of the library and one of a stranger: the rows of the conformance suite.

Those of the library are over the packaged digits networks. A new defence is a new row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial

import torch

from art_denoised import (
    DenoisedSmoothing,
    DiffusionClassifier,
    DiffusionPurification,
    FeatureDenoisingClassifier,
    Purification,
    RobustDiffusionClassifier,
    TrainingConfig,
    train_robust,
)
from art_denoised.data import digits
from art_denoised.demo import digits_classifier, digits_denoiser, digits_diffusion
from art_denoised.diffusion import noise_levels
from art_denoised.estimators.defended import DefendedClassifier
from art_denoised.training import RECIPES
from tests.conformance.stranger import Stranger


@dataclass(frozen=True)
class Defence:
    """How to build one defence, and what is true of it.

    Attributes:
        make: Builds the estimator; ``seed`` fixes its noise or, None, draws it afresh; other
            options are the estimator's own.
        noisy: It draws noise, so that ``seed=None`` makes it a randomized defence.
        flags: What AutoAttack's standard version says of it while its noise is fixed.
        chunked: Options of a small computation, which ``max_batch`` cuts into pieces, and of one
            four times as large; None: it has no pieces.
        bpda: Options that give it an approximate gradient; None: it has exact ones alone.
        eps: A budget in l_inf at which gradient attacks must get through.
        light: Options of a computation so small that it can be trained and attacked in a test.
    """

    make: Callable[..., DefendedClassifier]
    noisy: bool
    flags: frozenset[str] = frozenset()
    chunked: tuple[dict[str, object], dict[str, object]] | None = None
    bpda: dict[str, object] | None = None
    eps: float = 0.3
    light: dict[str, object] = field(default_factory=dict)


def denoised_smoothing(**options: object) -> DenoisedSmoothing:
    defaults = {"sigma": 0.25, "seed": 0, "samples": 8, "input_shape": (1, 8, 8), "nb_classes": 10}
    return DenoisedSmoothing(digits_classifier(), digits_denoiser(), **{**defaults, **options})  # type: ignore[arg-type]


@cache
def _temperature() -> float:
    """Return one fitted on images that are never attacked: at 1 the softmax saturates."""
    data = [digits(train=False)[i] for i in range(200, 500)]
    classifier = DiffusionClassifier(digits_diffusion(), levels=noise_levels(4), seed=0)
    x, y = torch.stack([x for x, _ in data]), torch.tensor([y for _, y in data])
    return classifier.fit_temperature(x, y)


def rdc(levels: int = 4, **options: object) -> RobustDiffusionClassifier:
    defaults = {"steps": 2, "eta": 0.1, "seed": 0, "temperature": _temperature()}
    return RobustDiffusionClassifier(
        digits_diffusion(),
        input_shape=(1, 8, 8),
        levels=noise_levels(levels),
        **{**defaults, **options},  # type: ignore[arg-type]
    )


def purification(steps: int = 3, **options: object) -> DiffusionPurification:
    own = {"gradient": "exact", "seed": 0}
    own = {name: options.pop(name, value) for name, value in own.items()}
    purify = Purification(digits_diffusion(), t=0.05, steps=steps, sampler="sde", **own)  # type: ignore[arg-type]
    return DiffusionPurification(
        purify,
        digits_classifier(),
        input_shape=(1, 8, 8),
        nb_classes=10,
        **options,  # type: ignore[arg-type]
    )


def network(**options: object) -> FeatureDenoisingClassifier:
    return FeatureDenoisingClassifier(
        digits_classifier(), input_shape=(1, 8, 8), nb_classes=10, device_type="cpu", **options
    )


@cache
def _trained(options: tuple[tuple[str, object], ...]) -> dict[str, torch.Tensor]:
    """Return weights after a short adversarial training; fresh blocks would do nothing."""
    model = network(**dict(options)).model
    config = TrainingConfig(epochs=2, optimizer="sgd", lr=0.05, average=0.9, augment="none")
    recipe = replace(RECIPES["sat"], eps=0.1)
    train_robust(model, digits(train=True), recipe, config, progress=False)
    return model.state_dict()


def robust_network(**options: object) -> FeatureDenoisingClassifier:
    """Return one that has been trained, in eval mode; it draws no noise and has no seed."""
    estimator = network(**options)
    estimator.model.load_state_dict(_trained(tuple(options.items())))
    return estimator


class Faced(DefendedClassifier):
    """The ART face of a module that is a defence as it stands."""

    def set_params(self, **kwargs: object) -> None:
        """Set the seed of the module, or parameters of ART."""
        if "seed" in kwargs:
            self.model.seed = kwargs.pop("seed")
        super().set_params(**kwargs)


def stranger(**options: object) -> Faced:
    """Return the face of a defence that imports nothing of ours."""
    return Faced(Stranger(**options), input_shape=(1, 8, 8), nb_classes=10, device_type="cpu")


DEFENCES = {
    "denoised smoothing": Defence(
        denoised_smoothing,
        noisy=True,
        chunked=({"samples": 16, "max_batch": 16}, {"samples": 64, "max_batch": 16}),
    ),
    "RDC": Defence(
        rdc,
        noisy=True,
        flags=frozenset({"dynamic defense"}),  # its forward pass takes gradients of its own
        chunked=({"levels": 4, "max_batch": 20}, {"levels": 16, "max_batch": 20}),
        bpda={"gradient": "bpda"},
        light={"levels": 2, "steps": 1},
    ),
    "purification": Defence(
        purification, noisy=True, bpda={"gradient": "bpda"}, light={"steps": 1}
    ),
    "feature denoising": Defence(
        partial(robust_network, operation="gaussian", where="3"), noisy=False
    ),
    "smooth activations": Defence(
        partial(robust_network, operation=None, activation="silu"), noisy=False
    ),
    "a stranger's": Defence(stranger, noisy=True, bpda={"gradient": "bpda"}),
}
