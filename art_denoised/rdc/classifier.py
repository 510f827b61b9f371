"""A class-conditional diffusion model as Bayes classifier, with exact gradients.

Predictions of a part of its network evaluations stand at the end. All classes share the noise of a
level, so classes are compared in pairs, level by level, and most can be dropped after a few levels.
Levels are taken in an order of which every beginning is spread over all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from art_denoised import checks
from art_denoised.autograd import uncompiled
from art_denoised.checks import InputError
from art_denoised.diffusion.cost import Part, flop
from art_denoised.diffusion.levels import LevelNoise, Levels, noise_levels
from art_denoised.diffusion.model import DiffusionModel, checked_diffusion
from art_denoised.models.cost import saved, weights

if TYPE_CHECKING:
    from art_denoised.types import Images, Labels, Logits

At = tuple[Tensor, Tensor, Tensor]  # image, level and class of each row, on the host
_MOST_NOISE = 8.0  # standard deviations that noise in an image may reach


class DiffusionClassifier(nn.Module):
    """Classify images by the likelihood that a diffusion model gives them under each class.

    ``logits[y] = log p(y) - sum_l w_l ||D(x + sigma_l eps_l; sigma_l, y) - x||^2 / temperature`` in
    the units of the network, summed over pixels. All classes share eps_l, so that few levels
    suffice. Gradients in x are exact: the backward pass evaluates the network again with the same
    noise, for the classes alone whose logit has a gradient. So memory depends on neither levels nor
    classes.

    It starts in eval mode, where the weights of the network get no gradient. In training mode they
    do, at the cost of a backward pass through all classes.

    Source: Chen et al., "Robust Classification via a Single Diffusion Model" (ICML 2024, arXiv
    2305.15241), section 3.1; Li et al. (ICCV 2023) for shared noise.

    Args:
        model: Class-conditional diffusion model, in eval mode.
        levels: Noise levels and weights; `noise_levels` (32) by default.
        seed: Seed of the noise, which makes the answer a deterministic function of each image;
            None: fresh noise in every call.
        prior: Probabilities p(y) of the classes; None: uniform.
        temperature: Divisor of the likelihood term; 1 is Bayes' rule if the loss were an exact
            bound. It changes no prediction. But an attack on cross-entropy gets weaker the further
            it is off, which flatters the defence: use `fit_temperature` first
            (docs/tutorials/rdc.md).
        max_batch: Number of network evaluations at once.
        bf16: Whether the network is autocast to bfloat16.
        recompute: Whether the backward pass evaluates the network again. False: the forward pass
            takes the gradients of all classes, at the memory of one image per class. That takes two
            thirds of the time for losses that involve every class, such as cross-entropy, and more
            for margins. The gradients are the same.

    Attributes:
        seed: Seed of the noise; None: fresh noise in every call. It may be set.

    Raises:
        InputError: The model is unconditional, was not trained on the levels, or a value is out of
            range.

    Example:
        >>> from art_denoised.demo import digits_diffusion
        >>> from art_denoised.data import load_data
        >>> data = load_data("digits")
        >>> classifier = DiffusionClassifier(digits_diffusion(), levels=noise_levels(8), seed=0)
        >>> x = torch.stack([data[i][0] for i in range(4)])
        >>> classifier(x).argmax(1).tolist() == [data[i][1] for i in range(4)]
        True
    """

    log_prior: Tensor

    def __init__(
        self,
        model: DiffusionModel,
        *,
        levels: Levels | None = None,
        seed: int | None = None,
        prior: Sequence[float] | None = None,
        temperature: float = 1.0,
        max_batch: int = 512,
        bf16: bool = False,
        recompute: bool = True,
    ) -> None:
        super().__init__()
        model = checked_diffusion(model)
        if model.classes is None:
            raise InputError("the diffusion model knows no classes; give a class-conditional one")
        levels = noise_levels(32) if levels is None else levels
        check_levels(model, levels)
        self.model, self.levels = model, levels
        self.classes: int = model.classes
        self.seed = checks.seed(seed)
        self.temperature = checks.positive("temperature", temperature)
        self.max_batch = checks.count("max_batch", max_batch)
        self.bf16, self.recompute = bf16, recompute
        self.register_buffer("log_prior", _log_prior(prior, self.classes))
        self.eval()

    # Streams of noise and recomputed gradients cannot be traced: compile the network instead.
    @uncompiled
    def forward(self, x: Images) -> Logits:
        """Return logits of shape (batch, classes), differentiable in ``x``.

        Raises:
            InputError: The images leave [0, 1] by more than half its length, beside the noise that
                the model expects in them; or the network's answer is not finite.
        """
        checks.untraced("a diffusion classifier")
        if len(x) == 0:
            return x.new_zeros(0, self.classes)
        x = checks.attacked_images(x, slack=0.5 + _MOST_NOISE * self.model.noise)
        noise = LevelNoise(self.seed)
        along = not self.recompute and torch.is_grad_enabled() and x.requires_grad
        losses: Tensor = (
            self._train_losses(x, noise) if self.training else _Losses.apply(x, self, noise, along)
        )
        checks.finite_answer(losses)
        return self.log_prior.to(losses) - losses / self.temperature

    def checked(self, x: Images) -> Images:
        """Return images, checked; they may hold the noise that the model expects in them."""
        return checks.images(x, slack=_MOST_NOISE * self.model.noise)

    def nfe(self, images: int = 1) -> int:
        """Return the number of network evaluations (NFE) of a prediction."""
        return images * self.classes * len(self.levels.sigmas)

    def part(self, x: Images, images: int, batch: int) -> Part:
        """Return the cost on so many images; ``x`` is one of them (`preview_cost`)."""
        nfe = self.nfe(images)

        def evaluate(x: Images) -> Tensor:
            zero = torch.zeros(1, dtype=torch.long)
            return self.errors(x, (zero, zero, zero), LevelNoise(0))

        forward, both = flop(evaluate, x)
        kept = saved(lambda: evaluate(x.detach().requires_grad_()), self)
        gradient = both + forward if self.recompute else both
        memory = weights(self) + kept * min(self.max_batch, nfe)
        return Part(nfe, forward * nfe, gradient * nfe, memory)

    @torch.no_grad()
    def fit_temperature(self, x: Images, y: Labels) -> float:
        """Set the temperature under which validation labels are most probable, and return it.

        Args:
            x: Validation images, not used in the training.
            y: Classes of the images.

        Raises:
            InputError: Images or labels cannot be used, or they do not determine the temperature:
                where no image is wrong, as among training images, the lowest one is always best.
        """
        x, y = self.checked(x), checks.labels(y, self.classes)
        if len(x) != len(y):
            raise InputError(f"there are {len(x)} images and {len(y)} labels; give one each")
        likelihood = (self(x) - self.log_prior) * self.temperature
        grid = torch.logspace(-3, 4, 141).tolist()

        def cross_entropy(temperature: float) -> float:
            logits = self.log_prior + likelihood / temperature
            return float(nn.functional.cross_entropy(logits.double(), y.to(logits.device)))

        fitted = min(grid, key=cross_entropy)
        if fitted in (grid[0], grid[-1]):
            raise InputError(
                f"no temperature fits these {len(x)} images: all are classified correctly by far, "
                "or almost at random; give other validation images, or more"
            )
        self.temperature = fitted
        return fitted

    @torch.no_grad()
    def level_losses(self, x: Images) -> Tensor:
        """Return w_l ||D - x||^2 of each level and class, before the temperature.

        Args:
            x: Images in [0, 1], of shape (batch, channels, height, width).

        Returns:
            Losses of shape (batch, levels, classes); a class is the likelier the lower their sum.

        Raises:
            InputError: The images leave [0, 1], or the network's answer is not finite.
        """
        x, noise = self.checked(x), LevelNoise(self.seed)
        shape = (len(x), len(self.levels.sigmas), self.classes)
        rows = torch.arange(math.prod(shape))
        parts = [self.errors(x[at[0]], at, noise) for at in self.chunks(rows)]
        losses = torch.cat(parts).reshape(shape)
        checks.finite_answer(losses)
        return losses

    def errors(self, rows: Images, at: At, noise: LevelNoise) -> Tensor:
        """Return w_l ||D - x||^2 of rows of images, before the temperature, differentiable."""
        images, levels, classes = at
        eps = noise(rows, images.tolist(), levels.tolist())
        sigma, weight = (
            torch.tensor(values)[levels].to(rows.device, non_blocking=True)
            for values in (self.levels.sigmas, self.levels.weights)
        )
        scaled = (sigma / self.model.scale).to(rows.dtype)
        noisy = rows + scaled.reshape(-1, 1, 1, 1) * eps
        with torch.autocast(rows.device.type, torch.bfloat16, enabled=self.bf16):
            x_hat = self.model(noisy, scaled, classes)
        difference = (x_hat.to(rows.dtype) - rows) * self.model.scale
        error: Tensor = difference.square().flatten(1).sum(1)
        return weight.to(error) * error

    def chunks(self, rows: Tensor) -> Iterator[At]:
        """Yield ``max_batch`` rows at a time of a (batch, levels, classes) table, as indices.

        All on the host, where batches are planned: the device is waited for once, by the caller.
        """
        for chunk in torch.split(rows, self.max_batch) if len(rows) else ():
            per_level = chunk // self.classes
            count = len(self.levels.sigmas)
            yield per_level // count, per_level % count, chunk % self.classes

    def pairs(self, at: At, x: Images) -> Tensor:
        """Return the number of the (image, class) of each row, on the device of ``x``."""
        return (at[0] * self.classes + at[2]).to(x.device, non_blocking=True)

    def _train_losses(self, x: Images, noise: LevelNoise) -> Tensor:
        """Return the loss of each (image, class), differentiable in the parameters too."""

        def errors(x: Images, at: At) -> Tensor:
            return self.errors(x[at[0]], at, noise)

        losses = x.new_zeros(len(x) * self.classes)
        for at in self.chunks(torch.arange(losses.numel() * len(self.levels.sigmas))):
            part: Tensor = checkpoint(errors, x, at, use_reentrant=False)
            losses = losses.index_add(0, self.pairs(at, x), part)
        return losses.reshape(len(x), self.classes)


class _Losses(torch.autograd.Function):
    """The diffusion loss of each (image, class); its gradient is recomputed or taken along."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, classifier: DiffusionClassifier, noise: LevelNoise, along: bool
    ) -> Tensor:
        ctx.classifier, ctx.noise, ctx.along = classifier, noise, along
        pairs = len(x) * classifier.classes
        losses, slopes = x.new_zeros(pairs), x.new_zeros(pairs if along else 0, *x.shape[1:])
        for at in classifier.chunks(torch.arange(pairs * len(classifier.levels.sigmas))):
            with torch.set_grad_enabled(along):
                clean = x[at[0]].detach().requires_grad_(along)
                errors = classifier.errors(clean, at, noise)
                total = errors.sum()
            pair = classifier.pairs(at, x)
            losses.index_add_(0, pair, errors.detach())
            if along:
                slopes.index_add_(0, pair, torch.autograd.grad(total, clean)[0])
        ctx.save_for_backward(slopes if along else x)
        return losses.reshape(len(x), classifier.classes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        checks.first_derivative("a diffusion classifier")
        (saved,), (gradient,) = ctx.saved_tensors, gradients
        if ctx.along:
            slopes = saved.reshape(*gradient.shape, *saved.shape[1:])
            return torch.einsum("nk,nk...->n...", gradient, slopes), None, None, None
        return _recomputed(saved, ctx.classifier, ctx.noise, gradient), None, None, None


def _recomputed(
    x: Tensor, classifier: DiffusionClassifier, noise: LevelNoise, gradient: Tensor
) -> Tensor:
    """The gradient in x of sum gradient * losses, from those classes that have a part in it."""
    has_part = gradient.ne(0).cpu()[:, None, :].expand(-1, len(classifier.levels.sigmas), -1)
    total = torch.zeros_like(x)
    for at in classifier.chunks(has_part.flatten().nonzero().flatten()):
        images = at[0]
        first, last = int(images.min()), int(images.max()) + 1
        with torch.enable_grad():
            part = x[first:last].detach().requires_grad_()
            errors = classifier.errors(part[images - first], at, noise)
            value = (errors * gradient.flatten()[classifier.pairs(at, x)]).sum()
            (share,) = torch.autograd.grad(value, part)
        total[first:last] += share
    return total


def check_levels(model: DiffusionModel, levels: Levels) -> None:
    """Check that the model was trained on such noise levels."""
    low, high = model.sigma_min * model.scale, model.sigma_max * model.scale
    if min(levels.sigmas) < low * (1 - 1e-6) or max(levels.sigmas) > high * (1 + 1e-6):
        raise InputError(
            f"noise levels go from {min(levels.sigmas):g} to {max(levels.sigmas):g}, but the "
            f"diffusion model was trained on {low:g} to {high:g} (units of the network); give "
            f"levels.within({low:g}, {high:g})"
        )


def _log_prior(prior: Sequence[float] | None, classes: int) -> Tensor:
    if prior is None:
        return torch.zeros(classes)
    numbers = torch.tensor([checks.positive("prior", p) for p in prior])
    if len(numbers) != classes:
        raise InputError(f"prior has {len(numbers)} numbers for {classes} classes; give one each")
    return (numbers / numbers.sum()).log()


@dataclass(frozen=True)
class AnytimePrediction:
    """The result of `predict_anytime`.

    Attributes:
        predictions: Predicted classes, (batch,).
        decided: Whether one class was left, or all levels were evaluated for those that were left,
            (batch,); False where the budget ran out before.
        nfe: Number of network evaluations.
        full_nfe: Number of network evaluations of the full computation.
    """

    predictions: Labels
    decided: Tensor
    nfe: int
    full_nfe: int


@torch.no_grad()
def predict_anytime(
    classifier: DiffusionClassifier,
    x: Images,
    *,
    z: float = 3.0,
    first: int = 4,
    budget: int | None = None,
) -> AnytimePrediction:
    """Predict by elimination of classes.

    After m of L levels, a class is dropped if the projected difference of its loss to the leader's,
    L / m times the sum of their paired differences so far, exceeds z of its standard errors (with
    the correction for a finite number of levels). This is no proof: `disagreement` measures how
    often the prediction differs from that of all levels.

    Args:
        classifier: Diffusion classifier.
        x: Images (batch, channels, height, width) in [0, 1].
        z: Number of standard errors; larger is safer and slower.
        first: Number of levels before each round of elimination.
        budget: Largest number of network evaluations in all; None: no limit.

    Raises:
        InputError: A value is out of range, or the images cannot be used.

    Example:
        >>> from art_denoised.demo import digits_diffusion
        >>> from art_denoised.data import load_data
        >>> x = torch.stack([load_data("digits")[i][0] for i in range(8)])
        >>> classifier = DiffusionClassifier(digits_diffusion(), seed=0)
        >>> found = predict_anytime(classifier, x)
        >>> bool((found.predictions == classifier(x).argmax(1)).all())
        True
        >>> found.nfe < found.full_nfe / 3
        True
    """
    x, z = classifier.checked(x), checks.positive("z", z)
    first = max(checks.count("first", first), 2)
    count, classes = len(classifier.levels.sigmas), classifier.classes
    full = classifier.nfe(len(x))
    left = full if budget is None else checks.count("budget", budget, 0)
    noise, order = LevelNoise(classifier.seed), _spread(count)
    alive = torch.ones(len(x), classes, dtype=torch.bool, device=x.device)
    # Losses by level, in the order of evaluation; those of dropped classes stay zero.
    losses = torch.zeros(len(x), classes, count, dtype=torch.float64, device=x.device)
    prior = classifier.log_prior.double() * classifier.temperature / count  # as a loss a level
    done = torch.zeros(len(x), dtype=torch.long, device=x.device)
    spent = 0
    for start in range(0, count, first):
        chunk = order[start : start + first]
        racing = (alive.sum(1) > 1) & (done == start)  # none that the budget left behind
        cost = (alive.sum(1) * len(chunk)).where(racing, torch.zeros_like(done))
        racing &= cost.cumsum(0) <= left - spent
        rows = (racing[:, None] & alive).cpu().nonzero()
        if not len(rows):
            break
        for position, level in enumerate(chunk, start=start):
            for part in torch.split(rows, classifier.max_batch):
                image, label = part.unbind(1)
                at = (image, torch.full_like(image, level), label)
                losses[image, label, position] = classifier.errors(x[image], at, noise).double()
        checks.finite_answer(losses)
        spent += len(rows) * len(chunk)
        seen = start + len(chunk)
        done[racing] = seen
        if seen < count:  # after all levels the argmin decides
            alive &= ~(
                _behind(losses[:, :, :seen] - prior[:, None], alive, count, z) & racing[:, None]
            )
    # The prior counts for as many levels as the losses do; alone, where there are none.
    total = losses.sum(2) - prior * done.clamp_min(1)[:, None]
    predictions = total.masked_fill(~alive, torch.inf).argmin(1)
    decided = (alive.sum(1) == 1) | (done == count)
    return AnytimePrediction(predictions, decided, spent, full)


@torch.no_grad()
def disagreement(classifier: DiffusionClassifier, x: Images, **options: float) -> float:
    """Return the share of images for which `predict_anytime` and all levels disagree.

    Args:
        classifier: Diffusion classifier with a seed, so that both see the same noise.
        x: Images.
        **options: Options of `predict_anytime`.

    Raises:
        InputError: The classifier has no seed, a value is out of range, or the images cannot be
            used.

    Example:
        >>> from art_denoised.demo import digits_diffusion
        >>> from art_denoised.data import load_data
        >>> x = torch.stack([load_data("digits")[i][0] for i in range(20)])
        >>> disagreement(DiffusionClassifier(digits_diffusion(), seed=0), x)
        0.0
    """
    if classifier.seed is None:
        raise InputError("the seed is None, so noise is fresh in every call; give a seed")
    found = predict_anytime(classifier, x, **options)  # type: ignore[arg-type]
    return float((found.predictions != classifier(x).argmax(1)).double().mean())


def _behind(losses: Tensor, alive: Tensor, count: int, z: float) -> Tensor:
    """Return which classes cannot catch up with the leader, (batch, classes)."""
    seen = losses.shape[2]
    leader = losses.sum(2).masked_fill(~alive, torch.inf).argmin(1)
    difference = losses - losses[torch.arange(len(losses)), leader][:, None]
    spread = difference.std(2) * (seen * (1 - seen / count)) ** 0.5
    return alive & (difference.sum(2) > z * spread)


def _spread(count: int) -> list[int]:
    """Return 0..count-1 in an order whose beginnings are spread evenly (van der Corput)."""
    bits = count.bit_length()
    reversed_bits = (int(f"{i:0{bits}b}"[::-1], 2) for i in range(2**bits))
    return [level for level in reversed_bits if level < count]
