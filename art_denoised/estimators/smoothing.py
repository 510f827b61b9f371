"""Denoised smoothing as an estimator of the Adversarial Robustness Toolbox."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from art.estimators.certification.randomized_smoothing.randomized_smoothing import (
    RandomizedSmoothingMixin,
)
from art.estimators.classification.pytorch import PyTorchClassifier
from torch import nn

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.estimators.defended import RandomDefence, same_range, without_preprocessing
from art_denoised.smoothing.noise import fresh_seed
from art_denoised.smoothing.smoother import DenoisedClassifier, SmoothedClassifier, Smoother
from art_denoised.smoothing.statistics import Certificate, TableRow, accuracy_rows
from art_denoised.smoothing.stops import AtRadii, FixedN, Voting
from art_denoised.training.config import TrainingConfig
from art_denoised.training.denoising import DenoiserLoss, Objective, train_denoiser
from art_denoised.types import Denoiser


class DenoisedSmoothing(RandomDefence, RandomizedSmoothingMixin):
    """Denoiser + pretrained classifier + randomized smoothing: labels with certified l2 radii.

    `predict`, `compute_loss`, `loss_gradient` and `class_gradient` are all of one function: the
    `SmoothedClassifier` in ``.model``, whose outputs are log-probabilities. `certify` and `vote`
    sample the base classifier behind it. Noise is in the units of the images everywhere.

    Source: Salman et al., "Denoised Smoothing" (NeurIPS 2020, arXiv 2003.01908); Cohen et al.
    (ICML 2019, arXiv 1902.02918) for `certify` and `vote`.

    Args:
        classifier: Images to logits, in eval mode: an nn.Module, or an ART PyTorchClassifier, whose
            preprocessing then becomes part of the base classifier, behind the noise.
        denoiser: ``denoiser(x_noisy, sigma) -> x_hat``; None is plain randomized smoothing.
        sigma: Standard deviation of the noise in image units.
        input_shape: (channels, height, width).
        nb_classes: Number of classes.
        clip_values: Smallest and largest pixel value. None takes those of an ART classifier, else
            (0, 1). ``sigma`` and the input of the denoiser use the same units.
        sample_size: n0, the samples that select the class in `certify`.
        alpha: Failure probability of `certify` and `vote`, for each image.
        seed: Fixes all noise; None draws it afresh in every call.
        samples: Noise samples in `predict` and in gradients.
        max_batch: Noisy images that go through the base classifier at once in these.
        **kwargs: ``loss``, ``optimizer``, ``device_type`` and further arguments of
            PyTorchClassifier. Preprocessing and postprocessing are refused: they belong to
            ``classifier``. The loss takes log-probabilities, which cross-entropy leaves as they
            are. The optimizer is for ART's trainers; `fit` makes its own.

    Raises:
        InputError: A value is out of range, ``clip_values`` differ from those of the ART
            classifier, a model is in training mode, or it does not return ``nb_classes`` logits
            for images of ``input_shape``.

    Example:
        >>> import torch
        >>> from art_denoised.demo import digits_classifier, digits_denoiser
        >>> from art_denoised.data import load_data
        >>> smoothed = DenoisedSmoothing(
        ...     digits_classifier(), digits_denoiser(), sigma=0.25, input_shape=(1, 8, 8),
        ...     nb_classes=10, seed=0,
        ... )
        >>> x = load_data("digits")[0][0][None].numpy()
        >>> labels, radii = smoothed.certify(x, n=200)
        >>> labels.tolist(), bool(radii[0] > 0.1)
        ([2], True)
    """

    _any_range = True
    _shown = ("sigma", "samples", "seed")
    estimator_params: ClassVar[list[str]] = [
        *RandomDefence.estimator_params,
        *("sigma", "sample_size", "alpha", "samples", "max_batch"),
    ]

    def __init__(
        self,
        classifier: nn.Module | PyTorchClassifier,
        denoiser: Denoiser | None = None,
        *,
        sigma: float,
        input_shape: tuple[int, int, int],
        nb_classes: int,
        clip_values: tuple[Any, Any] | None = None,
        sample_size: int = 100,
        alpha: float = 0.001,
        seed: int | None = None,
        samples: int = 32,
        max_batch: int = 256,
        **kwargs: Any,
    ) -> None:
        clip_values = _clip_values(classifier, clip_values)
        sigma = checks.sigma(sigma, clip_values)
        base = without_preprocessing(classifier)
        for part in (base, denoiser):
            checks.eval_mode(part)
        if denoiser is not None:
            base = DenoisedClassifier(base, denoiser, sigma=sigma)
        super().__init__(
            SmoothedClassifier(base, sigma=sigma, samples=samples, seed=seed, max_batch=max_batch),
            input_shape=input_shape,
            nb_classes=nb_classes,
            clip_values=clip_values,
            **kwargs,
        )
        self.sample_size = checks.count("sample_size", sample_size)
        self.alpha = checks.alpha(alpha)

    @property
    def sigma(self) -> float:
        """Noise level in image units, of the noise and of what the denoiser is told."""
        return self.model.sigma

    @sigma.setter
    def sigma(self, value: float) -> None:
        value = checks.sigma(value, self.clip_values)
        self.model.sigma = value
        if isinstance(self.model.base, DenoisedClassifier):
            self.model.base.sigma = value

    @property
    def scale(self) -> float:
        """ART's name for sigma."""
        return self.sigma

    @property
    def samples(self) -> int:
        """Noise samples in `predict` and in gradients."""
        return self.model.samples

    @samples.setter
    def samples(self, value: int) -> None:
        self.model.samples = checks.count("samples", value)

    @property
    def max_batch(self) -> int:
        """Noisy images that go through the base classifier at once."""
        return self.model.max_batch

    @max_batch.setter
    def max_batch(self, value: int) -> None:
        self.model.max_batch = checks.count("max_batch", value)

    def smoother(self, batch_size: int = 32, *, noise: str = "gaussian") -> Smoother:
        """Return the `Smoother` with these settings, by which `certify` and `vote` sample."""
        return Smoother(
            self.model.base,
            sigma=self.sigma,
            noise=noise,
            seed=self._seed_for_call(),
            batch_size=batch_size,
            clip_values=self.clip_values,
        )

    def certify(self, x: np.ndarray, n: int, batch_size: int = 32) -> tuple[np.ndarray, np.ndarray]:
        """Certify images: ``sample_size`` samples select a class, ``n`` more bound it.

        Args:
            x: Images (batch, channels, height, width) within ``clip_values``.
            n: Number of estimation samples.
            batch_size: Number of noisy images that are classified at once.

        Returns:
            Labels (batch,), -1 for an abstention, and l2 radii (batch,) in image units, 0 there.

        Raises:
            InputError: A value is out of range, ``n`` samples can certify nothing, or images or
                model cannot be used.
        """
        certificates = self.certificates(x, n, batch_size)
        labels = np.array([certificate.label for certificate in certificates], np.int64)
        return labels, np.array([certificate.radius for certificate in certificates], np.float64)

    def certificates(
        self, x: np.ndarray, n: int, batch_size: int = 32, *, noise: str = "gaussian"
    ) -> list[Certificate]:
        """Return what `certify` rests on: a `Certificate` for each image, with counts and seed.

        ``noise`` may be "quantised" for 8-bit images (docs/explanation/certificates.md).
        """
        stop = FixedN(n, n0=self.sample_size, alpha=self.alpha)
        smoother, images = self.smoother(batch_size, noise=noise), self._clean(x)
        return smoother.certify(images, stop) if len(images) else []

    def certify_table(
        self,
        x: np.ndarray,
        y: np.ndarray,
        radii: Sequence[float],
        n: int = 100_000,
        batch_size: int = 32,
        *,
        use_labels: bool = True,
        noise: str = "gaussian",
    ) -> tuple[list[TableRow], list[Certificate]]:
        """Return certified accuracy at each radius, from as few samples as that takes.

        Each image is sampled until every radius is proved or out of reach (`AtRadii`).

        Args:
            x: Images (batch, channels, height, width) within ``clip_values``, at least one.
            y: Labels: indices (batch,), or one-hot (batch, nb_classes).
            radii: l2 radii in image units, at least one.
            n: Largest number of estimation samples for an image.
            batch_size: Number of noisy images, of several images, that are classified at once.
            use_labels: Whether to spend no samples on images whose selected class is wrong.
            noise: "gaussian", or "quantised" for 8-bit images.

        Returns:
            A row for each radius, with its 95% interval over images; and the certificates.
        """
        stop = AtRadii(radii, n, n0=self.sample_size, alpha=self.alpha, labels=use_labels)
        images, labels = self._clean(x), checks.class_indices(y, self.nb_classes).tolist()
        smoother = self.smoother(batch_size, noise=noise)
        certificates = smoother.certify(images, stop, labels=labels)
        correct = [c.label == label for c, label in zip(certificates, labels, strict=True)]
        return accuracy_rows(correct, [c.radius for c in certificates], stop.radii), certificates

    def vote(self, x: np.ndarray, n: int, batch_size: int = 32) -> np.ndarray:
        """Return the labels (batch,) by majority vote over n samples (Cohen et al., Predict).

        -1 stands where the two leading classes cannot be told apart at ``alpha``.
        """
        smoother, images = self.smoother(batch_size), self._clean(x)
        votes = smoother.vote(images, Voting(n, self.alpha)) if len(images) else []
        return np.array([vote.label for vote in votes], np.int64)

    def fit(
        self,
        x: np.ndarray,
        y: np.ndarray,
        batch_size: int = 128,
        nb_epochs: int = 20,
        *,
        objective: str | DenoiserLoss = "classification",
        lr: float = 1e-3,
        augment: str = "none",
        verbose: bool = False,
        **kwargs: Any,
    ) -> None:
        """Train the denoiser at ``sigma``, the classifier frozen (Salman et al., section 3).

        By default the labels are used, as ART's trainers expect. "mse" and "stability" ignore
        them, as in the paper. `art_denoised.training` has other schedules, surrogates and
        checkpoints.

        Args:
            x: Clean images (batch, channels, height, width) in [0, 1].
            y: Labels: indices (batch,), or one-hot (batch, nb_classes).
            batch_size: Number of images in a step.
            nb_epochs: Number of passes over the images.
            objective: "mse", "stability", "classification", "hybrid", or a function
                ``loss(x_hat, x, y, classifier)``.
            lr: Peak learning rate.
            augment: "crop+flip", "crop" or "none".
            verbose: Show progress.
            **kwargs: Ignored, as in ART.

        Raises:
            InputError: There is no denoiser with parameters, images are not in [0, 1], or a value
                is out of range.
        """
        base, denoiser = self.model.base, self._trained_by_fit
        if denoiser is None:
            raise InputError("there is no denoiser to train; construct with a denoiser network")
        checks.unit_range("the training of denoisers", self.clip_values)
        images, labels = self._clean(x), checks.class_indices(y, self.nb_classes)
        checks.one_each(images, labels)
        config = TrainingConfig(
            epochs=nb_epochs,
            batch_size=batch_size,
            lr=lr,
            augment=augment,  # type: ignore[arg-type]
            seed=self._seed_for_call(),
        )
        train_denoiser(
            denoiser,
            torch.utils.data.TensorDataset(images, labels),
            Objective(objective, sigma=self.sigma, classifier=base.classifier),
            config,
            progress=verbose,
        )

    def fit_generator(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: ART's loop would train the classifier, which `fit` leaves alone."""
        raise InputError("fit_generator would train the classifier too; give arrays to fit")

    def predict(self, x: np.ndarray, *args: Any, **kwargs: Any) -> np.ndarray:
        """Return the log-probabilities of ``.model``; `vote` and `certify` may abstain."""
        if kwargs.get("is_abstain"):
            raise InputError("is_abstain is True, but predict never abstains; call vote")
        return super().predict(x, *args, **kwargs)

    def loss_gradient(self, x: Any, y: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the gradient of the loss of ``.model``, through noise as in `predict`."""
        if not kwargs.get("sampling", True):
            raise InputError(
                "sampling is False, but gradients are those of predict; for the classifier without "
                "noise, put it into a PyTorchClassifier"
            )
        return super().loss_gradient(x, y, *args, **kwargs)

    def set_params(self, **kwargs: Any) -> None:
        """Set parameters by name, as in ART; those of the noise reach the model too."""
        if "alpha" in kwargs:
            kwargs["alpha"] = checks.alpha(kwargs["alpha"])
        if "sample_size" in kwargs:
            kwargs["sample_size"] = checks.count("sample_size", kwargs["sample_size"])
        super().set_params(**kwargs)

    @property
    def _trained_by_fit(self) -> nn.Module | None:
        denoiser = getattr(self.model.base, "denoiser", None)
        trainable = isinstance(denoiser, nn.Module) and any(True for _ in denoiser.parameters())
        return denoiser if trainable else None

    def _clean(self, x: Any) -> torch.Tensor:
        """Return images that are no attack's: each pixel must be in range."""
        x = checks.batch(x).detach()
        if tuple(x.shape) == (0, *self.input_shape):
            return x.float()
        return checks.images(x, clip_values=self.clip_values, shape=self.input_shape).float()

    def _seed_for_call(self) -> int:
        return fresh_seed() if self.seed is None else self.seed


def _clip_values(classifier: Any, given: tuple[Any, Any] | None) -> tuple[Any, Any]:
    """Return the pixel range: as given, which must be that of an ART classifier."""
    own = classifier.clip_values if isinstance(classifier, PyTorchClassifier) else None
    if given is None:
        return (0.0, 1.0) if own is None else (own[0], own[1])
    if own is not None and not same_range(checks.pixel_bounds(given), own):
        raise InputError(
            f"clip_values are {checks.shown(given)} but those of the ART classifier are "
            f"({np.min(own[0]):g}, {np.max(own[1]):g}); leave clip_values out"
        )
    return given
