"""Preconditioning: how the network of a diffusion model sees noise, and what its output means.

Every diffusion model is a linear wrapping of its network F (Karras et al., "Elucidating the Design
Space of Diffusion-Based Generative Models", NeurIPS 2022, arXiv 2206.00364, equation 7)

    D(x; sigma) = c_skip(sigma) x + c_out(sigma) F(c_in(sigma) x; c_noise(sigma))

of an image with noise N(0, sigma^2 I) on it, in the units of the network. The conversions between
eps, v, x0, flow and EDM are these four coefficients and nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from art_denoised import checks
from art_denoised.checks import InputError

Prediction = Literal["epsilon", "v_prediction", "sample"]


class Coefficients(NamedTuple):
    """The coefficients at given noise levels, each shaped like them."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


class Preconditioning(ABC):
    """How a network is called. Noise levels are in the units of the network."""

    sigma_min: float
    sigma_max: float

    @abstractmethod
    def at(self, sigma: Tensor) -> Coefficients:
        """Return the coefficients at noise levels ``sigma``, float tensor of any shape."""

    def at_least(self, sigma: float) -> float:
        """Return the smallest noise level of the training that is not below ``sigma``."""
        if sigma > self.sigma_max:
            raise InputError(
                f"sigma {sigma:g} (in the network's units) is beyond {self.sigma_max:g}, the "
                "highest noise level of the diffusion model; certify at a smaller sigma"
            )
        return max(sigma, self.sigma_min)


def _check_levels(low: float, high: float) -> None:
    """Check the noise levels of a training; EDM's own files say 0 and infinity."""
    low, high = checks.real("sigma_min", low), checks.real("sigma_max", high)
    if not 0 <= low < high:
        raise InputError(
            f"sigma_min is {low:g} and sigma_max {high:g}; give the lowest and the highest noise "
            "level of the training"
        )


@dataclass(frozen=True)
class EDM(Preconditioning):
    """Preconditioning of Karras et al., table 1.

    Attributes:
        sigma_data: Standard deviation of the training images, in the units of the network.
        sigma_min: Lowest noise level of the training.
        sigma_max: Highest noise level of the training.

    Raises:
        InputError: A level or a deviation that is no such number.

    Example:
        >>> c_skip, c_out, c_in, c_noise = EDM().at(torch.tensor(0.5))
        >>> round(float(c_skip), 4), round(float(c_in), 4)
        (0.5, 1.4142)
    """

    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        checks.plain_fields(self)
        checks.positive("sigma_data", self.sigma_data)
        _check_levels(self.sigma_min, self.sigma_max)

    def at(self, sigma: Tensor) -> Coefficients:
        """Return the coefficients at noise levels ``sigma``."""
        total = sigma**2 + self.sigma_data**2
        return Coefficients(
            c_skip=self.sigma_data**2 / total,
            c_out=sigma * self.sigma_data * total.rsqrt(),
            c_in=total.rsqrt(),
            c_noise=sigma.log() / 4,
        )


