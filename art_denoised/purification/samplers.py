"""Steps of reverse diffusion: from one noise level to a lower one.

A state u = x + sigma n is a clean image plus noise, in the units of the network. Where a paper
writes the variance-preserving state, z = a u with a = 1 / sqrt(1 + sigma^2), so abar = a^2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, get_args

from torch import Tensor

from art_denoised import checks

Denoise = Callable[[Tensor, float], Tensor]  # E[x | u] of a state at a noise level
Pair = tuple[float, float]  # a noise level and the lower one to go to
Spacing = Literal["time", "edm"]
BETA_0, BETA_1 = 0.1, 20.0  # the linear schedule of Song et al. (ICLR 2021), and of DiffPure
RHO = 7.0  # Karras et al. 2022, equation 5


class Sampler(Protocol):
    """A rule that takes a state from one noise level to a lower one."""

    @property
    def draws(self) -> int:
        """Number of noise tensors that a step takes."""
        ...

    def nfe(self, steps: int) -> int:
        """Return the number of network evaluations of so many steps down to noise level 0."""
        return steps

    def levels(self, sigma: float, steps: int, lowest: float) -> tuple[float, ...]:
        """Return steps + 1 falling noise levels, from ``sigma`` to 0: here equal steps of time."""
        t = vp_time(sigma)
        middle = (vp_sigma(t * (steps - i) / steps) for i in range(1, steps))
        return (sigma, *middle, 0.0)

    def step(
        self, denoise: Denoise, u: Tensor, levels: Pair, noise: Sequence[Tensor], reference: Tensor
    ) -> Tensor:
        """Return the state at ``levels[1]``, from the state u at ``levels[0]``.

        Args:
            denoise: Posterior mean of the diffusion model.
            u: State.
            levels: Noise level of u, and the lower one to go to.
            noise: Standard normal noise, ``draws`` tensors like u.
            reference: The image that is purified, like u.
        """
        ...


@dataclass(frozen=True)
class DDIM(Sampler):
    """Steps through the predicted clean image; eta = 1 is ancestral sampling of DDPM.

    With eps_hat = (u - x_hat) / sigma and the standard deviation tau = eta sigma' sqrt(1 - sigma'^2
    / sigma^2), the state at sigma' is x_hat + sqrt(sigma'^2 - tau^2) eps_hat + tau n. At eta = 0
    this is the Euler step of the probability-flow ODE in EDM's variables.

    Source: Song, Meng and Ermon (ICLR 2021, arXiv 2010.02502), equations 12 and 16; Ho et al.
    (NeurIPS 2020, arXiv 2006.11239), equations 6 and 7, for eta = 1.

    Attributes:
        eta: Share of noise, 0 (deterministic) to 1 (DDPM).
        spacing: Position of the noise levels: "time" (equal steps of time of the
            variance-preserving SDE) or "edm" (Karras et al. 2022, equation 5, rho = 7).

    Raises:
        InputError: eta is not in [0, 1], or the spacing is unknown.

    Example:
        >>> import torch
        >>> u = torch.tensor([2.0])  # N(0, 1) data at noise level 1: the posterior mean is u / 2
        >>> DDIM(0.0).step(lambda u, s: u / (1 + s**2), u, (1.0, 0.5), (), u)
        tensor([1.5000])
    """

    eta: float = 1.0
    spacing: Spacing = "time"

    def __post_init__(self) -> None:
        checks.plain_fields(self)
        if not 0 <= checks.real("eta", self.eta) <= 1:
            raise checks.InputError(f"eta is {self.eta}; give a number from 0 to 1")
        checks.choice("spacing", self.spacing, get_args(Spacing))

    @property
    def draws(self) -> int:
        """Number of noise tensors that a step takes."""
        return int(self.eta > 0)

    def levels(self, sigma: float, steps: int, lowest: float) -> tuple[float, ...]:
        """Return falling noise levels."""
        if self.spacing == "time":
            return super().levels(sigma, steps, lowest)
        return _edm_levels(sigma, steps, lowest)

    def step(
        self, denoise: Denoise, u: Tensor, levels: Pair, noise: Sequence[Tensor], reference: Tensor
    ) -> Tensor:
        """Return the state at the lower noise level."""
        sigma, after = levels
        x_hat = denoise(u, sigma)
        tau = self.deviation(levels)
        state = x_hat + math.sqrt(after**2 - tau**2) / sigma * (u - x_hat)
        return state + tau * noise[0] if self.draws else state

    def deviation(self, levels: Pair) -> float:
        """Return tau, the standard deviation of the noise that a step adds."""
        sigma, after = levels
        return self.eta * after * math.sqrt(1 - (after / sigma) ** 2)


@dataclass(frozen=True)
class Heun(Sampler):
    """Steps of Heun's method along the probability-flow ODE, of second order.

    Source: Karras et al. (NeurIPS 2022, arXiv 2206.00364), algorithm 1.

    Example:
        >>> import torch
        >>> u = torch.tensor([2.0])
        >>> Heun().step(lambda u, s: u / (1 + s**2), u, (1.0, 0.5), (), u)
        tensor([1.6000])
    """

    draws: ClassVar[int] = 0

    def nfe(self, steps: int) -> int:
        """Return the number of network evaluations: two a step, and one for the last."""
        return 2 * steps - 1

    def levels(self, sigma: float, steps: int, lowest: float) -> tuple[float, ...]:
        """Return falling noise levels."""
        return _edm_levels(sigma, steps, lowest)

    def step(
        self, denoise: Denoise, u: Tensor, levels: Pair, noise: Sequence[Tensor], reference: Tensor
    ) -> Tensor:
        """Return the state at the lower noise level."""
        sigma, after = levels
        slope = (u - denoise(u, sigma)) / sigma
        euler = u + (after - sigma) * slope
        if after == 0:
            return euler
        end = (euler - denoise(euler, after)) / after
        return u + (after - sigma) * (slope + end) / 2


@dataclass(frozen=True)
class ReverseSDE(Sampler):
    """Euler-Maruyama steps of the reverse variance-preserving SDE, as in DiffPure.

    z' = z + beta dt (z / 2 + score) + sqrt(beta dt) n, with beta at the start of the step and the
    score (a x_hat - z) / (1 - a^2). The noise levels are equal steps of time. DiffPure ends at time
    1e-5 and we at 0; its step is 1e-3, which is ``steps`` = 1000 t.

    Source: Nie et al., "Diffusion Models for Adversarial Purification" (ICML 2022, arXiv
    2205.07460), equation 4.

    Example:
        >>> import torch
        >>> u, none = torch.tensor([2.0]), torch.zeros(1)
        >>> next_u = ReverseSDE().step(lambda u, s: u / (1 + s**2), u, (1.0, 0.9), [none], u)
        >>> round(float(next_u), 3)
        1.804
    """

    draws: ClassVar[int] = 1

    def step(
        self, denoise: Denoise, u: Tensor, levels: Pair, noise: Sequence[Tensor], reference: Tensor
    ) -> Tensor:
        """Return the state at the lower noise level."""
        a, a_after = map(_scale, levels)
        begin, end = map(vp_time, levels)
        beta_dt = (BETA_0 + (BETA_1 - BETA_0) * begin) * (begin - end)
        z = a * u
        score = (a * denoise(u, levels[0]) - z) / (1 - a**2)
        z = z + beta_dt * (z / 2 + score) + math.sqrt(beta_dt) * noise[0]
        return z / a_after


@dataclass(frozen=True)
class Guided(Sampler):
    """Ancestral steps of DDPM that are pulled towards the noised input, as in GDMP.

    The mean of a step is moved by -scale sigma Sigma (z - z_ref): Sigma is the variance of the
    step, and z_ref the image at the same noise level, with noise of its own in each step. This is
    the gradient of the squared distance. GDMP takes its mean over all pixels of a batch; its
    settings for CIFAR-10 amount to a scale of 19 in batches of 100 images.

    Source: Wang et al., "Guided Diffusion Model for Adversarial Purification" (arXiv 2205.14969),
    algorithm 1, with the weights of its public code.

    Attributes:
        scale: Strength of the pull; 0 is DDPM.

    Raises:
        InputError: The scale is negative.

    Example:
        >>> import torch
        >>> u, none = torch.tensor([2.0]), torch.zeros(1)
        >>> pulled = Guided(1.0).step(lambda u, s: u / 2, u, (1.0, 0.5), [none, none], 0 * u)
        >>> bool(pulled < DDIM(1.0).step(lambda u, s: u / 2, u, (1.0, 0.5), [none], u))
        True
    """

    scale: float = 20.0
    draws: ClassVar[int] = 2
    _ancestral: ClassVar[DDIM] = DDIM(1.0)

    def __post_init__(self) -> None:
        checks.plain_fields(self)
        if not checks.real("scale", self.scale) >= 0:
            raise checks.InputError(f"scale is {self.scale}; give a number of at least 0")

    def step(
        self, denoise: Denoise, u: Tensor, levels: Pair, noise: Sequence[Tensor], reference: Tensor
    ) -> Tensor:
        """Return the state at the lower noise level."""
        sigma = levels[0]
        a, a_after = map(_scale, levels)
        variance = (a_after * self._ancestral.deviation(levels)) ** 2
        distance = a * (u - reference - sigma * noise[1])
        state = self._ancestral.step(denoise, u, levels, noise[:1], reference)
        return state - self.scale * sigma * variance * distance / a_after


_NAMED: dict[str, Callable[..., Sampler]] = {
    "ddpm": lambda: DDIM(1.0),
    "ddim": lambda eta=0.0: DDIM(eta),
    "sde": ReverseSDE,
    "euler": lambda: DDIM(0.0, "edm"),
    "heun": Heun,
    "gdmp": Guided,
}


def named_sampler(name: str, **options: Any) -> Sampler:
    """Return the sampler of this name, with its options: eta of "ddim", scale of "gdmp"."""
    return _NAMED[checks.choice("sampler", name, _NAMED)](**options)


def vp_sigma(t: float) -> float:
    """Return the noise level at time t of the linear variance-preserving SDE, network units.

    sigma^2 = exp(beta_0 t + (beta_1 - beta_0) t^2 / 2) - 1 with beta from 0.1 to 20.

    Args:
        t: Time in (0, 1]; DiffPure uses 0.1 on CIFAR-10 and 0.15 on ImageNet.

    Example:
        >>> round(vp_sigma(0.1), 3)
        0.34
    """
    t = checks.positive("t", t)
    if t > 1:
        raise checks.InputError(f"t is {t}; give a time from above 0 to 1")
    return math.sqrt(math.expm1(BETA_0 * t + (BETA_1 - BETA_0) * t**2 / 2))


def vp_time(sigma: float) -> float:
    """Return the time at which the linear variance-preserving SDE has this noise level.

    Args:
        sigma: Noise level in network units, at least 0.

    Example:
        >>> round(vp_time(vp_sigma(0.1)), 6)
        0.1
    """
    sigma = checks.real("sigma", sigma)
    if not 0 <= sigma < math.inf:
        raise checks.InputError(f"sigma is {sigma}; give a number >= 0")
    slope, integral = BETA_1 - BETA_0, math.log1p(sigma**2)
    return (math.sqrt(BETA_0**2 + 2 * slope * integral) - BETA_0) / slope


def _scale(sigma: float) -> float:
    """Return a = sqrt(abar), the factor of the variance-preserving state."""
    return 1 / math.sqrt(1 + sigma**2)


def _edm_levels(sigma: float, steps: int, lowest: float) -> tuple[float, ...]:
    """Return EDM's noise levels from ``sigma`` to ``lowest``, and 0 (Karras et al., equation 5)."""
    if steps == 1:
        return (sigma, 0.0)
    high, low = sigma ** (1 / RHO), min(lowest, sigma / 2) ** (1 / RHO)
    return (sigma, *((high + i / (steps - 1) * (low - high)) ** RHO for i in range(1, steps)), 0.0)
