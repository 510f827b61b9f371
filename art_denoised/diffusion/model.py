"""A diffusion model as D(x_noisy, sigma, y), on images in [0, 1], and a test of its wiring.

What the U-Nets of several families share comes first.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple, get_args

import torch
from torch import Tensor, nn

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.diffusion.preconditioning import DDPM, Preconditioning, Prediction

if TYPE_CHECKING:
    from art_denoised.types import Images, Labels, Sigmas

_LEVELS = (0.05, 0.1, 0.25, 0.5)  # noise levels of the self-test, in image units
_HIGH_LEVELS = (1.0, 2.0)  # where readings that agree on little noise differ, too
_TINY = 1e-12  # an error that may be 0
_CLEARLY = 0.9  # another reading fits better if it leaves less than this share of the error


def sinusoids(t: Tensor, width: int, *, endpoint: bool) -> Tensor:
    """Return cosines, then sines, of times (batch,) at ``width / 2`` frequencies from 1 downwards.

    The lowest frequency is 1e-4 with ``endpoint``, and one step of the grid above it without.
    """
    half = width // 2
    ramp = torch.arange(half, dtype=torch.float32, device=t.device) / (half - endpoint)
    angles = t.float()[:, None] * torch.exp(-math.log(10_000) * ramp)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q k / sqrt(width)) v of tensors (batch, heads, width, tokens)."""
    # Written out: fused kernels have no second derivative, which exact gradients through
    # likelihood maximization need.
    scale = q.shape[2] ** -0.25  # on both factors, so that half precision does not overflow
    weight = torch.einsum("nhct,nhcs->nhts", q * scale, k * scale).softmax(-1)
    return torch.einsum("nhts,nhcs->nhct", weight, v)


def check_images(x: Images, channels: int, size: int) -> None:
    """Check that images have the shape of a network's training."""
    if x.shape[1:] != (channels, size, size):
        raise InputError(
            f"images have shape {tuple(x.shape[1:])}, but the diffusion model was trained on "
            f"{(channels, size, size)}; resize them"
        )


