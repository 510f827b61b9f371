"""Certify and Predict of Cohen et al. (2019), for one image: votes in, statement out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from art_denoised import checks
from art_denoised.smoothing.sampling import Stage, class_counts, model_device, model_dtype
from art_denoised.smoothing.statistics import Certificate, Vote

if TYPE_CHECKING:
    from art_denoised.types import Classifier, Image


def certify(
    base: Classifier,
    x: Image,
    *,
    sigma: float,
    n0: int = 100,
    n: int = 10_000,
    alpha: float = 0.001,
    seed: int = 0,
    index: int = 0,
    batch_size: int = 64,
) -> Certificate:
    """Certify the smoothed classifier's label on one image (Cohen et al., section 3.2, Certify).

    n0 samples select a class, n fresh samples bound its probability.

    Args:
        base: Base classifier, images to logits; for denoised smoothing a `DenoisedClassifier`.
        x: The image, (channels, height, width), in image units.
        sigma: Standard deviation of the noise in image units.
        n0: Selection samples.
        n: Estimation samples. At alpha = 0.001 the largest radius is 2.46 sigma for 1,000, 3.20
            sigma for 10,000, 3.81 sigma for 100,000.
        alpha: Failure probability of the certificate.
        seed: Seed of the noise. Equal seeds give equal certificates, whatever the batch size.
        index: Index of the image in its data set: images of one run need different noise.
        batch_size: Noisy copies classified at once.

    Raises:
        InputError: A value out of range, an ``n`` that can certify nothing, a model in training
            mode, or a model that does not return logits.

    Example:
        >>> import torch
        >>> base = lambda x: torch.stack([x.mean((1, 2, 3)), -x.mean((1, 2, 3))], dim=1)
        >>> c = certify(base, torch.full((1, 8, 8), 0.5), sigma=0.25, n=1000)
        >>> c.label, c.radius
        (0, 0.615815)
    """
    sigma, alpha = checks.positive("sigma", sigma), checks.alpha(alpha)
    n0, n = checks.count("n0", n0), checks.sample_count(n, alpha)
    seed, batch_size = checks.count("seed", seed, 0), checks.count("batch_size", batch_size)
    checks.eval_mode(base)
    x = x.to(model_device(base))

    def counts(samples: int, stage: Stage) -> dict[int, int]:
        return class_counts(
            base,
            x,
            samples,
            sigma=sigma,
            seed=seed,
            index=index,
            stage=stage,
            batch_size=batch_size,
        )

    return Certificate.from_counts(
        counts(n0, Stage.SELECTION),
        counts(n, Stage.ESTIMATION),
        alpha=alpha,
        sigma=sigma,
        seed=seed,
        dtype=_dtype_name(base),
    )


def vote(
    base: Classifier,
    x: Image,
    *,
    sigma: float,
    n: int = 1000,
    alpha: float = 0.001,
    seed: int = 0,
    index: int = 0,
    batch_size: int = 64,
) -> Vote:
    """Predict the smoothed classifier's label on one image (Cohen et al., section 3.2, Predict).

    Args, Raises: As `certify`; one set of ``n`` samples is used.

    Example:
        >>> import torch
        >>> base = lambda x: torch.stack([x.mean((1, 2, 3)), -x.mean((1, 2, 3))], dim=1)
        >>> vote(base, torch.full((1, 8, 8), 0.5), sigma=0.25, n=100).label
        0
    """
    sigma, alpha = checks.positive("sigma", sigma), checks.alpha(alpha)
    n, seed = checks.count("n", n), checks.count("seed", seed, 0)
    batch_size = checks.count("batch_size", batch_size)
    checks.eval_mode(base)
    counts = class_counts(
        base,
        x.to(model_device(base)),
        n,
        sigma=sigma,
        seed=seed,
        index=index,
        stage=Stage.VOTE,
        batch_size=batch_size,
    )
    return Vote.from_counts(counts, alpha=alpha, sigma=sigma, seed=seed, dtype=_dtype_name(base))


def _dtype_name(base: object) -> str:
    return str(model_dtype(base)).removeprefix("torch.")
