"""Likelihood maximization, which moves images to where the diffusion model finds them likelier.

With a diffusion classifier behind it, it is the robust diffusion classifier, `RDC`; `chen2024` has
the settings of its release.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from art_denoised import checks
from art_denoised.autograd import straight_through, uncompiled
from art_denoised.checks import InputError
from art_denoised.checks.values import OneOf
from art_denoised.diffusion.chain import Chain
from art_denoised.diffusion.cost import Part, flop, on
from art_denoised.diffusion.levels import LevelNoise, Levels, noise_levels
from art_denoised.diffusion.model import DiffusionModel, checked_unconditional
from art_denoised.models.cost import saved, weights
from art_denoised.rdc.classifier import DiffusionClassifier, check_levels

if TYPE_CHECKING:
    from art_denoised.types import Images, Labels, Logits

FormName = Literal["adam", "adam_reference", "momentum"]
Gradient = Literal["exact", "bpda"]
_BETA1, _BETA2 = 0.9, 0.999  # the defaults of Adam
_LOW, _HIGH = 0.4, 0.6  # noise levels of the Adam forms, in the units of the network
_STREAM = (1,)  # a diffusion classifier with the same seed draws other noise


class State(NamedTuple):
    """The image after some steps, and the moments of its gradients."""

    x: Tensor
    m: Tensor
    v: Tensor


@dataclass(frozen=True)
class Adam:
    """Steps of Adam, each at one noise level drawn from [0.4, 0.6] in the units of the network.

    Attributes:
        lr: Learning rate in image units; 0.05 is the reference's 0.1 in [-1, 1].
        project: Whether each step is projected to the ball of radius eta and to [0, 1]. The
            reference code does not: it clips once to [0, 1] after the last step.
        eps: Number that is added to the root of the second moment. Gradients are those in image
            units, so 2e-8 is the 1e-8 of code that works in [-1, 1].

    Raises:
        InputError: The learning rate or eps is not positive.
    """

    lr: float = 0.05
    project: bool = True
    eps: float = 1e-8
    levels: ClassVar[Levels] = Levels((_LOW, _HIGH), (1.0, 1.0))
    nfe: ClassVar[int] = 1
    second_order: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checks.plain_fields(self)
        checks.positive("lr", self.lr)
        checks.flag("project", self.project)
        checks.positive("eps", self.eps)

    def at(self, noise: LevelNoise, x: Images, step: int) -> tuple[Tensor, Tensor, int]:
        """Return noise levels and weights, (batch, 1) each, and the index of their noise."""
        # A uniform number per image, from the noise of a level of its own.
        eps = noise(x, range(len(x)), [2 * step + 1] * len(x))
        uniform = torch.special.ndtr(eps.flatten(1)[:, 0]).detach()
        sigma = (uniform * (_HIGH - _LOW) + _LOW)[:, None]
        return sigma, torch.ones_like(sigma), 2 * step

    def update(self, state: State, g: Tensor, step: int, step_size: float) -> State:
        """Return the state after a step (Kingma and Ba, ICLR 2015, algorithm 1)."""
        g = g / g[0].numel()  # the mean over pixels, as in the reference
        m = _BETA1 * state.m + (1 - _BETA1) * g
        v = _BETA2 * state.v + (1 - _BETA2) * g.square()
        m_hat = m / (1 - _BETA1 ** (step + 1))
        v_hat = v / (1 - _BETA2 ** (step + 1))
        # sqrt(v) has no derivative at 0; pixels without a gradient stay.
        return State(state.x - self.lr * m_hat / ((v_hat + 1e-30).sqrt() + self.eps), m, v)


@dataclass(frozen=True)
class Momentum:
    """Steps of eta / N along the sign of a momentum of gradients over all noise levels.

    Source: Chen et al. 2024, algorithm 1.

    Attributes:
        levels: Noise levels and weights; `noise_levels` (32) by default.
    """

    levels: Levels = field(default_factory=lambda: noise_levels(32))
    project: ClassVar[bool] = True
    second_order: ClassVar[bool] = False  # nothing flows back through a sign

    @property
    def nfe(self) -> int:
        """Number of network evaluations of a step."""
        return len(self.levels.sigmas)

    def at(self, noise: LevelNoise, x: Images, step: int) -> tuple[Tensor, Tensor, int]:
        """Return noise levels and weights, (batch, levels) each, and the index of their noise."""
        sigma = torch.tensor(self.levels.sigmas, device=x.device).expand(len(x), -1)
        weight = torch.tensor(self.levels.weights, device=x.device).expand(len(x), -1)
        return sigma, weight, 0

    def update(self, state: State, g: Tensor, step: int, step_size: float) -> State:
        """Return the state after a step along the sign of m + g / ||g||_1."""
        norm = g.abs().flatten(1).sum(1).clamp_min(1e-30).reshape(-1, 1, 1, 1)
        m = state.m + g / norm
        return State(state.x - step_size * m.sign(), m, state.v)


Form = Adam | Momentum


def named_form(name: str, *, lr: float = 0.05, levels: Levels | None = None) -> Form:
    """Return the form of likelihood maximization of this name (`LikelihoodMaximization`)."""
    checks.choice("form", name, get_args(FormName))
    if name == "momentum":
        return Momentum() if levels is None else Momentum(levels)
    return Adam(lr, project=name == "adam")


class LikelihoodMaximization(nn.Module):
    """Move images down the unconditional diffusion loss by a few steps.

    There are three forms:

    - "adam": `Adam`; each step stays within eta of the image in every pixel, and in [0, 1].
    - "adam_reference": the same without the ball, as in the reference code of Chen et al. (ICML
      2024): pixels move by up to steps * lr, and are clipped to [0, 1] after the last step.
    - "momentum": `Momentum`, algorithm 1 of the paper, within the ball.

    Gradients: "exact" differentiates through the steps, each of which is recomputed in the backward
    pass: one more step takes the memory of three images. "bpda" takes the identity instead, which
    is **not** the gradient: attacks with it flatter the defence. A sign has no gradient, so the
    exact gradient of the momentum form is that of its projections.

    It starts in eval mode.

    Args:
        model: Diffusion model that is unconditional or has a null class.
        steps: Number N of steps.
        eta: Largest change of a pixel in image units; "adam_reference" does not use it.
        form: Name of a form, or `Adam` or `Momentum` for other settings.
        gradient: "exact" or "bpda".
        seed: Seed of the noise; None: fresh noise in every call.
        bf16: Whether the network is autocast to bfloat16.

    Attributes:
        seed: Seed of the noise; None: fresh noise in every call. It may be set.
        gradient: The way of taking gradients, one of ``gradients``. It may be set.

    Raises:
        InputError: The model has no unconditional answer, describes noised images or was not
            trained on such noise, or a value is out of range.

    Example:
        >>> from art_denoised.demo import digits_diffusion
        >>> maximize = LikelihoodMaximization(digits_diffusion(), eta=0.1, seed=0)
        >>> x = torch.rand(2, 1, 8, 8)
        >>> bool((maximize(x) - x).abs().max() <= 0.1 + 1e-6)
        True
    """

    gradients: tuple[str, ...] = get_args(Gradient)
    gradient = OneOf("gradients")

    def __init__(
        self,
        model: DiffusionModel,
        *,
        steps: int = 5,
        eta: float = 8 / 255,
        form: FormName | Form = "adam",
        gradient: str = "exact",
        seed: int | None = None,
        bf16: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.gradient = checked_unconditional(model), gradient
        self.form: Form = named_form(form) if isinstance(form, str) else form
        self.steps = checks.count("steps", steps)
        self.eta = checks.positive("eta", eta)
        check_levels(model, self.form.levels)
        self.seed = checks.seed(seed)
        self.bf16 = bf16
        self.eval()

    # Streams of noise and recomputed gradients cannot be traced: compile the network instead.
    @uncompiled
    def forward(self, x: Images) -> Images:
        """Return likelier images, also under ``no_grad`` and ``inference_mode``.

        Raises:
            InputError: The images leave [0, 1] by more than half its length, or a gradient of the
                network is not finite.
        """
        checks.untraced("likelihood maximization")
        if len(x) == 0:
            return x
        x = checks.attacked_images(x)
        noise = LevelNoise(self.seed, stream=_STREAM)

        def step(number: int, start: Tensor, state: tuple[Tensor, ...]) -> State:
            return self.step(start, State(*state), number, noise, torch.is_grad_enabled())

        chain = Chain("likelihood maximization", self.steps, step)
        if torch.is_inference_mode_enabled():  # its tensors can take no part in a gradient
            with torch.inference_mode(False):
                return self._maximized(chain.run, x.clone())
        if not (torch.is_grad_enabled() and x.requires_grad):
            return self._maximized(chain.run, x)
        if self.gradient == "bpda":  # Athalye et al., ICML 2018
            return straight_through(self._maximized(chain.run, x), x)
        return self._maximized(chain.differentiable, x)

    @torch.no_grad()
    def purify(self, x: Images) -> Images:
        """Return likelier images, without a gradient."""
        return self(x)

    def nfe(self, images: int = 1) -> int:
        """Return the number of network evaluations (NFE) for some images."""
        return images * self.steps * self.form.nfe

    def part(self, x: Images, images: int, batch: int) -> Part:
        """Return the cost on so many images; ``x`` is one of them (`preview_cost`)."""
        form = self.form
        if isinstance(form, Momentum):  # its levels are evaluated one after another
            form = Momentum(Levels(form.levels.sigmas[:1], form.levels.weights[:1]))
        one = LikelihoodMaximization(
            self.model, steps=1, form=form, gradient=self.gradient, bf16=self.bf16
        )
        exact, nfe = self.gradient == "exact", self.nfe(images)
        forward, both = flop(one, x)
        zero = torch.zeros_like(x)

        def step() -> object:
            leaf = x.detach().requires_grad_()
            return one.step(leaf, State(leaf, zero, zero), 0, LevelNoise(None), exact)

        states = 3 * x.numel() * x.element_size() * (self.steps if exact else 1)
        memory = weights(self) + (saved(step, self) + states) * batch
        return Part(nfe, forward * nfe, both * nfe, memory)

    def step(
        self, start: Tensor, state: State, number: int, noise: LevelNoise, exact: bool
    ) -> State:
        """Return the state after step ``number``; ``exact``: differentiable in its inputs."""
        sigma, weight, first = self.form.at(noise, start, number)
        exact = exact and self.form.second_order
        g = self._gradient(state.x, sigma, weight, first, noise, exact)
        x, m, v = self.form.update(state, g, number, self.eta / self.steps)
        if self.form.project:
            x = torch.maximum(torch.minimum(x, start + self.eta), start - self.eta).clamp(0, 1)
        elif number == self.steps - 1:
            x = x.clamp(0, 1)
        return State(x, m, v)

    def _maximized(self, run: Callable[..., tuple[Tensor, ...]], x: Images) -> Images:
        x_hat, m, _ = run(x, x, torch.zeros_like(x), torch.zeros_like(x))
        checks.finite_answer(m)
        return x_hat

    def _gradient(
        self, x: Tensor, sigma: Tensor, weight: Tensor, first: int, noise: LevelNoise, exact: bool
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


class RDC(nn.Module):
    """Likelihood maximization, then a diffusion model as Bayes classifier: images to logits.

    Source: Chen et al., "Robust Classification via a Single Diffusion Model" (ICML 2024, arXiv
    2305.15241).

    Args:
        maximization: Likelihood maximization.
        classifier: Diffusion classifier, as a rule over the same diffusion model.

    Attributes:
        gradients: The ways of taking gradients, "exact" and "bpda".

    Raises:
        InputError: The two parts have different seeds.

    Example:
        >>> from art_denoised.demo import digits_diffusion
        >>> from art_denoised.data import load_data
        >>> model = digits_diffusion()
        >>> maximization = LikelihoodMaximization(model, eta=0.1, seed=0)
        >>> rdc = RDC(maximization, DiffusionClassifier(model, seed=0))
        >>> x, label = load_data("digits")[0]
        >>> int(rdc(x[None]).argmax()) == label
        True
    """

    gradients: tuple[str, ...] = LikelihoodMaximization.gradients

    def __init__(
        self, maximization: LikelihoodMaximization, classifier: DiffusionClassifier
    ) -> None:
        super().__init__()
        first, second = maximization.seed, classifier.seed
        if first != second:
            raise InputError(
                f"the parts have the seeds {first} and {second}; give one seed to both"
            )
        self.maximization, self.classifier = maximization, classifier
        self.eval()

    def forward(self, x: Images) -> Logits:
        """Return logits of shape (batch, classes), differentiable in ``x``."""
        logits: Logits = self.classifier(self.maximization(x))
        return logits

    def purify(self, x: Images) -> Images:
        """Return what likelihood maximization makes of images, without a gradient."""
        return self.maximization.purify(x)

    def nfe(self, images: int = 1) -> int:
        """Return the number of network evaluations (NFE) of a prediction."""
        return self.maximization.nfe(images) + self.classifier.nfe(images)

    def part(self, x: Images, images: int, batch: int) -> Part:
        """Return the cost on so many images; ``x`` is one of them (`preview_cost`)."""
        parts = self.maximization, self.classifier
        first, second = (part.part(on(part, x), images, batch) for part in parts)
        return first.then(second)

    @torch.no_grad()
    def fit_temperature(self, x: Images, y: Labels) -> float:
        """Fit the classifier's temperature on purified validation images, and return it."""
        return self.classifier.fit_temperature(self.purify(x), y)

    @property
    def seed(self) -> int | None:
        """Seed of all noise; None: fresh noise in every call. It may be set."""
        return self.classifier.seed

    @seed.setter
    def seed(self, value: int | None) -> None:
        self.maximization.seed = self.classifier.seed = value

    @property
    def gradient(self) -> str:
        """Way of taking gradients of likelihood maximization: "exact" or "bpda"; may be set."""
        return self.maximization.gradient

    @gradient.setter
    def gradient(self, value: str) -> None:
        self.maximization.gradient = value


