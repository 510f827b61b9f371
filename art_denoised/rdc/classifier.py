"""A class-conditional diffusion model as Bayes classifier, with exact gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.diffusion.model import DiffusionModel
from art_denoised.diffusion.weights import Levels, noise_levels
from art_denoised.rdc.noise import LevelNoise

if TYPE_CHECKING:
    from art_denoised.types import Images, Labels, Logits


class DiffusionClassifier(nn.Module):
    """Images to logits by the likelihood that a diffusion model gives them under each class.

    ``logits[y] = log p(y) - sum_l w_l ||D(x + sigma_l eps_l; sigma_l, y) - x||^2 / temperature`` in
    the units of the network, summed over pixels, eps_l shared by all classes: what makes few levels
    suffice. Gradients in x are exact: the network evaluations of the forward pass are taken again
    in the backward pass, with the same noise, for those classes alone whose logit has a gradient.
    So memory depends on neither levels nor classes.

    It starts in eval mode, where the weights of the network get no gradient. In training mode they
    do, at the cost of a backward pass through all classes.

    Source: Chen et al., "Robust Classification via a Single Diffusion Model" (ICML 2024, arXiv
    2305.15241), section 3.1; Li et al. (ICCV 2023) for shared noise.

    Args:
        model: Class-conditional, in eval mode.
        levels: Noise levels and weights; `noise_levels` (32) by default.
        seed: Fixes the noise: a deterministic function of each image. None: fresh in every call.
        prior: p(y) of each class; None: uniform.
        temperature: Divides the likelihood term. 1 is Bayes' rule if the loss were an exact bound.
            It changes no prediction, but an attack on cross-entropy is the weaker, and the defence
            flattered, the further it is off: use `fit_temperature` before (docs/rdc.md).
        max_batch: Network evaluations at once.
        bf16: Autocast the network to bfloat16.

    Raises:
        InputError: A model without classes, levels outside its training, or a value out of range.

    Example:
        >>> from art_denoised.demo import digits_diffusion
        >>> from art_denoised.evaluation.data import load_data
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
    ) -> None:
        super().__init__()
        if model.classes is None:
            raise InputError("the diffusion model knows no classes; give a class-conditional one")
        levels = noise_levels(32) if levels is None else levels
        _check_levels(model, levels)
        self.model, self.levels = model, levels
        self.classes: int = model.classes
        self.seed = seed if seed is None else checks.count("seed", seed, 0)
        self.temperature = checks.positive("temperature", temperature)
        self.max_batch = checks.count("max_batch", max_batch)
        self.bf16 = bf16
        self.register_buffer("log_prior", _log_prior(prior, self.classes))
        self.eval()

    def forward(self, x: Images) -> Logits:
        """Return logits of shape (batch, classes), differentiable in ``x``."""
        noise = LevelNoise(self.seed)
        losses = self._train_losses(x, noise) if self.training else _Losses.apply(x, self, noise)
        return self.log_prior.to(losses) - losses / self.temperature

    def evaluations(self, images: int) -> int:
        """Return how many passes of the network a prediction of so many images takes."""
        return images * self.classes * len(self.levels.sigmas)

    @torch.no_grad()
    def fit_temperature(self, x: Images, y: Labels) -> float:
        """Choose the temperature under which held-out labels are most probable, and return it.

        Args:
            x: Held-out images.
            y: Their classes.

        Raises:
            InputError: Images or labels that cannot be used, or that leave the temperature open,
                as training images do: where no image is wrong, any low temperature is the best.
        """
        x, y = checks.images(x), checks.labels(y, self.classes)
        likelihood = (self(x) - self.log_prior) * self.temperature
        grid = torch.logspace(-3, 4, 141).tolist()

        def cross_entropy(temperature: float) -> float:
            logits = self.log_prior + likelihood / temperature
            return float(nn.functional.cross_entropy(logits.double(), y.to(logits.device)))

        fitted = min(grid, key=cross_entropy)
        if fitted in (grid[0], grid[-1]):
            raise InputError(
                f"no temperature fits these {len(x)} images: all are classified correctly by far, "
                "or as good as at random; give other held-out images, or more"
            )
        self.temperature = fitted
        return fitted

    def _train_losses(self, x: Images, noise: LevelNoise) -> Tensor:
        """Return the loss of each (image, class), differentiable in the parameters too."""
        losses = x.new_zeros(len(x) * self.classes)
        rows = torch.arange(losses.numel() * len(self.levels.sigmas), device=x.device)
        for at in self._chunks(rows):
            errors: Tensor = checkpoint(self.errors, x, at, noise, use_reentrant=False)
            losses = losses.index_add(0, at[0] * self.classes + at[2], _finite(errors))
        return losses.reshape(len(x), self.classes)

    def _chunks(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield (images, levels, classes) of rows of a (batch, levels, classes) table."""
        for chunk in torch.split(rows, self.max_batch) if len(rows) else ():
            per_level = chunk // self.classes
            count = len(self.levels.sigmas)
            yield per_level // count, per_level % count, chunk % self.classes

    def errors(
        self, x: Images, at: tuple[Tensor, Tensor, Tensor], noise: LevelNoise | _Offset
    ) -> Tensor:
        """Return weighted errors w_l ||D - x||^2 before the temperature, differentiable in ``x``.

        Args:
            x: Images.
            at: Indices of image, level and class of each row.
            noise: Of the pass that the rows are a part of.
        """
        images, levels, classes = at
        sigma = torch.tensor(self.levels.sigmas, device=x.device)[levels]
        weight = torch.tensor(self.levels.weights, device=x.device)[levels]
        clean = x[images]
        eps = noise(x, images.tolist(), levels.tolist())
        scaled = (sigma / self.model.scale).to(x.dtype)
        noisy = clean + scaled.reshape(-1, 1, 1, 1) * eps
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            x_hat = self.model(noisy, scaled, classes)
        difference = (x_hat.to(clean.dtype) - clean) * self.model.scale
        error: Tensor = difference.square().flatten(1).sum(1)
        return weight.to(error) * error


class _Losses(torch.autograd.Function):
    """The diffusion loss of each (image, class), recomputed for its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, classifier: DiffusionClassifier, noise: LevelNoise) -> Tensor:
        ctx.save_for_backward(x)
        ctx.classifier, ctx.noise = classifier, noise
        levels = len(classifier.levels.sigmas)
        losses = x.new_zeros(len(x) * classifier.classes)
        rows = torch.arange(len(x) * levels * classifier.classes, device=x.device)
        for at in classifier._chunks(rows):
            errors = _finite(classifier.errors(x, at, noise))
            losses.index_add_(0, at[0] * classifier.classes + at[2], errors)
        return losses.reshape(len(x), classifier.classes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        (x,), (gradient,) = ctx.saved_tensors, gradients
        classifier: DiffusionClassifier = ctx.classifier
        levels = len(classifier.levels.sigmas)
        table = gradient[:, None, :].expand(-1, levels, -1)
        rows = table.flatten().nonzero().flatten()
        total = torch.zeros_like(x)
        for at in classifier._chunks(rows):
            first, last = int(at[0].min()), int(at[0].max()) + 1
            with torch.enable_grad():
                part = x[first:last].detach().requires_grad_()
                inside = (at[0] - first, at[1], at[2])
                errors = classifier.errors(part, inside, _Offset(ctx.noise, first))
                value = (errors * gradient[at[0], at[2]]).sum()
                (share,) = torch.autograd.grad(value, part)
            total[first:last] += share
        return total, None, None


class _Offset:
    """The noise of images that are a part of the batch."""

    def __init__(self, noise: LevelNoise, first: int) -> None:
        self._noise, self._first = noise, first

    def __call__(self, x: Images, images: Sequence[int], levels: Sequence[int]) -> Images:
        return self._noise(x, [image + self._first for image in images], levels)


def _finite(errors: Tensor) -> Tensor:
    if not bool(torch.isfinite(errors).all()):
        raise InputError("the diffusion model returned NaN or infinite values")
    return errors


def _check_levels(model: DiffusionModel, levels: Levels) -> None:
    low, high = model.sigma_min * model.scale, model.sigma_max * model.scale
    if max(levels.sigmas) > high * (1 + 1e-6):
        raise InputError(
            f"noise levels go up to {max(levels.sigmas):g}, but the diffusion model was trained on "
            f"{low:g} to {high:g} (units of the network); give levels within"
        )


def _log_prior(prior: Sequence[float] | None, classes: int) -> Tensor:
    if prior is None:
        return torch.zeros(classes)
    numbers = torch.tensor([checks.positive("prior", p) for p in prior])
    if len(numbers) != classes:
        raise InputError(f"prior has {len(numbers)} numbers for {classes} classes; give one each")
    return (numbers / numbers.sum()).log()
