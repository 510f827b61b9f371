"""Defences by diffusion models as estimators of the Adversarial Robustness Toolbox."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.diffusion.cost import Cost, preview_cost
from art_denoised.diffusion.levels import Levels
from art_denoised.diffusion.model import DiffusionModel
from art_denoised.estimators.defended import RandomDefence
from art_denoised.purification.classifier import PurifiedClassifier, Vote
from art_denoised.purification.purification import Purification
from art_denoised.rdc.classifier import DiffusionClassifier
from art_denoised.rdc.likelihood import (
    Form,
    FormName,
    Gradient,
    LikelihoodMaximization,
    chen2024_settings,
    named_form,
)


class _DiffusionDefence(RandomDefence):
    """A defence that knows how often it evaluates its diffusion model."""

    _shown = ("seed", "nfe")

    def cost(self, images: int = 1) -> Cost:
        """Count what a prediction of so many images, and its gradient, takes; it runs one pass."""
        return preview_cost(self.model, self.input_shape, images=images)


class RobustDiffusionClassifier(_DiffusionDefence):
    """Likelihood maximization, then a diffusion model as Bayes classifier.

    ``.model`` is ``nn.Sequential(LikelihoodMaximization, DiffusionClassifier)``, from images to
    logits; predictions, losses and gradients are all of that module. Gradients are exact unless
    ``gradient="bpda"`` is asked for, which flatters the defence.

    Source: Chen et al., "Robust Classification via a Single Diffusion Model" (ICML 2024, arXiv
    2305.15241).

    Args:
        diffusion: Class-conditional diffusion model, in eval mode.
        input_shape: (channels, height, width).
        unconditional: Diffusion model for likelihood maximization; None: ``diffusion``, which must
            have a null class then.
        steps: Number of likelihood-maximization steps; 0 disables it.
        eta: Largest change of a pixel by likelihood maximization; "adam_reference" ignores it.
        form: Form of likelihood maximization: "adam", "adam_reference" or "momentum", or `Adam` or
            `Momentum` for other settings.
        gradient: "exact", or "bpda" for the identity in its place.
        lr: Learning rate of likelihood maximization.
        levels: Noise levels of the classifier and of the momentum form.
        prior: Prior probability of each class; uniform by default.
        temperature: Divisor of the logits.
        max_batch: Number of noisy images that go through the network at once.
        bf16: Whether the network runs under autocast to bfloat16.
        recompute: Whether pieces are recomputed in the backward pass, to save memory.
        seed: Seed of all noise, which makes the defence deterministic; None draws fresh noise in
            every call, to be attacked with EOT.
        **kwargs: ``loss``, ``optimizer``, ``device_type`` and further arguments of
            PyTorchClassifier. Preprocessing and postprocessing are refused.

    Raises:
        InputError: A value is out of range, or the model cannot take such images.

    Example:
        >>> from art_denoised.demo import digits_diffusion
        >>> from art_denoised.diffusion.levels import noise_levels
        >>> from art_denoised.data import load_data
        >>> rdc = RobustDiffusionClassifier(
        ...     digits_diffusion(), input_shape=(1, 8, 8), eta=0.1, levels=noise_levels(8), seed=0
        ... )
        >>> x, label = load_data("digits")[0]
        >>> int(rdc.predict(x[None].numpy()).argmax()) == label
        True
    """

    def __init__(
        self,
        diffusion: DiffusionModel,
        *,
        input_shape: tuple[int, int, int],
        unconditional: DiffusionModel | None = None,
        steps: int = 5,
        eta: float = 8 / 255,
        form: FormName | Form = "adam",
        gradient: Gradient = "exact",
        lr: float = 0.05,
        levels: Levels | None = None,
        prior: Sequence[float] | None = None,
        temperature: float = 1.0,
        max_batch: int = 512,
        bf16: bool = False,
        recompute: bool = True,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        maximized = diffusion if unconditional is None else unconditional
        for model in (diffusion, maximized):
            checks.eval_mode(model)
        if isinstance(form, str):
            form = named_form(form, lr=lr, levels=levels)
        noise: dict[str, Any] = {"seed": seed, "bf16": bf16}
        options = {"levels": levels, "prior": prior, "temperature": temperature, **noise}
        options |= {"max_batch": max_batch, "recompute": recompute}
        classifier = DiffusionClassifier(diffusion, **options)
        stages: list[nn.Module] = [classifier]
        if checks.count("steps", steps, 0):
            purify = LikelihoodMaximization(
                maximized, steps=steps, eta=eta, form=form, gradient=gradient, **noise
            )
            stages.insert(0, purify)
        classes, whole = classifier.classes, nn.Sequential(*stages)
        super().__init__(whole, input_shape=input_shape, nb_classes=classes, **kwargs)

    @classmethod
    def chen2024(
        cls,
        diffusion: DiffusionModel,
        unconditional: DiffusionModel | None = None,
        *,
        input_shape: tuple[int, int, int] = (3, 32, 32),
        levels: int = 125,
        **options: Any,
    ) -> RobustDiffusionClassifier:
        """Build the classifier with the settings of the release (`art_denoised.rdc.likelihood`).

        Args:
            diffusion: Class-conditional diffusion model, such as edm-cifar10-32x32-cond-vp.pkl.
            unconditional: Model of likelihood maximization: edm-cifar10-32x32-uncond-vp.pkl.
            input_shape: (channels, height, width).
            levels: Number of noise levels; the release also uses 1,000.
            **options: Further arguments of the class: gradient, seed, max_batch and so on.

        Raises:
            InputError: A model cannot be used so, or an option is one of the release's settings.
        """
        settings = {**chen2024_settings(levels, input_shape), "steps": 5}
        if fixed := sorted({*settings, "lr", "eta"} & options.keys()):
            raise InputError(f"{fixed[0]} belongs to the release; leave it out, or use the class")
        options |= {"unconditional": unconditional, "input_shape": input_shape}
        return cls(diffusion, **settings, **options)

    def fit_temperature(self, x: np.ndarray, y: np.ndarray) -> float:
        """Fit the classifier's temperature on what likelihood maximization makes of images.

        Args:
            x: Held-out images, (batch, channels, height, width) in [0, 1].
            y: Their classes, in any form that ART takes.

        Returns:
            The temperature, which is also set.

        Raises:
            InputError: Images and labels do not fit each other, or the model.
        """
        device = next(self.model.parameters()).device
        images = checks.images(x, shape=self.input_shape).float().to(device)
        labels = checks.class_indices(y, self.nb_classes).to(device)
        with torch.no_grad():
            purified = self.model[:-1](images)
        return float(self.model[-1].fit_temperature(purified, labels))

    @property
    def nfe(self) -> int:
        """Number of evaluations of the diffusion model for a prediction of one image."""
        return sum(stage.nfe() for stage in self.model)

    @property
    def _random(self) -> list[nn.Module]:
        return [*self.model]


class DiffusionPurification(_DiffusionDefence):
    """Purification by a diffusion model, then a pretrained classifier.

    ``.model`` is a `PurifiedClassifier`, from images to log-probabilities; predictions, losses and
    gradients are all of that module. Gradients are those of ``purification.gradient``, exact by
    default. `fit` trains the classifier alone.

    Sources: Nie et al., "Diffusion Models for Adversarial Purification" (ICML 2022, arXiv
    2205.07460), and those of `Purification`.

    Args:
        purification: Purification, with a diffusion model in eval mode.
        classifier: Images to logits, in eval mode.
        input_shape: (channels, height, width).
        nb_classes: Number of classes.
        copies: Number of purified copies of each image.
        vote: "mean" (of the softmax) or "majority".
        **kwargs: ``loss``, ``optimizer``, ``device_type`` and further arguments of
            PyTorchClassifier. Preprocessing and postprocessing are refused.

    Raises:
        InputError: A value is out of range, or a model cannot take such images.

    Example:
        >>> from art_denoised import Purification
        >>> from art_denoised.data import load_data
        >>> from art_denoised.demo import digits_classifier, digits_diffusion
        >>> purify = Purification(digits_diffusion(), t=0.1, steps=4, sampler="ddim", seed=0)
        >>> defence = DiffusionPurification(
        ...     purify, digits_classifier(), input_shape=(1, 8, 8), nb_classes=10
        ... )
        >>> x, label = load_data("digits")[0]
        >>> int(defence.predict(x[None].numpy()).argmax()) == label
        True
    """

    def __init__(
        self,
        purification: Purification,
        classifier: nn.Module,
        *,
        input_shape: tuple[int, int, int],
        nb_classes: int,
        copies: int = 1,
        vote: Vote = "mean",
        **kwargs: Any,
    ) -> None:
        for model in (purification, classifier):
            checks.eval_mode(model)
        model = PurifiedClassifier(purification, classifier, copies=copies, vote=vote)
        super().__init__(model, input_shape=input_shape, nb_classes=nb_classes, **kwargs)

    @property
    def nfe(self) -> int:
        """Number of evaluations of the diffusion model for a prediction of one image."""
        return self.model.nfe()

    @property
    def _random(self) -> list[nn.Module]:
        return [self.model.purifier]

    @property
    def _trained_by_fit(self) -> nn.Module | None:
        return self.model.classifier
