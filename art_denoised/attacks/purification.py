"""Attacks on purification: BPDA, and PGD that follows its path or chooses among its draws."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from art_denoised import checks
from art_denoised.attacks.pgd import PGD, LossName, Norm, direction
from art_denoised.autograd import straight_through
from art_denoised.checks import InputError
from art_denoised.types import Follows, Images

if TYPE_CHECKING:
    from art_denoised.types import Labels, Logits

Transform = Callable[[Images], Images]


class BPDA(nn.Module):
    """An image transform with the gradient of another one.

    Use it for transforms without a useful gradient: JPEG, quantisation, code outside torch.
    Gradient attacks on ``nn.Sequential(BPDA(transform), classifier)`` then see through it. It is an
    approximation: attack without gradients (Square) as well, and believe the stronger attack.

    Source: Athalye et al., "Obfuscated Gradients Give a False Sense of Security" (ICML 2018, arXiv
    1802.00420), section 4.1.

    Args:
        transform: Function from images to images; called without gradients on a copy.
        backward: Differentiable approximation of ``transform``, used for its gradient alone; None:
            the identity, for transforms with t(x) close to x.

    Raises:
        InputError: When called: transform and backward return different shapes.

    Example:
        >>> quantise = BPDA(lambda x: (x * 7).round() / 7)
        >>> x = torch.rand(2, 3, 4, 4, requires_grad=True)
        >>> quantise(x).sum().backward()
        >>> bool((x.grad == 1).all())
        True
    """

    def __init__(self, transform: Transform, backward: Transform | None = None) -> None:
        super().__init__()
        self.transform, self.backward = transform, backward
        self.training = checks.in_training(transform, backward)

    def forward(self, x: Images) -> Images:
        """Return ``transform(x)``."""
        with torch.no_grad():
            value = self.transform(x.clone())  # it may write into its input
        if not (torch.is_grad_enabled() and x.requires_grad):
            return value
        stand_in = x if self.backward is None else self.backward(x)
        if stand_in.shape != value.shape:
            raise InputError(
                f"the transform returned shape {tuple(value.shape)} and backward "
                f"{tuple(stand_in.shape)}; give a backward of the transform's shape"
            )
        return straight_through(value, stand_in)


@dataclass(frozen=True, slots=True)
class DiffAttack(PGD):
    """PGD that also drives a purifier off the path of the noised image, at every step.

    The loss is that of `PGD` plus ``path_weight`` times the mean distance of the states of the
    reverse process from the noised images at the same levels (`Purification.following`). Gradients
    flow from every step, so they vanish less in long chains. With BPDA the second part has none.

    Source: Kang et al., "DiffAttack: Evasion Attacks Against Diffusion-Based Adversarial
    Purification" (NeurIPS 2023, arXiv 2311.16124), section 3.2. Its segment-wise recomputation is
    the "exact" gradient of `Purification`.

    Args:
        path_weight: Weight of the distance along the path.

    Raises:
        InputError: The weight is not positive, no part of the model can be followed, or `PGD`
            raises it.

    Example:
        >>> from art_denoised import Purification, PurifiedClassifier
        >>> from art_denoised.demo import digits_classifier, digits_diffusion
        >>> purify = Purification(digits_diffusion(), t=0.1, steps=3, seed=0)
        >>> model = PurifiedClassifier(purify, digits_classifier())
        >>> x = torch.rand(2, 1, 8, 8)
        >>> DiffAttack(0.1, steps=2)(model, x, torch.tensor([3, 4])).shape
        torch.Size([2, 1, 8, 8])
    """

    path_weight: float = 1.0

    def __post_init__(self) -> None:
        PGD.__post_init__(self)
        checks.positive("path_weight", self.path_weight)

    def _losses(
        self, model: nn.Module, x_adv: Images, y: Labels, target: Labels | None
    ) -> tuple[Logits, Tensor]:
        parts = [part for part in model.modules() if isinstance(part, Follows)]
        if not parts:
            raise InputError(
                f"no part of the {type(model).__name__} can be followed; attack Purification, or "
                "use PGD"
            )
        with contextlib.ExitStack() as stack:
            paths = [stack.enter_context(part.following()) for part in parts]
            logits, losses = PGD._losses(self, model, x_adv, y, target)
        distances = [torch.stack(path).mean(0) for path in paths if path]
        return logits, losses + self.path_weight * sum(distances)


@dataclass(frozen=True, slots=True)
class DiffHammer(PGD):
    """PGD along the gradient of those draws that can be broken together (selective attack).

    The mean gradient over all draws of a randomised model also serves draws that no small change
    breaks, or that need the opposite change. Expectation-maximisation weighs the draws instead:
    draw k gets the weight sigmoid(sharpness (L_k + eps <d, g_k>)), where d is the direction of the
    current gradient, which then becomes the weighted mean. It begins with the draw along whose
    gradient all draws together rise most.

    It differs from the public code in three points: each draw has its own gradient through the
    purifier, where the code grafts gradients of the classifier onto one draw to save time; the
    rounds of expectation-maximisation are carried out, where the code repeats the first; and there
    is no momentum.

    Source: Wang et al., "DiffHammer: Rethinking the Robustness of Diffusion-Based Adversarial
    Purification" (NeurIPS 2024), and its public code for the weights and defaults.

    Args:
        sharpness: Factor lambda in the weights.
        rounds: Number of rounds of expectation-maximisation.

    Raises:
        InputError: A value is out of range, or `PGD` raises it.

    Example:
        >>> from art_denoised import Purification, PurifiedClassifier
        >>> from art_denoised.demo import digits_classifier, digits_diffusion
        >>> purify = Purification(digits_diffusion(), t=0.1, steps=3)
        >>> model = PurifiedClassifier(purify, digits_classifier())
        >>> x = torch.rand(2, 1, 8, 8)
        >>> DiffHammer(0.1, steps=2, eot=3)(model, x, torch.tensor([3, 4])).shape
        torch.Size([2, 1, 8, 8])
    """

    loss: LossName = "margin"
    eot: int = 10
    sharpness: float = 5.0
    rounds: int = 5

    def __post_init__(self) -> None:
        PGD.__post_init__(self)
        checks.positive("sharpness", self.sharpness)
        checks.count("rounds", self.rounds)

    def _gradient(
        self, model: nn.Module, x_adv: Images, y: Labels, target: Labels | None
    ) -> tuple[Images, Tensor]:
        gradients, draws = zip(*self._gradients(model, x_adv, y, target), strict=True)
        seen = torch.stack(draws)
        chosen = selected_gradient(
            seen[:, 1],
            torch.stack(gradients).nan_to_num(),
            eps=self.eps,
            norm=self.norm,
            sharpness=self.sharpness,
            rounds=self.rounds,
        )
        return chosen, seen.sum(0)


def selected_gradient(
    losses: Tensor, gradients: Tensor, *, eps: float, norm: Norm, sharpness: float, rounds: int
) -> Images:
    """Return the gradient of the draws that can be broken together, by expectation-maximisation.

    Args:
        losses: Loss of each draw and image, (draws, batch); above 0 where the draw is broken.
        gradients: Gradient of each, (draws, batch, channels, height, width).
        eps: Length of the step that the draws are expected to take.
        norm: Norm of the ball.
        sharpness: Factor in the weights.
        rounds: Number of rounds.
    """
    flat = gradients.flatten(2)
    ways = torch.stack([direction(gradient, norm) for gradient in gradients]).flatten(2)
    rises = torch.einsum("abd,cbd->acb", ways, flat)  # of draw c along the gradient of draw a
    first = F.elu(losses + eps * rises).sum(1).argmax(0)
    chosen = flat[first, torch.arange(len(first), device=first.device)]
    for _ in range(rounds):
        way = direction(chosen.reshape(gradients.shape[1:]), norm).flatten(1)
        weight = torch.sigmoid(sharpness * (losses + eps * (way * flat).sum(2)))[:, :, None]
        chosen = (weight * flat).sum(0) / weight.sum(0).clamp_min(torch.finfo(flat.dtype).tiny)
    return chosen.reshape(gradients.shape[1:])