class DiffusionModel(nn.Module):
    """The posterior mean E[x | x_noisy, y] of a diffusion model of any family.

    It is a `Denoiser` of images in [0, 1]. A network that lives in [-1, 1] sees images twice as
    large and noise of 2 sigma; only this class knows. The network computes in the dtype of its own
    weights, whatever the dtype of the images.

    Args:
        network: Network, called as ``network(x, c_noise, y)`` with images in its own range, c_noise
            of shape (batch,), and class indices (batch,) or None. It returns one channel for each
            channel of ``x``; the preconditioning says what they mean.
        preconditioning: How the network sees noise.
        classes: Number of classes of a conditional network; None: unconditional.
        null_class: Class index that stands for no class; None: a conditional network always needs a
            class.
        image_range: Smallest and largest pixel value in the units of the network.

    Raises:
        InputError: A null class without classes or among them, or an empty range.

    Example:
        >>> from art_denoised.diffusion.preconditioning import Native
        >>> class Shrink(nn.Module):  # the posterior mean of N(0, 1) images
        ...     def forward(self, x, sigma, y):
        ...         return x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)
        >>> model = DiffusionModel(Shrink(), Native())
        >>> x_hat = model(torch.full((1, 1, 2, 2), 0.75), 0.5)  # 0.5 under noise 1.0 in [-1, 1]
        >>> float(x_hat[0, 0, 0, 0])
        0.625
    """

    noise: float = 0.0
    """Standard deviation of the noise in the images that the model describes, image units."""

    def __init__(
        self,
        network: nn.Module,
        preconditioning: Preconditioning,
        *,
        classes: int | None = None,
        null_class: int | None = None,
        image_range: tuple[float, float] = (-1.0, 1.0),
    ) -> None:
        super().__init__()
        classes = None if classes is None else checks.count("classes", classes)
        null_class = None if null_class is None else checks.count("null_class", null_class, 0)
        if classes is None and null_class is not None:
            raise InputError(f"null_class is {null_class} but there are no classes; give classes")
        if null_class is not None and null_class < (classes or 0):
            raise InputError(
                f"null_class is {null_class}, which is one of the {classes} classes; give another"
            )
        if not image_range[0] < image_range[1]:
            raise InputError(f"image_range is {image_range}; give the lower end first")
        self.network, self.preconditioning = network, preconditioning
        self.training = network.training
        self.classes, self.null_class = classes, null_class
        self.image_range = image_range

    def extra_repr(self) -> str:
        """Return the settings beside the network."""
        return (
            f"{self.preconditioning}, classes={self.classes}, null_class={self.null_class}, "
            f"image_range={self.image_range}"
        )

    @property
    def scale(self) -> float:
        """Length of the network's range: sigma in image units is scale * sigma to the network."""
        return self.image_range[1] - self.image_range[0]

    @property
    def sigma_min(self) -> float:
        """Lowest noise level of the training, in image units."""
        return self.preconditioning.sigma_min / self.scale

    @property
    def sigma_max(self) -> float:
        """Highest noise level of the training, in image units."""
        return self.preconditioning.sigma_max / self.scale

    def at_least(self, sigma: float) -> float:
        """Return the smallest noise level of the training not below ``sigma``; image units."""
        level = self.preconditioning.at_least(sigma * self.scale) / self.scale
        return max(level, sigma)  # not below, in floating point either

    def forward(self, x_noisy: Images, sigma: Sigmas, y: Labels | None = None) -> Images:
        """Return E[x | x_noisy, y].

        Args:
            x_noisy: Clean images in [0, 1] plus noise.
            sigma: Standard deviation of the noise in image units, one number or one per image.
            y: Class indices, which may be the null class, on any device: reading those on a GPU
                waits for it. None: no class.

        Raises:
            InputError: A class for an unconditional network, no class for one that needs it, or an
                unknown class.
        """
        # In float32 at least: half precision would round steps and levels.
        x_noisy = checks.batch(x_noisy)
        precision = torch.promote_types(x_noisy.dtype, torch.float32)
        level = torch.as_tensor(sigma, dtype=precision, device=x_noisy.device) * self.scale
        level = level.reshape(-1).expand(len(x_noisy))
        c_skip, c_out, c_in, c_noise = self.preconditioning.at(level)
        low, column = self.image_range[0], (-1, 1, 1, 1)
        x = low + self.scale * x_noisy
        network_in = (c_in.reshape(column) * x).to(checks.model_dtype(self.network, x_noisy.dtype))
        answer = self.network(network_in, c_noise, self._labels(y, x_noisy))
        x_hat = c_skip.reshape(column) * x + c_out.reshape(column) * answer
        return ((x_hat - low) / self.scale).to(x_noisy.dtype)

    def _labels(self, y: Labels | None, x: Images) -> Labels | None:
        if self.classes is None:
            if y is not None:
                raise InputError("the diffusion model knows no classes; give one that does")
            return None
        if y is not None:
            if y.shape != (len(x),):
                raise InputError(f"labels have shape {tuple(y.shape)}; give one an image, {len(x)}")
            given = set(y.tolist())  # of labels on the host without waiting for a device
            if given - {*range(self.classes), self.null_class}:
                raise InputError(
                    f"labels span {int(min(given))} to {int(max(given))}; the diffusion model "
                    f"knows the classes 0 to {self.classes - 1}"
                )
            return y.to(x.device, non_blocking=True)
        if self.null_class is None:
            raise InputError("the diffusion model has no null class; give the class of each image")
        return torch.full((len(x),), self.null_class, device=x.device)


def checked_diffusion(model: object) -> DiffusionModel:
    """Return ``model`` if it is a diffusion model, before anything is asked of it."""
    if isinstance(model, DiffusionModel):
        return model
    raise InputError(
        f"the diffusion model is a {type(model).__name__}; give a DiffusionModel, such as "
        "load_diffusion returns"
    )


def checked_unconditional(model: object) -> DiffusionModel:
    """Return ``model`` if it is a diffusion model of clean images that needs no class."""
    found = checked_diffusion(model)
    if found.classes is not None and found.null_class is None:
        raise InputError(
            "the diffusion model has no null class; give one that has, or an unconditional one"
        )
    if found.noise:
        raise InputError(
            f"the model describes images with noise {found.noise:g}; give the model of clean images"
        )
    return found


