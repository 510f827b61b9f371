"""The certifying methods of an estimator, over many images at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.smoothing.certify import certification_plan, find_noise, sampling_record
from art_denoised.smoothing.packing import Task, run_packed, takes_channels_last
from art_denoised.smoothing.procedures import Procedure, certifying, voting
from art_denoised.smoothing.statistics import Certificate, TableRow, Vote, accuracy_rows

T = TypeVar("T")


class CertifyingMixin(ABC):
    """Certification for an ART classifier whose ``model.base`` is smoothed."""

    model: Any
    sigma: float
    alpha: float
    sample_size: int
    nb_classes: int
    input_shape: tuple[int, ...]
    clip_values: Any
    device: torch.device

    def certify(self, x: np.ndarray, n: int, batch_size: int = 32) -> tuple[np.ndarray, np.ndarray]:
        """Certify each image: ``sample_size`` samples select a class, ``n`` more bound it.

        Args:
            x: Images (batch, channels, height, width) within ``clip_values``.
            n: Estimation samples.
            batch_size: Noisy copies classified at once; changes nothing but speed.

        Returns:
            Labels (batch,), -1 where it abstains, and l2 radii (batch,) in image units, 0 there.

        Raises:
            InputError: As for the constructor, or an ``n`` too small to certify anything.
        """
        certificates = self.certificates(x, n, batch_size)
        labels = np.array([certificate.label for certificate in certificates])
        return labels, np.array([certificate.radius for certificate in certificates])

    def certificates(
        self, x: np.ndarray, n: int, batch_size: int = 32, *, noise: str = "gaussian"
    ) -> list[Certificate]:
        """Return what `certify` rests on: a `Certificate` an image, with counts and seed.

        Args:
            x: As for `certify`.
            n: As for `certify`.
            batch_size: As for `certify`.
            noise: "gaussian", or "quantised" for 8-bit images (docs/certificates.md).

        Raises:
            InputError: As for `certify`.
        """
        plan = certification_plan(n0=self.sample_size, n=n, alpha=self.alpha)
        return self._answers(x, lambda i, record: certifying(**plan, **record), batch_size, noise)

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
            radii: l2 radii in image units.
            n: Most estimation samples of an image.
            batch_size: Noisy copies classified at once, of several images; changes nothing but
                speed.
            use_labels: Spend no samples on images whose selected class is wrong.
            noise: As for `certificates`.

        Returns:
            A row a radius, with its 95% interval over images; and the certificate of each image.

        Raises:
            InputError: As for `certify`; no radii; labels that do not fit the images.
        """
        plan = certification_plan(n0=self.sample_size, n=n, alpha=self.alpha, radii=radii)
        if not plan["radii"]:
            raise InputError("radii is empty; give at least one l2 radius, or use certify")
        labels = checks.class_indices(y, self.nb_classes).tolist()
        if len(labels) != len(x):
            raise InputError(f"there are {len(x)} images and {len(labels)} labels; give one each")

        def procedure(i: int, record: dict[str, Any]) -> Procedure[Certificate]:
            return certifying(**plan, label=labels[i] if use_labels else None, **record)

        certificates = self._answers(x, procedure, batch_size, noise)
        correct = [c.label == label for c, label in zip(certificates, labels, strict=True)]
        return accuracy_rows(correct, [c.radius for c in certificates], plan["radii"]), certificates

    def vote(self, x: np.ndarray, n: int, batch_size: int = 32) -> np.ndarray:
        """Predict by majority vote over noise (Cohen et al., Predict).

        Args:
            x: Images (batch, channels, height, width) within ``clip_values``.
            n: Samples an image.
            batch_size: Noisy copies classified at once; changes nothing but speed.

        Returns:
            Labels (batch,), -1 where the two leading classes cannot be told apart at ``alpha``.
        """
        n = checks.count("n", n)

        def procedure(i: int, record: dict[str, Any]) -> Procedure[Vote]:
            return voting(n, alpha=self.alpha, **record)

        return np.array([answer.label for answer in self._answers(x, procedure, batch_size)])

    def _answers(
        self,
        x: Any,
        procedure: Callable[[int, dict[str, Any]], Procedure[T]],
        batch_size: int,
        noise: str = "gaussian",
    ) -> list[T]:
        """Run a procedure on each image, packed into batches."""
        base, images = self.model.base, self._check(x).to(self.device)
        checks.eval_mode(base)
        kind, seed = find_noise(noise, self.sigma, self.clip_values), self._seed_for_call()
        record = sampling_record(base, kind, self.input_shape, seed)
        answers = dict(
            run_packed(
                base,
                (Task(i, image, procedure(i, record)) for i, image in enumerate(images)),
                noise=kind,
                seed=seed,
                batch_size=checks.count("batch_size", batch_size),
                channels_last=takes_channels_last(base, images[0]),
            )
        )
        return [answers[i] for i in range(len(images))]

    @abstractmethod
    def _check(self, x: Any, slack: float = 0.0) -> torch.Tensor: ...

    @abstractmethod
    def _seed_for_call(self) -> int: ...
