"""Likelihood maximization: an image is moved to where the diffusion model finds it likelier."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.diffusion.model import DiffusionModel
from art_denoised.diffusion.weights import Levels, noise_levels
from art_denoised.rdc.classifier import check_levels
from art_denoised.rdc.gradients import refuse_second_derivatives
from art_denoised.rdc.noise import LevelNoise
from art_denoised.straight_through import straight_through

if TYPE_CHECKING:
    from art_denoised.types import Images

Form = Literal["adam", "momentum"]
Gradient = Literal["exact", "bpda"]
_BETA1, _BETA2, _EPS = 0.9, 0.999, 1e-8  # Adam's
_LOW, _HIGH = 0.4, 0.6  # noise levels of the Adam form, in the units of the network
_STREAM = (1,)  # of a seed, so that a diffusion classifier with the same draws other noise


class _State(NamedTuple):
    """The image after some steps, and the moments of its gradients."""

    x: Tensor
    m: Tensor
    v: Tensor


class LikelihoodMaximization(nn.Module):
    """Images to images: a few steps down the unconditional diffusion loss, within a ball.

    "momentum" (Chen et al. 2024, algorithm 1): steps of eta / N along the sign of a momentum of
    gradients over all noise levels. "adam" (its later version): Adam, one noise level from
    [0.4, 0.6] a step. Both end within eta of the image in every pixel, and in [0, 1].
    It starts in eval mode.

    Gradients: "exact" differentiates through the steps, each of which is recomputed in the backward
    pass: a step more takes the memory of three images. "bpda" takes the identity for it, which is
    **not** the gradient: attacks with it flatter the defence. Signs have no gradient, so that of
    the momentum form is the clamps' alone, exactly.

    Args:
        model: Its unconditional loss is used: unconditional, or with a null class.
        steps: N.
        eta: Largest change of a pixel, image units.
        form: "adam" or "momentum".
        gradient: "exact" or "bpda".
        rate: Step size of Adam, image units; 0.05 is the reference's 0.1 in [-1, 1].
        levels: Of the momentum form; `noise_levels` (32) by default.
        seed: Fixes the noise; None: fresh in every call.
        bf16: Autocast the network to bfloat16.

    Raises:
        InputError: A model without unconditional answers, of noised images, or not trained on such
            noise, or a value out of range.

    Example:
        >>> from art_denoised.demo import digits_diffusion
        >>> purify = LikelihoodMaximization(digits_diffusion(), eta=0.1, seed=0)
        >>> x = torch.rand(2, 1, 8, 8)
        >>> bool((purify(x) - x).abs().max() <= 0.1 + 1e-6)
        True
    """

    gradients = get_args(Gradient)  # an attacker may choose; see `art_denoised.types`

    def __init__(
        self,
        model: DiffusionModel,
        *,
        steps: int = 5,
        eta: float = 8 / 255,
        form: Form = "adam",
        gradient: Gradient = "exact",
        rate: float = 0.05,
        levels: Levels | None = None,
        seed: int | None = None,
        bf16: bool = False,
    ) -> None:
        super().__init__()
        if model.classes is not None and model.null_class is None:
            raise InputError(
                "the diffusion model has no null class; give one that has, or an unconditional one"
            )
        if model.noise:
            raise InputError(
                f"the model is one of images with noise {model.noise:g}, which steps within [0, 1] "
                "would clip; give that of clean images"
            )
        for name, value, known in (("form", form, Form), ("gradient", gradient, Gradient)):
            if value not in get_args(known):
                raise InputError(f"{name} is {value!r}; give one of {', '.join(get_args(known))}")
        self.model, self.form, self.gradient = model, form, gradient
        self.steps = checks.count("steps", steps)
        self.eta = checks.positive("eta", eta)
        self.rate = checks.positive("rate", rate)
        self.levels = noise_levels(32) if levels is None else levels
        used = Levels((_LOW, _HIGH), (1.0, 1.0)) if form == "adam" else self.levels
        check_levels(model, used)
        self.seed = seed if seed is None else checks.count("seed", seed, 0)
        self.bf16 = bf16
        self.eval()

    def forward(self, x: Images) -> Images:
        """Return likelier images, also under ``no_grad`` and ``inference_mode``.

        Raises:
            InputError: Images in other units, or a gradient of the network that is not finite.
        """
        x = checks.images(x, slack=0.5)
        noise = LevelNoise(self.seed, stream=_STREAM)
        if torch.is_inference_mode_enabled():  # its tensors can take no part in a gradient
            with torch.inference_mode(False):
                return self._states(x.clone(), noise)[-1].x
        if not (torch.is_grad_enabled() and x.requires_grad):
            return self._states(x.detach(), noise)[-1].x
        if self.gradient == "bpda":  # Athalye et al., ICML 2018
            return straight_through(self._states(x.detach(), noise)[-1].x, x)
        x_hat: Images = _Exact.apply(x, self, noise)
        return x_hat

    purify = forward

    def _states(self, start: Tensor, noise: LevelNoise) -> list[_State]:
        """Return the state before each step and after the last, without a graph."""
        states = [_State(start, torch.zeros_like(start), torch.zeros_like(start))]
        for number in range(self.steps):
            after = self._step(start, states[-1], number, noise, False)
            if not bool(torch.isfinite(after.m).all()):
                raise InputError("the diffusion model returned NaN or infinite values")
            states.append(_State(*(t.detach() for t in after)))
        return states

    def _step(
        self, start: Tensor, state: _State, number: int, noise: LevelNoise, exact: bool
    ) -> _State:
        if self.form == "adam":
            return self._adam(start, state, number, noise, exact)
        return self._momentum(start, state, noise)

    def _adam(
        self,
        start: Tensor,
        state: _State,
        number: int,
        noise: LevelNoise,
        exact: bool,
    ) -> _State:
        x, m, v = state
        sigma = _uniform(noise, start, number) * (_HIGH - _LOW) + _LOW
        g = self._gradient(
            x, sigma[:, None], torch.ones_like(sigma)[:, None], 2 * number, noise, exact
        )
        g = g / x[0].numel()  # the mean over pixels, as in the reference
        m = _BETA1 * m + (1 - _BETA1) * g
        v = _BETA2 * v + (1 - _BETA2) * g.square()
        m_hat = m / (1 - _BETA1 ** (number + 1))
        v_hat = v / (1 - _BETA2 ** (number + 1))
        # sqrt(v) has no derivative at 0; pixels that feel nothing stay.
        x = x - self.rate * m_hat / ((v_hat + 1e-30).sqrt() + _EPS)
        return _State(self._project(start, x), m, v)

    def _momentum(self, start: Tensor, state: _State, noise: LevelNoise) -> _State:
        x, m, _ = state
        sigma = torch.tensor(self.levels.sigmas, device=x.device).expand(len(x), -1)
        weight = torch.tensor(self.levels.weights, device=x.device).expand(len(x), -1)
        # Through a sign nothing flows back, so the second derivatives need not be taken.
        g = self._gradient(x, sigma, weight, 0, noise, False)
        norm = g.abs().flatten(1).sum(1).clamp_min(1e-30).reshape(-1, 1, 1, 1)
        m = m + g / norm
        x = x - self.eta / self.steps * m.sign()
        return _State(self._project(start, x), m, state.v)

    def _gradient(
        self,
        x: Tensor,
        sigma: Tensor,
        weight: Tensor,
        first: int,
        noise: LevelNoise,
        exact: bool,
    ) -> Tensor:
        """Gradient in x of the loss at noise levels ``sigma``, (batch, levels), network units."""
        with torch.enable_grad():
            x = x if exact else x.detach().requires_grad_()
            total = torch.zeros_like(x)
            for level in range(sigma.shape[1]):
                at = (sigma[:, level] / self.model.scale).to(x.dtype)
                eps = noise(x, range(len(x)), [first + level] * len(x))
                with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
                    x_hat = self.model(x + at.reshape(-1, 1, 1, 1) * eps, at)
                error = ((x_hat.to(x.dtype) - x) * self.model.scale).square().flatten(1).sum(1)
                loss = (weight[:, level].to(error) * error).sum()
                (share,) = torch.autograd.grad(loss, x, create_graph=exact)
                total = total + share
        return total

    def _project(self, start: Tensor, x: Tensor) -> Tensor:
        x = torch.maximum(torch.minimum(x, start + self.eta), start - self.eta)
        return x.clamp(0, 1)


class _Exact(torch.autograd.Function):
    """The steps, and the gradient through them: each is taken again, from the state before it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lm: LikelihoodMaximization, noise: LevelNoise) -> Tensor:
        start = x.detach()
        states = lm._states(start, noise)
        ctx.lm, ctx.noise = lm, noise
        ctx.save_for_backward(start, *(t for state in states[:-1] for t in state))
        return states[-1].x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        refuse_second_derivatives()
        start, *saved = ctx.saved_tensors
        flow = _State(gradients[0], *(torch.zeros_like(start) for _ in range(2)))
        total = torch.zeros_like(start)
        for number in reversed(range(ctx.lm.steps)):
            with torch.enable_grad():
                inputs = [t.detach().requires_grad_() for t in saved[3 * number : 3 * number + 3]]
                origin = start.detach().requires_grad_()
                after = ctx.lm._step(origin, _State(*inputs), number, ctx.noise, True)
                live = [(t, g) for t, g in zip(after, flow, strict=True) if t.requires_grad]
                origin_part, *parts = torch.autograd.grad(
                    [t for t, _ in live],
                    [origin, *inputs],
                    [g for _, g in live],
                    allow_unused=True,
                    materialize_grads=True,
                )
            total += origin_part
            flow = _State(*parts)
        return total + flow.x, None, None


def _uniform(noise: LevelNoise, x: Tensor, number: int) -> Tensor:
    """A number in (0, 1) for each image, from the noise of a level of its own."""
    eps = noise(x, range(len(x)), [2 * number + 1] * len(x))
    return torch.special.ndtr(eps.flatten(1)[:, 0]).detach()