def chen2024(
    diffusion: DiffusionModel,
    unconditional: DiffusionModel | None = None,
    *,
    levels: int = 125,
    shape: tuple[int, int, int] = (3, 32, 32),
    seed: int | None = None,
    gradient: str = "exact",
    **options: Any,
) -> RDC:
    """Build the robust diffusion classifier of the release of Chen et al.

    The settings are those of its script "RDCN+TK.py". The noise levels are 126 numbers from 1e-4 to
    3 without the last, with its weights ("rdc_legacy") and the mean of the error over pixels.
    Likelihood maximization takes 5 steps of Adam without a ball, with learning rate 0.1 in [-1, 1],
    at noise levels from 0.4 to 0.6. The release replaces its gradient by the identity ("bpda").

    Source: Chen et al., "Robust Classification via a Single Diffusion Model" (ICML 2024, arXiv
    2305.15241), and its public code.

    Args:
        diffusion: Class-conditional diffusion model, in eval mode.
        unconditional: Diffusion model for likelihood maximization, which the release takes from
            another file; None: ``diffusion``, which must have a null class then.
        levels: Number of noise levels; the release also uses 1,000.
        shape: Channels, height and width of the images.
        seed: Seed of all noise; None: fresh noise in every call.
        gradient: Gradient of likelihood maximization, "exact" or "bpda".
        **options: Further arguments of `DiffusionClassifier`: max_batch, recompute, prior.

    Raises:
        InputError: A model cannot be used so, or a value is out of range.

    Example:
        >>> from art_denoised.diffusion import edm_diffusion
        >>> import torch
        >>> size = {"img_resolution": 8, "img_channels": 3, "model_channels": 16}
        >>> small = {**size, "model_type": "SongUNet", "channel_mult": [1], "num_blocks": 1}
        >>> conditional = edm_diffusion(label_dim=4, **small).eval()
        >>> rdc = chen2024(conditional, edm_diffusion(**small).eval(), levels=3, shape=(3, 8, 8))
        >>> rdc(torch.rand(2, 3, 8, 8)).shape
        torch.Size([2, 4])
    """
    settings = chen2024_settings(levels, shape)
    form = settings.pop("form")
    return RDC(
        LikelihoodMaximization(
            diffusion if unconditional is None else unconditional,
            steps=5,
            form=form,
            gradient=gradient,
            seed=seed,
        ),
        DiffusionClassifier(diffusion, seed=seed, **settings, **options),
    )


def chen2024_settings(levels: int, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Return noise levels, temperature and the form of likelihood maximization of the release."""
    channels, height, width = shape
    return {
        "levels": noise_levels(levels, "rdc_legacy", "linear"),
        "temperature": float(channels * height * width),  # a mean over pixels
        "form": Adam(lr=0.05, project=False, eps=2e-8),  # 0.1 and 1e-8 in [-1, 1]
    }
