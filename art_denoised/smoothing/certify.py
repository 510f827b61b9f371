"""Certify and Predict of Cohen et al. (2019), and certificates that stop early, for one image."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.smoothing.bounds import Anytime, Looks
from art_denoised.smoothing.packing import Task, run_packed, takes_channels_last
from art_denoised.smoothing.procedures import Procedure, certifying, tightening, voting
from art_denoised.smoothing.quantised import QuantisedGaussian
from art_denoised.smoothing.sampling import Gaussian, Noise, model_device, model_dtype
from art_denoised.smoothing.statistics import Certificate, Vote

if TYPE_CHECKING:
    from art_denoised.types import Classifier, Image

T = TypeVar("T")

FIRST_LOOK = 100
_NOISES = {kind.name: kind for kind in (Gaussian, QuantisedGaussian)}


def certify(
    base: Classifier,
    x: Image,
    *,
    sigma: float,
    n0: int = 100,
    n: int = 10_000,
    alpha: float = 0.001,
    radii: Sequence[float] = (),
    label: int | None = None,
    seed: int = 0,
    index: int = 0,
    batch_size: int = 64,
    noise: str = "gaussian",
    clip_values: tuple[Any, Any] = (0.0, 1.0),
) -> Certificate:
    """Certify the smoothed classifier's label on one image (Cohen et al., section 3.2, Certify).

    n0 samples select a class, n fresh samples bound its probability. Where certain ``radii`` are in
    question, sampling stops as soon as they are proved or out of reach: the same statement at the
    same alpha, usually from a tenth of the samples (docs/sequential.md).

    Args:
        base: Base classifier, images to logits; for denoised smoothing a `DenoisedClassifier`.
        x: The image, (channels, height, width), in image units.
        sigma: Standard deviation of the noise in image units.
        n0: Selection samples.
        n: Estimation samples; with ``radii`` the most that are drawn. At alpha = 0.001 the largest
            radius is 2.46 sigma for 1,000, 3.20 sigma for 10,000, 3.81 sigma for 100,000.
        alpha: Failure probability of the certificate.
        radii: l2 radii in question, image units; none: the largest radius that n samples prove.
        label: The image's class: when another one is selected, stop, since the image counts as
            wrong whatever its radius. Only with ``radii``.
        seed: Seed of the noise. Equal seeds give equal certificates, whatever the batch size.
        index: Index of the image in its data set: images of one run need different noise.
        batch_size: Noisy copies classified at once.
        noise: "gaussian"; or "quantised", for 8-bit images, whose certificates also hold in
            floating-point arithmetic (docs/certificates.md).
        clip_values: Smallest and largest pixel value; sigma is in the same units.

    Raises:
        InputError: A value out of range, an ``n`` that can certify nothing, a model in training
            mode, or a model that does not return logits.

    Example:
        >>> import torch
        >>> base = lambda x: torch.stack([x.mean((1, 2, 3)), -x.mean((1, 2, 3))], dim=1)
        >>> x = torch.full((1, 8, 8), 0.5)
        >>> c = certify(base, x, sigma=0.25, n=1000)
        >>> c.label, c.radius, c.drawn
        (0, 0.615815, 1000)
        >>> c = certify(base, x, sigma=0.25, n=1000, radii=[0.25])
        >>> c.proves(0.25), c.drawn
        (True, 100)
    """
    plan = certification_plan(n0=n0, n=n, alpha=alpha, radii=radii)
    run = _Run(base, x, sigma, seed, index, batch_size, noise, clip_values)
    return run.answer(certifying(**plan, label=label if radii else None, **run.record))


def certify_anytime(
    base: Classifier,
    x: Image,
    *,
    sigma: float,
    n0: int = 100,
    n: int = 100_000,
    alpha: float = 0.001,
    seconds: float | None = None,
    earlier: Certificate | None = None,
    seed: int = 0,
    index: int = 0,
    batch_size: int = 64,
    noise: str = "gaussian",
    clip_values: tuple[Any, Any] = (0.0, 1.0),
) -> Certificate:
    """Certify until the time is up, and go on later: sound whenever it was stopped.

    The bound holds at all sample counts at once (a confidence sequence, docs/sequential.md), so a
    certificate may be looked at, and sampling be continued from it, as often as one likes. At
    equal n its radius is a few percent smaller than that of `certify`.

    Args:
        base: As for `certify`.
        x: As for `certify`.
        sigma: As for `certify`.
        n0: Selection samples, where there is no ``earlier`` certificate.
        n: Estimation samples in all, those of ``earlier`` included.
        alpha: Failure probability, over all sample counts together.
        seconds: When to stop at the latest; None: at ``n`` samples.
        earlier: A certificate of this function for the same image and settings, to go on from. It
            does not say which image and index it is of: that these are the same is yours to see to.
        seed: As for `certify`.
        index: As for `certify`.
        batch_size: As for `certify`.
        noise: As for `certify`.
        clip_values: As for `certify`.

    Raises:
        InputError: As for `certify`; ``earlier`` is of other settings; or there is none, and the
            time did not suffice for the selection and a first batch.

    Example:
        >>> import torch
        >>> base = lambda x: torch.stack([x.mean((1, 2, 3)), -x.mean((1, 2, 3))], dim=1)
        >>> x = torch.full((1, 8, 8), 0.5)
        >>> first = certify_anytime(base, x, sigma=0.25, n=200)
        >>> second = certify_anytime(base, x, sigma=0.25, n=2000, earlier=first)
        >>> first.radius < second.radius, second.n
        (True, 2000)
    """
    plan: dict[str, Any] = {
        "n0": checks.count("n0", n0),
        "n": checks.count("n", n),
        "alpha": checks.alpha(alpha),
    }
    run = _Run(base, x, sigma, seed, index, batch_size, noise, clip_values)
    bound = Anytime()
    if earlier is not None:
        check_same_run(earlier, bound=bound, alpha=plan["alpha"], **run.record)
        if earlier.n >= plan["n"]:
            return earlier
    end = None if seconds is None else time.monotonic() + checks.positive("seconds", seconds)
    procedure = tightening(bound, earlier=earlier, **plan, **run.record)
    return run.answer(procedure, until=end, otherwise=earlier)


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
    noise: str = "gaussian",
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
    n, alpha = checks.count("n", n), checks.alpha(alpha)
    run = _Run(base, x, sigma, seed, index, batch_size, noise, clip_values)
    return run.answer(voting(n, alpha=alpha, **run.record))


def certification_plan(
    *, n0: int, n: int, alpha: float, radii: Sequence[float] = ()
) -> dict[str, Any]:
    """Check how an image is to be certified, and return it as `certifying` takes it.

    Raises:
        InputError: A value out of range.

    Example:
        >>> certification_plan(n0=100, n=1000, alpha=0.001)["bound"]
        Looks(first=1000, last=1000)
        >>> certification_plan(n0=100, n=1000, alpha=0.001, radii=[0.5, 0.25])["radii"]
        (0.25, 0.5)
    """
    alpha, radii = checks.alpha(alpha), checks.radii(radii)
    n = checks.sample_count(n, alpha)
    bound = Looks(min(FIRST_LOOK, n), n) if radii else Looks.fixed(n)
    return {"bound": bound, "n0": checks.count("n0", n0), "alpha": alpha, "radii": radii}


def find_noise(
    name: str, sigma: float, clip_values: tuple[Any, Any] = (0.0, 1.0)
) -> Gaussian | QuantisedGaussian:
    """Return the kind of noise called ``name``.

    Raises:
        InputError: There is none, or quantised noise for images outside [0, 1].

    Example:
        >>> find_noise("quantised", 0.25)
        QuantisedGaussian(sigma=0.25)
    """
    if name not in _NOISES:
        raise InputError(f"noise is {name!r}; give {' or '.join(map(repr, _NOISES))}")
    low, high = np.min(clip_values[0]), np.max(clip_values[1])
    if name == QuantisedGaussian.name and (low, high) != (0, 1):
        raise InputError(
            f"clip_values are ({low:g}, {high:g}); quantised noise needs 8-bit images in [0, 1]"
        )
    return _NOISES[name](checks.sigma(sigma, clip_values))


def sampling_record(base: object, noise: Noise, shape: Sequence[int], seed: int) -> dict[str, Any]:
    """Return what a certificate says of its samples, except their votes.

    Example:
        >>> sampling_record(torch.nn.Flatten(), Gaussian(0.25), (1, 8, 8), seed=0)["dtype"]
        'float32'
    """
    return {
        "sigma": noise.sigma,
        "seed": seed,
        "dtype": str(model_dtype(base)).removeprefix("torch."),
        "noise": noise.name,
        "tv": noise.tv(int(np.prod(shape))),
    }


def check_same_run(earlier: Certificate, **record: Any) -> None:
    """Check that an earlier certificate has the given bound, alpha, sigma, seed, noise and so on.

    Raises:
        InputError: It has not.

    Example:
        >>> c = Certificate.from_counts({3: 50}, {3: 1000}, alpha=0.001, sigma=0.25)
        >>> check_same_run(c, alpha=0.001, sigma=0.25)
    """
    for name, value in record.items():
        if getattr(earlier, name) != value:
            raise InputError(
                f"the earlier certificate has {name} {getattr(earlier, name)}, not {value}; "
                "go on with the settings that it was made with"
            )


class _Run:
    """One image, checked, and how it is sampled."""

    def __init__(
        self,
        base: Classifier,
        x: Image,
        sigma: float,
        seed: int,
        index: int,
        batch_size: int,
        noise: str,
        clip_values: tuple[Any, Any],
    ) -> None:
        checks.eval_mode(base)
        x = checks.images(torch.as_tensor(x)[None], clip_values=clip_values)[0]
        self._base, self._x = base, x.float().to(model_device(base))
        self._index = checks.count("index", index, 0)
        self._sampling: dict[str, Any] = {
            "noise": find_noise(noise, sigma, clip_values),
            "seed": checks.count("seed", seed, 0),
            "batch_size": checks.count("batch_size", batch_size),
        }
        self.record = sampling_record(
            base, self._sampling["noise"], self._x.shape, self._sampling["seed"]
        )

    def answer(
        self, procedure: Procedure[T], until: float | None = None, otherwise: T | None = None
    ) -> T:
        answers = run_packed(
            self._base,
            [Task(self._index, self._x, procedure)],
            channels_last=takes_channels_last(self._base, self._x),
            stop=lambda: until is not None and time.monotonic() > until,
            **self._sampling,
        )
        for _, answer in answers:
            return answer
        if otherwise is not None:
            return otherwise
        raise InputError(
            "there was no time to select a class and sample once more; give more seconds or a "
            "smaller n0"
        )
