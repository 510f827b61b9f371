"""Certify and Predict of Cohen et al. (2019), for one image: votes in, statement out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

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
    clip_values: tuple[Any, Any] = (0.0, 1.0),
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
        clip_values: Smallest and largest pixel value; sigma is in the same units.

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
    alpha = checks.alpha(alpha)
    n0, n = checks.count("n0", n0), checks.sample_count(n, alpha)
    sampling = _check(base, sigma, seed, index, batch_size, clip_values)
    x = _check_image(base, x, clip_values)
    return Certificate.from_counts(
        class_counts(base, x, n0, stage=Stage.SELECTION, **sampling),
        class_counts(base, x, n, stage=Stage.ESTIMATION, **sampling),
        alpha=alpha,
        sigma=sampling["sigma"],
        seed=sampling["seed"],
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
    clip_values: tuple[Any, Any] = (0.0, 1.0),
) -> Vote:
    """Predict the smoothed classifier's label on one image (Cohen et al., section 3.2, Predict).

    Args, Raises: As `certify`; one set of ``n`` samples is used.

    Example:
        >>> import torch
        >>> base = lambda x: torch.stack([x.mean((1, 2, 3)), -x.mean((1, 2, 3))], dim=1)
        >>> vote(base, torch.full((1, 8, 8), 0.5), sigma=0.25, n=100).label
        0
    """
    alpha, n = checks.alpha(alpha), checks.count("n", n)
    sampling = _check(base, sigma, seed, index, batch_size, clip_values)
    x = _check_image(base, x, clip_values)
    return Vote.from_counts(
        class_counts(base, x, n, stage=Stage.VOTE, **sampling),
        alpha=alpha,
        sigma=sampling["sigma"],
        seed=sampling["seed"],
        dtype=_dtype_name(base),
    )


def _check(
    base: object,
    sigma: float,
    seed: int,
    index: int,
    batch_size: int,
    clip_values: tuple[Any, Any],
) -> dict[str, Any]:
    checks.eval_mode(base)
    return {
        "sigma": checks.sigma(sigma, clip_values),
        "seed": checks.count("seed", seed, 0),
        "index": checks.count("index", index, 0),
        "batch_size": checks.count("batch_size", batch_size),
    }


def _check_image(base: object, x: Image, clip_values: tuple[Any, Any]) -> Image:
    image = checks.images(torch.as_tensor(x)[None], clip_values=clip_values)[0]
    return image.float().to(model_device(base))


def _dtype_name(base: object) -> str:
    return str(model_dtype(base)).removeprefix("torch.")
