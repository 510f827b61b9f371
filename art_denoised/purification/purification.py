"""Purification by a diffusion model, with exact gradients in the memory of one step.

Samplers are steps of reverse diffusion, from one noise level to a lower one. A state u = x + sigma
n is a clean image plus noise, in the units of the network. Where a paper writes the
variance-preserving state, z = a u with a = 1 / sqrt(1 + sigma^2), so abar = a^2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor, nn

from art_denoised import checks
from art_denoised.autograd import straight_through, uncompiled
from art_denoised.checks import InputError
from art_denoised.checks.values import OneOf
from art_denoised.diffusion.chain import Chain
from art_denoised.diffusion.cost import Part, flop
from art_denoised.diffusion.levels import LevelNoise
from art_denoised.diffusion.model import DiffusionModel, checked_unconditional
from art_denoised.models.cost import saved, weights

if TYPE_CHECKING:
    from art_denoised.types import Images

Denoise = Callable[[Tensor, float], Tensor]  # E[x | u] of a state at a noise level
Pair = tuple[float, float]  # a noise level and the lower one to go to
Spacing = Literal["time", "edm"]
BETA_0, BETA_1 = 0.1, 20.0  # the linear schedule of Song et al. (ICLR 2021), and of DiffPure
RHO = 7.0  # Karras et al. 2022, equation 5
Gradient = Literal["exact", "bpda", "surrogate"]
_STREAM = (2,)  # RDC with the same seed draws other noise
_LONGEST = 2**20  # steps of a pass, in the numbering of the noise


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
            raise InputError(f"eta is {self.eta}; give a number from 0 to 1")
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
        a, a_after = map(_shrink, levels)
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
            raise InputError(f"scale is {self.scale}; give a number of at least 0")

    def step(
        self, denoise: Denoise, u: Tensor, levels: Pair, noise: Sequence[Tensor], reference: Tensor
    ) -> Tensor:
        """Return the state at the lower noise level."""
        sigma = levels[0]
        a, a_after = map(_shrink, levels)
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
        raise InputError(f"t is {t}; give a time from above 0 to 1")
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
        raise InputError(f"sigma is {sigma}; give a number >= 0")
    slope, integral = BETA_1 - BETA_0, math.log1p(sigma**2)
    return (math.sqrt(BETA_0**2 + 2 * slope * integral) - BETA_0) / slope


def _shrink(sigma: float) -> float:
    """Return a = sqrt(abar), the factor of the variance-preserving state."""
    return 1 / math.sqrt(1 + sigma**2)


def _edm_levels(sigma: float, steps: int, lowest: float) -> tuple[float, ...]:
    """Return EDM's noise levels from ``sigma`` to ``lowest``, and 0 (Karras et al., equation 5)."""
    if steps == 1:
        return (sigma, 0.0)
    high, low = sigma ** (1 / RHO), min(lowest, sigma / 2) ** (1 / RHO)
    return (sigma, *((high + i / (steps - 1) * (low - high)) ** RHO for i in range(1, steps)), 0.0)


class Move(NamedTuple):
    """From one noise level to the next: up from 0 by noising, down by a step of the sampler.

    ``first`` numbers its noise.
    """

    sigma: float
    after: float
    first: int


class State(NamedTuple):
    """The state u, the state before its pass was noised, and its deviation from those so far."""

    u: Tensor
    base: Tensor
    deviation: Tensor  # (batch,), summed over the steps


