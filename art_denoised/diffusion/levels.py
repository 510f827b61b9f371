"""Noise levels of a diffusion loss, their weights w(sigma), and the noise of each.

A diffusion loss is an integral over noise levels; once discretised it is sum_l w_l ||D(x + sigma_l
eps; sigma_l) - x||^2. The weight of a level is the loss's weighting lambda(sigma) times the length
of the interval (or the share of the probability) that the level stands for.

Noise levels are in the units of the network, [-1, 1] as a rule, as in the papers.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from scipy import special

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.diffusion.preconditioning import DDPM, Preconditioning

if TYPE_CHECKING:
    from art_denoised.types import Images

Weighting = Literal["edm", "vp_uniform", "elbo", "rdc_legacy"]
Spacing = Literal["lognormal", "linear"]

P_MEAN, P_STD = -1.2, 1.2  # Karras et al. 2022, table 1
SIGMA_DATA = 0.5
"""Standard deviation of images in [-1, 1] that EDM assumes (Karras et al. 2022, table 1)."""


@dataclass(frozen=True)
class Levels:
    """Noise levels and their weights, in the units of the network.

    Attributes:
        sigmas: Noise levels, rising.
        weights: Weights, positive.

    Raises:
        InputError: The numbers of levels and weights differ, or a number is not positive.

    Example:
        >>> Levels((0.5, 1.0), (2.0, 1.0)).sigmas
        (0.5, 1.0)
    """

    sigmas: tuple[float, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("sigmas", "weights"):
            numbers = (checks.positive("noise level or weight", n) for n in getattr(self, name))
            object.__setattr__(self, name, tuple(numbers))
        if not self.sigmas or len(self.sigmas) != len(self.weights):
            raise InputError(
                f"there are {len(self.sigmas)} noise levels and {len(self.weights)} weights; give "
                "one each"
            )

    def above(self, sigma: float) -> Levels:
        """Return the levels of at least ``sigma``, for images that already hold that much noise."""
        return self.within(sigma, math.inf)

    def within(self, low: float, high: float) -> Levels:
        """Return the levels from ``low`` to ``high``, for example the range of a training.

        Raises:
            InputError: No level lies in between.

        Example:
            >>> noise_levels(4).within(0.1, 1.0).sigmas == noise_levels(4).sigmas[1:3]
            True
        """
        pairs = [(s, w) for s, w in zip(self.sigmas, self.weights, strict=True) if low <= s <= high]
        return Levels(tuple(s for s, _ in pairs), tuple(w for _, w in pairs))


def noise_levels(
    count: int,
    weighting: Weighting = "edm",
    spacing: Spacing = "lognormal",
    *,
    p_mean: float = P_MEAN,
    p_std: float = P_STD,
) -> Levels:
    """Discretise a diffusion loss.

    Args:
        count: Number of levels.
        weighting: Weight of a level. "edm": (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 under
            the log-normal p(sigma) of the training (Karras et al. 2022). "vp_uniform": 1 / sigma^2
            under the same p, the unweighted noise prediction error. "elbo": dsigma / sigma^3
            (Kingma et al. 2021). "rdc_legacy": weights of the reference code of Chen et al. (ICML
            2024). An operator precedence slip gives its log-normal the deviation 1 / P_std, and its
            error is the mean over pixels: multiply by the number of pixel values to compare.
        spacing: Position of the levels. "lognormal": the middles of ``count`` intervals of equal
            probability under p(sigma); few levels suffice. "linear": ``count`` + 1 levels from 1e-4
            to 3 without the last, as in the reference code.
        p_mean: Mean of ln(sigma) in the training.
        p_std: Standard deviation of ln(sigma) in the training.

    Raises:
        InputError: A value is out of range.

    Example:
        >>> levels = noise_levels(4)
        >>> [round(sigma, 3) for sigma in levels.sigmas]
        [0.076, 0.205, 0.441, 1.198]
    """
    count = checks.count("levels", count)
    checks.choice("weighting", weighting, get_args(Weighting))
    checks.choice("spacing", spacing, get_args(Spacing))
    if spacing == "lognormal":
        p_mean, p_std = checks.real("p_mean", p_mean), checks.positive("p_std", p_std)
        if not math.isfinite(p_mean):
            raise InputError(f"p_mean is {p_mean}; give a finite number")
        if weighting == "rdc_legacy":
            raise InputError("rdc_legacy is defined on the linear spacing; give spacing 'linear'")
        middles = (np.arange(count) + 0.5) / count
        sigma = np.exp(p_mean + p_std * special.ndtri(middles))
        share = 1 / count / _density(sigma, p_mean, p_std)  # dsigma that a level stands for
    else:
        low, high = 1e-4, 3.0  # of the reference code
        sigma = np.linspace(low, high, count + 1)[:-1]
        share = np.full(count, (high - low) / count)
    scale = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
    weights = {
        "edm": lambda: scale * _density(sigma, p_mean, p_std),
        "vp_uniform": lambda: _density(sigma, p_mean, p_std) / sigma**2,
        "elbo": lambda: sigma**-3.0,
        "rdc_legacy": lambda: scale * _density(sigma, P_MEAN, 1 / P_STD) / P_STD**2,
    }[weighting]()
    return Levels(tuple(sigma.tolist()), tuple((weights * share).tolist()))


def training_levels(
    preconditioning: Preconditioning, weighting: Literal["vp_uniform", "elbo"] = "elbo"
) -> Levels:
    """Return every noise level that a discrete-time model was trained on, with its weight.

    Args:
        preconditioning: Preconditioning of the model, a `DDPM`.
        weighting: Weight of a step. "vp_uniform": the mean over steps of the noise prediction
            error, 1 / sigma_t^2 (Ho et al. 2020, equation 14). "elbo": half of 1 / sigma_{t-1}^2 -
            1 / sigma_t^2, the evidence bound (Kingma et al. 2021, equation 13), without the first
            step, which has no predecessor.

    Raises:
        InputError: Another weighting, or a model without steps.

    Example:
        >>> ddpm = DDPM(tuple(np.linspace(0.999, 0.01, 1000).tolist()))
        >>> len(training_levels(ddpm).sigmas), len(training_levels(ddpm, "vp_uniform").sigmas)
        (999, 1000)
    """
    if not isinstance(preconditioning, DDPM):
        raise InputError(
            f"the preconditioning is {type(preconditioning).__name__}, which has no steps; "
            "give noise_levels(...)"
        )
    sigmas = preconditioning.sigmas.numpy()
    if checks.choice("weighting", weighting, ("vp_uniform", "elbo")) == "elbo":
        weights, sigmas = -np.diff(sigmas**-2) / 2, sigmas[1:]
    else:
        weights = sigmas**-2 / len(sigmas)
    return Levels(tuple(sigmas.tolist()), tuple(weights.tolist()))


def _density(sigma: np.ndarray, mean: float, std: float) -> np.ndarray:
    """Log-normal density."""
    z = (np.log(sigma) - mean) / std
    return np.exp(-(z**2) / 2) / (sigma * std * math.sqrt(2 * math.pi))


class LevelNoise:
    """Standard normal noise for each (image, level), the same in a forward pass and its gradient.

    With a seed, all images share the noise of a level: the result for an image is then a
    deterministic function of its pixels, whatever its batch. Without one, every image of every call
    has its own noise, so copies of an image in a batch (EOT) see independent noise. The global
    random state is neither read nor changed.

    Args:
        seed: Seed of the noise; None: fresh noise.
        stream: Name of the user of the seed; other streams of a seed are independent.

    Example:
        >>> x = torch.zeros(2, 1, 8, 8)
        >>> noise = LevelNoise(0)
        >>> a = noise(x, [0, 1], [3, 3])
        >>> torch.equal(a[0], a[1]), torch.equal(LevelNoise(None)(x, [0, 1], [3, 3])[0], a[0])
        (True, False)
    """

    def __init__(self, seed: int | None, *, stream: tuple[int, ...] = ()) -> None:
        self._stream, self._shared = stream, seed is not None
        self._seed = secrets.randbits(63) if seed is None else seed
        self._drawn: dict[tuple[int, ...], torch.Tensor] = {}

    def __call__(
        self, x: Images, images: Sequence[int], levels: Sequence[int], *, keep: bool = True
    ) -> Images:
        """Return noise for rows of (index of an image, index of a level), on the host.

        ``x`` is any batch of such images: its shape, type and device are those of the noise. Noise
        that is not kept is drawn again when it is asked for again.
        """
        pairs, rows = np.unique(np.stack([images, levels], 1), axis=0, return_inverse=True)
        if self._shared:
            pairs[:, 0] = 0
        else:  # rows of an image follow each other: forget those before
            first = min(images)
            self._drawn = {k: v for k, v in self._drawn.items() if k[0] >= first}
        drawn = torch.stack([self._of(x, keep, image, level) for image, level in pairs.tolist()])
        return drawn[torch.from_numpy(rows.ravel()).to(x.device, non_blocking=True)]

    def _of(self, x: Images, keep: bool, *key: int) -> torch.Tensor:
        if key in self._drawn:
            return self._drawn[key]
        sequence = np.random.SeedSequence(self._seed, spawn_key=(*self._stream, *key))
        generator = torch.Generator(x.device)
        # 63 bits: the generator of a GPU takes no more.
        generator.manual_seed(sequence.generate_state(1, np.uint64).item() >> 1)
        drawn = torch.randn(x.shape[1:], generator=generator, device=x.device, dtype=x.dtype)
        if keep:
            self._drawn[key] = drawn
        return drawn