@dataclass(frozen=True)
class DDPM(Preconditioning):
    """Variance preserving, discrete time (Ho et al., NeurIPS 2020, arXiv 2006.11239).

    Step t shows the network z = sqrt(abar_t) x + sqrt(1 - abar_t) eps. At noise level sigma, abar =
    1 / (1 + sigma^2) and z = sqrt(abar) x_noisy. The network is told the nearest step.

    Attributes:
        alphas_cumprod: Schedule abar_t of the training, falling.
        prediction: Output of the network: the noise ("epsilon"), v = sqrt(abar) eps -
            sqrt(1 - abar) x ("v_prediction"; Salimans and Ho, ICLR 2022), or x ("sample").

    Raises:
        InputError: The schedule does not fall within (0, 1], or the prediction is unknown.

    Example:
        >>> ddpm = DDPM(tuple(torch.linspace(0.999, 0.01, 1000).tolist()))
        >>> sigma = torch.tensor(0.5)  # abar = 0.8
        >>> c_skip, c_out, c_in, c_noise = ddpm.at(sigma)
        >>> float(c_skip), float(c_out), int(c_noise)
        (1.0, -0.5, 201)
        >>> 0.5 <= ddpm.at_least(0.5) < 0.502
        True
    """

    alphas_cumprod: tuple[float, ...] = field(repr=False)  # a thousand
    prediction: Prediction = "epsilon"
    _COEFFICIENTS: ClassVar[dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]]] = {
        "epsilon": lambda s, c: (torch.ones_like(s), -s),
        "v_prediction": lambda s, c: (c**2, -s * c),
        "sample": lambda s, c: (torch.zeros_like(s), torch.ones_like(s)),
    }

    def __post_init__(self) -> None:
        checks.plain_fields(self)
        abar = torch.tensor(self.alphas_cumprod, dtype=torch.float64, device="cpu")
        checks.choice("prediction", self.prediction, get_args(Prediction))
        if not (
            len(abar) and bool((abar > 0).all() and (abar <= 1).all() and (abar.diff() < 0).all())
        ):
            raise InputError("alphas_cumprod does not fall; give numbers from at most 1 to above 0")

    @property
    def sigma_min(self) -> float:  # type: ignore[override]
        """Noise level of the first step."""
        return float(self.sigmas[0])

    @property
    def sigma_max(self) -> float:  # type: ignore[override]
        """Noise level of the last step."""
        return float(self.sigmas[-1])

    def at(self, sigma: Tensor) -> Coefficients:
        """Return the coefficients at noise levels ``sigma``."""
        c_in = (1 + sigma**2).rsqrt()
        c_skip, c_out = self._COEFFICIENTS[self.prediction](sigma, c_in)
        grid = self.sigmas.log().to(sigma)
        middles = (grid[1:] + grid[:-1]) / 2
        step = torch.searchsorted(middles, sigma.log().contiguous())
        return Coefficients(c_skip, c_out, c_in, step)

    def at_least(self, sigma: float) -> float:
        """Return the smallest noise level of a step that is not below ``sigma``."""
        super().at_least(sigma)
        grid = self.sigmas
        return float(grid[int((grid < sigma).sum())])

    @property
    def sigmas(self) -> Tensor:
        """Noise level of each step, rising; float64."""
        abar = torch.tensor(self.alphas_cumprod, dtype=torch.float64, device="cpu")
        return ((1 - abar) / abar).sqrt()


@dataclass(frozen=True)
class Flow(Preconditioning):
    """Flow matching on straight paths (Lipman et al., ICLR 2023; Liu et al., ICLR 2023).

    z_t = (1 - t) x + t n, and the network returns the velocity n - x. Noise level sigma is t =
    sigma / (1 + sigma), and z = (1 - t) x_noisy.

    Attributes:
        time_scale: Factor on t in what the network is told; 1000 in diffusers.
        sigma_min: Lowest noise level.
        sigma_max: Highest noise level.

    Raises:
        InputError: A level or a factor that is no such number.

    Example:
        >>> c_skip, c_out, c_in, c_noise = Flow().at(torch.tensor(1.0))
        >>> float(c_in), float(c_out), float(c_noise)
        (0.5, -0.5, 500.0)
    """

    time_scale: float = 1000.0
    sigma_min: float = 0.001
    sigma_max: float = 999.0

    def __post_init__(self) -> None:
        checks.plain_fields(self)
        checks.positive("time_scale", self.time_scale)
        _check_levels(self.sigma_min, self.sigma_max)

    def at(self, sigma: Tensor) -> Coefficients:
        """Return the coefficients at noise levels ``sigma``."""
        t = sigma / (1 + sigma)
        return Coefficients(1 - t, -t, 1 - t, self.time_scale * t)


@dataclass(frozen=True)
class Native(Preconditioning):
    """No preconditioning: the network is D(x_noisy, sigma, y) itself.

    Attributes:
        sigma_min: Lowest noise level of its training.
        sigma_max: Highest noise level of its training.

    Raises:
        InputError: A level that is no such number.

    Example:
        >>> [float(c) for c in Native().at(torch.tensor(0.5))]
        [0.0, 1.0, 1.0, 0.5]
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        checks.plain_fields(self)
        _check_levels(self.sigma_min, self.sigma_max)

    def at(self, sigma: Tensor) -> Coefficients:
        """Return the coefficients at noise levels ``sigma``."""
        one = torch.ones_like(sigma)
        return Coefficients(0 * sigma, one, one, sigma)
