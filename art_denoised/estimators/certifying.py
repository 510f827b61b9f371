"""The certifying methods of an estimator: a `Smoother` with the estimator's settings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.smoothing.smoother import Smoother
from art_denoised.smoothing.statistics import Certificate, TableRow, accuracy_rows
from art_denoised.smoothing.stops import AtRadii, FixedN, Voting


class CertifyingMixin(ABC):
    """Certification for an ART classifier whose ``model.base`` is smoothed."""

    model: Any
    sigma: float
    alpha: float
    sample_size: int
    nb_classes: int
    clip_values: Any

    def smoother(self, batch_size: int = 32, *, noise: str = "gaussian") -> Smoother:
        """Return the smoother that `certify` and `vote` use; see `Smoother`.

        Args:
            batch_size: Number of noisy images that are classified at once.
            noise: "gaussian", or "quantised" for 8-bit images.

        Raises:
            InputError: A value is out of range, or the model is in training mode.
        """
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
        labels = np.array([certificate.label for certificate in certificates])
        return labels, np.array([certificate.radius for certificate in certificates])

    def certificates(
        self, x: np.ndarray, n: int, batch_size: int = 32, *, noise: str = "gaussian"
    ) -> list[Certificate]:
        """Return what `certify` rests on: a `Certificate` for each image, with counts and seed.

        Args:
            x: Images (batch, channels, height, width) within ``clip_values``.
            n: Number of estimation samples.
            batch_size: Number of noisy images that are classified at once.
            noise: "gaussian", or "quantised" for 8-bit images (docs/certificates.md).

        Raises:
            InputError: See `certify`.
        """
        stop = FixedN(n, n0=self.sample_size, alpha=self.alpha)
        return self.smoother(batch_size, noise=noise).certify(self._check(x), stop)

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

        Each image is sampled until every radius is proved or out of reach; the statement and its
        alpha are those of `certify` with n samples (docs/sequential.md).

        Args:
            x: Images (batch, channels, height, width) within ``clip_values``.
            y: Labels: indices (batch,), or one-hot (batch, nb_classes).
            radii: l2 radii in image units, at least one.
            n: Largest number of estimation samples for an image.
            batch_size: Number of noisy images, of several images, that are classified at once.
            use_labels: Whether to spend no samples on images whose selected class is wrong.
            noise: "gaussian", or "quantised" for 8-bit images.

        Returns:
            A row for each radius, with its 95% interval over images; and the certificates.

        Raises:
            InputError: See `certify`; there is no radius, or the labels do not fit the images.
        """
        stop = AtRadii(radii, n, n0=self.sample_size, alpha=self.alpha, labels=use_labels)
        labels = checks.class_indices(y, self.nb_classes).tolist()
        if len(labels) != len(x):
            raise InputError(
                f"there are {len(x)} images and {len(labels)} labels; give one for each"
            )
        smoother = self.smoother(batch_size, noise=noise)
        certificates = smoother.certify(self._check(x), stop, labels=labels)
        correct = [c.label == label for c, label in zip(certificates, labels, strict=True)]
        return accuracy_rows(correct, [c.radius for c in certificates], stop.radii), certificates

    def vote(self, x: np.ndarray, n: int, batch_size: int = 32) -> np.ndarray:
        """Predict by majority vote over noise (Cohen et al., Predict).

        Args:
            x: Images (batch, channels, height, width) within ``clip_values``.
            n: Number of samples for an image.
            batch_size: Number of noisy images that are classified at once.

        Returns:
            Labels (batch,), -1 where the two leading classes cannot be told apart at ``alpha``.

        Raises:
            InputError: A value is out of range, or images or model cannot be used.
        """
        votes = self.smoother(batch_size).vote(self._check(x), Voting(n, self.alpha))
        return np.array([vote.label for vote in votes])

    @abstractmethod
    def _check(self, x: Any, slack: float = 0.0) -> torch.Tensor: ...

    @abstractmethod
    def _seed_for_call(self) -> int: ...