class NoisedDiffusion(DiffusionModel):
    """E[x_tau | x_s, y] of images x_tau that already hold noise tau, from a model of clean images.

    x_s holds additional noise rho, s^2 = tau^2 + rho^2. Given the clean image, a share tau^2 / s^2
    of the noise of x_s is that of x_tau, so with D the model of clean images

        E[x_tau | x_s, y] = x_s + (rho^2 / s^2) (D(x_s; s, y) - x_s)

    A `DiffusionClassifier` over it classifies noised images. With the weights of the evidence bound
    this is the exact posterior noised diffusion classifier (EPNDC) of Chen et al., "Your Diffusion
    Model is Secretly a Certifiably Robust Classifier" (NeurIPS 2024, arXiv 2402.02316): its loss
    at a step from rho to rho' is (1 / rho^2 - 1 / rho'^2) / 2 times the squared error at rho'
    (docs/tutorials/rdc.md). An evaluation takes one call of the network, as on clean images.

    Args:
        model: Diffusion model of clean images.
        noise: Standard deviation tau in image units; above 0.

    Raises:
        InputError: The model was not trained on such noise.

    Example:
        >>> from art_denoised import DiffusionClassifier
        >>> from art_denoised.demo import digits_diffusion
        >>> from art_denoised.data import load_data
        >>> x = torch.stack([load_data("digits")[i][0] for i in range(4)])
        >>> noised = x + 0.25 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        >>> classifier = DiffusionClassifier(NoisedDiffusion(digits_diffusion(), 0.25), seed=0)
        >>> classifier(noised).argmax(1).tolist() == [load_data("digits")[i][1] for i in range(4)]
        True
    """

    def __init__(self, model: DiffusionModel, noise: float) -> None:
        super().__init__(
            model.network,
            model.preconditioning,
            classes=model.classes,
            null_class=model.null_class,
            image_range=model.image_range,
        )
        self.noise = checks.sigma(noise)
        model.at_least(self.noise)
        self.train(model.training)

    def extra_repr(self) -> str:
        """Return the settings beside the network."""
        return f"{super().extra_repr()}, noise={self.noise}"

    @property
    def sigma_min(self) -> float:
        """Lowest additional noise: 0 where tau is itself a level of the training."""
        return max(super().sigma_min ** 2 - self.noise**2, 0.0) ** 0.5

    @property
    def sigma_max(self) -> float:
        """Highest additional noise."""
        return float((super().sigma_max ** 2 - self.noise**2) ** 0.5)

    def at_least(self, sigma: float) -> float:
        """Return the smallest additional noise, not below ``sigma``, whose sum was trained on."""
        total = super().at_least((sigma**2 + self.noise**2) ** 0.5)
        return max((total**2 - self.noise**2) ** 0.5, sigma)

    def forward(self, x_noisy: Images, sigma: Sigmas, y: Labels | None = None) -> Images:
        """Return E[x_tau | x_s, y] of images x_s; ``sigma`` is rho, one number or one per image."""
        rho = torch.as_tensor(sigma, device=x_noisy.device).reshape(-1).expand(len(x_noisy))
        total = (rho.double() ** 2 + self.noise**2).sqrt()
        share = (rho.double() / total).square().to(x_noisy.dtype).reshape(-1, 1, 1, 1)
        x_hat = super().forward(x_noisy, total.to(rho.dtype), y)
        return x_noisy + share * (x_hat - x_noisy)


class SelfTest(NamedTuple):
    """Result at one noise level.

    Attributes:
        sigma: Noise level in image units.
        error: Mean squared error in units of the noise's variance: below 1 if the model denoises.
        conditional_error: The same, given the true class; NaN for unconditional models.
        class_effect: Mean squared difference of both answers, in the same units.
    """

    sigma: float
    error: float
    conditional_error: float
    class_effect: float