class Purification(nn.Module):
    """Noise images to a level and run a diffusion model backwards from there.

    Gradients: "exact" differentiates through every step. The backward pass recomputes one step
    after another from stored states with the same noise, so its memory is that of one step and one
    image for each step, and its time twice that of the forward pass. "bpda" takes the identity, and
    "surrogate" the exact gradient of a run of fewer steps, as published attacks do; **neither is
    the gradient**, and attacks with them flatter the defence.

    The result may leave [0, 1] a little, as in DiffPure. It starts in eval mode. Weights of the
    diffusion model get no gradient, in any mode.

    Sources: Nie et al., "Diffusion Models for Adversarial Purification" (ICML 2022, arXiv
    2205.07460); Lee and Kim (ICCV 2023, arXiv 2303.09051) for the surrogate.

    Args:
        model: Diffusion model that is unconditional or has a null class.
        sigma: Noise level to start from, image units. Several make one pass each, from the result
            of the one before: equal ones repeat, others purify at several scales.
        t: The same as time of the variance-preserving SDE, 0 to 1; give sigma or t.
        steps: Number of steps of each pass.
        sampler: "ddpm" (`DDIM` with eta 1), "ddim", "sde" (`ReverseSDE`), "euler", "heun"
            (`Heun`), "gdmp" (`Guided`), or a `Sampler`.
        gradient: "exact", "bpda" or "surrogate".
        surrogate_steps: Number of steps of the surrogate; None: a quarter of ``steps``.
        seed: Seed of the noise; None: fresh noise in every call.

    Attributes:
        seed: Seed of the noise; None: fresh noise in every call. It may be set.
        gradient: The way of taking gradients, one of ``gradients``. It may be set.

    Raises:
        InputError: The model has no unconditional answer, describes noised images or was not
            trained on such noise; or a value is out of range.

    Example:
        >>> from art_denoised.demo import digits_diffusion
        >>> purify = Purification(digits_diffusion(), t=0.1, steps=5, sampler="sde", seed=0)
        >>> x = torch.rand(2, 1, 8, 8, requires_grad=True)
        >>> purify(x).sum().backward()
        >>> purify.nfe(), bool(x.grad.abs().sum() > 0)
        (5, True)
    """

    gradients: tuple[str, ...] = get_args(Gradient)
    gradient = OneOf("gradients")

    def __init__(
        self,
        model: DiffusionModel,
        *,
        sigma: float | Sequence[float] | None = None,
        t: float | Sequence[float] | None = None,
        steps: int = 20,
        sampler: str | Sampler = "ddpm",
        gradient: str = "exact",
        surrogate_steps: int | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.model, self.gradient = checked_unconditional(model), gradient
        self.sigmas = _sigmas(model, sigma, t)
        self.steps = checks.count("steps", steps)
        self.sampler = named_sampler(sampler) if isinstance(sampler, str) else sampler
        if self.sampler.draws > 2:
            raise InputError(
                f"the sampler draws noise {self.sampler.draws} times in a step; the streams of "
                "noise have room for 2"
            )
        fewer = max(1, self.steps // 4) if surrogate_steps is None else surrogate_steps
        self.surrogate_steps = checks.count("surrogate_steps", fewer)
        if self.surrogate_steps > self.steps:
            raise InputError(
                f"surrogate_steps is {surrogate_steps}, more than {steps} steps; give fewer"
            )
        self.seed = checks.seed(seed)
        self._followers: list[list[Tensor]] = []
        self.eval()

    # Recomputed gradients cannot be traced: compile the network instead.
    @uncompiled
    def forward(self, x: Images) -> Images:
        """Return purified images, also under ``no_grad`` and ``inference_mode``.

        Raises:
            InputError: The images leave [0, 1] by more than half its length, or the answer of the
                diffusion model is not finite.
        """
        checks.untraced("purification")
        if len(x) == 0:
            return x
        x = checks.attacked_images(x)
        low, scale = self.model.image_range[0], self.model.scale
        u, deviation = self._purified(low + scale * x, LevelNoise(self.seed, stream=_STREAM))
        for follower in self._followers:
            follower.append(deviation)
        return (u - low) / scale

    @torch.no_grad()
    def purify(self, x: Images) -> Images:
        """Return purified images, without a gradient."""
        return self(x)

    def nfe(self, images: int = 1) -> int:
        """Return the number of network evaluations (NFE) for some images."""
        return images * len(self.sigmas) * self.sampler.nfe(self.steps)

    @contextmanager
    def following(self) -> Iterator[list[Tensor]]:
        """Collect how far each call leaves the path of its noised images: a loss for attacks.

        Each call within the context appends a tensor (batch,): the mean over steps and pixels of
        abar ||z - z_t||^2, with z the state after a step and z_t the images at the same noise level
        with the noise of the forward process. Its gradient is that of ``gradient``; "bpda" has
        none.

        Source: Kang et al., "DiffAttack" (NeurIPS 2023, arXiv 2311.16124), section 3.2.
        """
        found: list[Tensor] = []
        self._followers.append(found)
        try:
            yield found
        finally:
            self._followers.pop()  # contexts end in the reverse order

    def part(self, x: Images, images: int, batch: int) -> Part:
        """Return the cost on so many images; ``x`` is one of them (`preview_cost`)."""
        nfe = self.nfe(images)
        level = torch.tensor(min(self.sigmas))

        def evaluate(x: Images) -> Images:
            return self.model(x, level)

        forward, both = flop(evaluate, x)
        steps = {"exact": self.steps, "bpda": 0, "surrogate": self.surrogate_steps}[self.gradient]
        again = images * len(self.sigmas) * self.sampler.nfe(steps) if steps else 0
        extra = forward * (again if self.gradient == "surrogate" else 0)
        at_once = 2 if self.nfe() > len(self.sigmas) * self.steps else 1  # Heun evaluates twice
        kept = saved(lambda: evaluate(x.detach().requires_grad_()), self) if steps else 0
        states = len(self.moves(steps)) * x.numel() * x.element_size() if steps else 0
        memory = weights(self) + (at_once * kept + states) * batch
        return Part(nfe, forward * nfe, forward * nfe + extra + both * again, memory)

    def moves(self, steps: int) -> list[Move]:
        """Return the way from the images through all passes, of so many steps each."""
        lowest = self.model.sigma_min * self.model.scale
        moves = []
        for number, sigma in enumerate(self.sigmas):
            levels = (0.0, *self.sampler.levels(sigma * self.model.scale, steps, lowest))
            for i in range(steps + 1):
                moves.append(Move(levels[i], levels[i + 1], 2 * (number * _LONGEST + i)))
        return moves

    def move(self, state: State, start: Tensor, move: Move, noise: LevelNoise) -> State:
        """Return the state after a move."""
        u, base, total = state
        if move.sigma == 0:
            return State(u + move.after * self._draw(noise, u, move.first), u, total)
        numbers = range(move.first, move.first + self.sampler.draws)
        draws = [self._draw(noise, u, number, keep=False) for number in numbers]
        u = self.sampler.step(self._denoise, u, move[:2], draws, start)
        # abar (z - z_t)^2 = abar^2 (u - u_t)^2, with the noise of the pass, whose move came first
        forward = self._draw(noise, u, move.first // (2 * _LONGEST) * 2 * _LONGEST)
        distance = (u - base - move.after * forward).square().flatten(1).mean(1)
        return State(u, base, total + distance / (1 + move.after**2) ** 2)

    def _purified(self, start: Tensor, noise: LevelNoise) -> tuple[Tensor, Tensor]:
        """Return the last state and the deviation, with the gradient that was chosen."""
        differentiable = torch.is_grad_enabled() and start.requires_grad
        if torch.is_inference_mode_enabled() or not differentiable:
            return self._moved(start, noise, self.steps)
        if self.gradient == "exact":
            return self._moved(start, noise, self.steps, exact=True)
        value = self._moved(start, noise, self.steps)
        if self.gradient == "bpda":  # Athalye et al., ICML 2018
            return straight_through(value[0], start), value[1]
        stand_in = self._moved(start, noise, self.surrogate_steps, exact=True)
        u, deviation = map(straight_through, value, stand_in)
        return u, deviation

    def _moved(
        self, start: Tensor, noise: LevelNoise, steps: int, *, exact: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return the last state and the mean deviation of the states after a step."""
        moves = self.moves(steps)

        def step(number: int, start: Tensor, state: tuple[Tensor, ...]) -> State:
            return self.move(State(*state), start, moves[number], noise)

        chain = Chain("a purification", len(moves), step)
        run = chain.differentiable if exact else chain.run
        u, _, deviation = run(start, start, start, start.new_zeros(len(start)))
        checks.finite_answer(u)
        return u, deviation / (steps * len(self.sigmas))

    def _denoise(self, u: Tensor, sigma: float) -> Tensor:
        """Return E[x | u] in the units of the network."""
        low, scale = self.model.image_range[0], self.model.scale
        level = torch.full((len(u),), sigma / scale, dtype=torch.float64, device=u.device)
        x_hat: Tensor = self.model((u - low) / scale, level.to(u.dtype))
        return low + scale * x_hat

    @staticmethod
    def _draw(noise: LevelNoise, u: Tensor, number: int, *, keep: bool = True) -> Tensor:
        return noise(u, range(len(u)), [number] * len(u), keep=keep)


def _sigmas(
    model: DiffusionModel,
    sigma: float | Sequence[float] | None,
    t: float | Sequence[float] | None,
) -> tuple[float, ...]:
    """Return the noise level of each pass, image units."""
    if (sigma is None) == (t is None):
        raise InputError(f"sigma is {sigma} and t is {t}; give one of them")
    given: Any = t if sigma is None else sigma
    values = tuple(given) if isinstance(given, Sequence) else (given,)
    if not values:
        raise InputError("there are no noise levels; give at least one")
    if sigma is None:
        found = tuple(vp_sigma(value) / model.scale for value in values)
    else:
        found = tuple(checks.positive("sigma", value) for value in values)
    for level in found:
        if level > model.sigma_max:
            raise InputError(
                f"sigma is {level:g}, beyond {model.sigma_max:g}, the highest noise level of the "
                "diffusion model; purify from a lower one"
            )
    return found
