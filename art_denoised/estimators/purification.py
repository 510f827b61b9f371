"""Diffusion purification in front of a classifier, as an ART estimator."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from art_denoised import checks
from art_denoised.diffusion.cost import Cost, preview_cost
from art_denoised.estimators.defended import DefendedClassifier
from art_denoised.purification.classifier import PurifiedClassifier, Vote
from art_denoised.purification.purification import Purification


class DiffusionPurification(DefendedClassifier):
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

    estimator_params: ClassVar[list[str]] = [*DefendedClassifier.estimator_params, "seed"]
    _shown = ("seed", "nfe")

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
        super().__init__(
            PurifiedClassifier(purification, classifier, copies=copies, vote=vote),
            input_shape=input_shape,
            nb_classes=nb_classes,
            **kwargs,
        )

    @property
    def seed(self) -> int | None:
        """Seed of the noise; None: fresh noise in every call. It may be set."""
        return self.model.purifier.seed

    @seed.setter
    def seed(self, value: int | None) -> None:
        self.model.purifier.seed = value if value is None else checks.count("seed", value, 0)

    def cost(self, images: int = 1) -> Cost:
        """Count what a prediction of so many images, and its gradient, will take.

        Args:
            images: Number of images in the run.
        """
        return preview_cost(self.model, self.input_shape, images=images)

    @property
    def nfe(self) -> int:
        """Number of evaluations of the diffusion model for a prediction of one image."""
        return self.model.nfe()

    @property
    def _trained_by_fit(self) -> nn.Module | None:
        return self.model.classifier
