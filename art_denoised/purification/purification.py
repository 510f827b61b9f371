"""Purification by a diffusion model, with exact gradients in the memory of one step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.checks.values import OneOf
from art_denoised.diffusion.chain import Chain
from art_denoised.diffusion.cost import Part, flop
from art_denoised.diffusion.levels import LevelNoise
from art_denoised.diffusion.model import DiffusionModel, checked_diffusion
from art_denoised.models.cost import saved, weights
from art_denoised.purification.samplers import Sampler, named_sampler, vp_sigma
from art_denoised.straight_through import straight_through
from art_denoised.uncompiled import uncompiled

if TYPE_CHECKING:
    from art_denoised.types import Images

Gradient = Literal["exact", "bpda", "surrogate"]
_STREAM = (2,)  # RDC with the same seed draws other noise
_LONGEST = 2**20  # steps of a pass, in the numbering of the noise


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
        _check_model(checked_diffusion(model))
        self.model, self.gradient = model, gradient
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
        self.seed = seed if seed is None else checks.count("seed", seed, 0)
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


def _check_model(model: DiffusionModel) -> None:
    if model.classes is not None and model.null_class is None:
        raise InputError(
            "the diffusion model has no null class; give one that has, or an unconditional one"
        )
    if model.noise:
        raise InputError(
            f"the model describes images with noise {model.noise:g}; give the model of clean images"
        )


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