@torch.no_grad()
def self_test(model: DiffusionModel, x: Images, y: Labels | None = None) -> list[SelfTest]:
    """Check that a model denoises real images, with and without class, in the right units.

    The same network is also read in other ways: with every prediction type of a DDPM, and with the
    image ranges [-1, 1] and [0, 1]. What was declared must fit best, up to a tenth in the geometric
    mean over these noise levels and two higher ones.

    Args:
        model: Diffusion model in eval mode.
        x: Clean images like those of its training, (batch, channels, height, width) in [0, 1].
        y: Classes of the images, for a conditional model.

    Returns:
        A row for each of four noise levels that the model was trained on.

    Raises:
        InputError: The model cannot take the images, does not denoise them, or fits clearly better
            in another reading, which is named.

    Example:
        >>> from art_denoised.demo import digits_diffusion
        >>> from art_denoised.data import load_data
        >>> data = [load_data("digits")[i] for i in range(50)]
        >>> x, y = torch.stack([x for x, _ in data]), torch.tensor([y for _, y in data])
        >>> rows = self_test(digits_diffusion(), x, y)
        >>> all(row.error < 0.9 and row.conditional_error < 0.9 for row in rows)
        True
    """
    checked_diffusion(model)
    x = checks.images(x)
    if y is not None and model.classes is not None:
        y = checks.labels(y, model.classes)
    levels = [sigma for sigma in _LEVELS if model.sigma_min <= sigma <= model.sigma_max]
    if not levels:
        raise InputError(
            f"the model was trained on sigma {model.sigma_min:g} to {model.sigma_max:g} (image "
            "units), where images are only noise; check its image_range"
        )
    first = None if y is None else y[:1]
    checks.denoises(lambda x, sigma: model(x, sigma, first), x[:1], levels[0])
    generator = torch.Generator().manual_seed(0)
    # One noise for all readings, drawn on the CPU for all devices.
    noise = {sigma: torch.randn(x.shape, generator=generator).to(x) for sigma in levels}
    rows = _errors(model, x, y, noise)
    higher = [sigma for sigma in _HIGH_LEVELS if sigma <= model.sigma_max]
    more = {sigma: torch.randn(x.shape, generator=generator).to(x) for sigma in higher}
    _compare_readings(model, x, y, noise | more, [*rows, *_errors(model, x, y, more)])
    for row in rows:
        error = row.error if math.isnan(row.conditional_error) else max(row[1:3])
        if not error < 1:
            raise InputError(
                f"at sigma {row.sigma:g} the model leaves {error:.2g} times the noise; check its "
                "preconditioning, prediction type and image_range"
            )
    return rows


def _errors(
    model: DiffusionModel, x: Images, y: Labels | None, noise: Mapping[float, Tensor]
) -> list[SelfTest]:
    rows = []
    for sigma, eps in noise.items():
        x_noisy = x + sigma * eps
        told = None if y is None else model(x_noisy, sigma, y)
        needs_class = model.classes is not None and model.null_class is None
        free = told if told is not None and needs_class else model(x_noisy, sigma)
        error = float((free - x).square().mean()) / sigma**2
        conditional = effect = math.nan
        if told is not None:
            conditional = float((told - x).square().mean()) / sigma**2
            effect = float((told - free).square().mean()) / sigma**2
        rows.append(SelfTest(sigma, error, conditional, effect))
    return rows


def _compare_readings(
    model: DiffusionModel,
    x: Images,
    y: Labels | None,
    noise: Mapping[float, Tensor],
    declared: Sequence[SelfTest],
) -> None:
    """Raise if the same network leaves clearly less noise when it is read in another way."""
    left = {}
    for name, reading in _other_readings(model).items():
        if reading.sigma_min <= min(noise) and max(noise) <= reading.sigma_max:
            pairs = zip(_errors(reading, x, y, noise), declared, strict=True)
            # A mean of logarithms: each level counts, also where little is left of much noise.
            left[name] = math.exp(
                fmean(math.log((a.error + _TINY) / (b.error + _TINY)) for a, b in pairs)
            )
    best = min(left, key=lambda name: left[name], default=None)
    if best is not None and left[best] < _CLEARLY:
        raise InputError(
            f"the network leaves less noise when it is read with {best} ({left[best]:.2g} times "
            f"as much, over {len(noise)} levels); declare that instead"
        )


def _other_readings(model: DiffusionModel) -> dict[str, DiffusionModel]:
    """Return other declarations of the same network, by what they change."""
    declared, image_range = model.preconditioning, model.image_range
    others = {
        f"image_range {r}": (declared, r) for r in ((-1.0, 1.0), (0.0, 1.0)) if r != image_range
    }
    if isinstance(declared, DDPM):
        for name in get_args(Prediction):
            if name != declared.prediction:
                others[f"prediction {name!r}"] = (replace(declared, prediction=name), image_range)
    readings = {name: copy.copy(model) for name in others}
    for name, reading in readings.items():
        reading.preconditioning, reading.image_range = others[name]
    return readings
