"""The words that every part of the package shares: array shapes and the protocols.

Images are NCHW floating-point tensors, by default in [0, 1]; sigma, the standard deviation of the
Gaussian noise, is in the same units. An adapter that wraps a network living in [-1, 1] is the only
place that knows about it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol, TypeAlias, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor, nn

Image: TypeAlias = Float[Tensor, "channels height width"]
Images: TypeAlias = Float[Tensor, "batch channels height width"]
Labels: TypeAlias = Int[Tensor, "batch"]
Logits: TypeAlias = Float[Tensor, "batch classes"]
Sigmas: TypeAlias = float | Float[Tensor, "batch"]


class Denoiser(Protocol):
    """Anything that maps noisy images and their noise level to an estimate of the clean images.

    DnCNN, MemNet, a U-Net, a diffusion model or any denoiser of deepinv is one as it stands.
    """

    def __call__(self, x_noisy: Images, sigma: Sigmas, /) -> Images:
        """Return ``x_hat``, shaped and scaled like ``x_noisy``."""
        ...


class Classifier(Protocol):
    """Anything that maps images to one row of logits each."""

    def __call__(self, x: Images, /) -> Logits:
        """Return logits of shape (batch, classes)."""
        ...


class Attack(Protocol):
    """Anything that looks for images near ``x`` which the model gets wrong."""

    def __call__(self, model: nn.Module, x: Images, y: Labels, /) -> Images:
        """Return ``x_adv``, shaped like ``x`` and on its device; ``y`` are the true labels."""
        ...


@runtime_checkable
class Seeded(Protocol):
    """A module whose noise can be fixed, or drawn afresh in each call.

    Attributes:
        seed: Seed of the noise; None: fresh noise in every call.
    """

    seed: int | None


@runtime_checkable
class GradientModes(Protocol):
    """A module that an attacker may differentiate in several ways.

    Attributes:
        gradient: The way in use, one of ``gradients``.
        gradients: The ways there are, such as ``("exact", "bpda")``.
    """

    gradient: str
    gradients: tuple[str, ...]


@runtime_checkable
class Smoothed(Protocol):
    """A module that averages a base classifier over Gaussian noise.

    Attributes:
        base: Classifier that sees the noisy images.
        sigma: Standard deviation of the noise, image units.
    """

    base: nn.Module
    sigma: float


@runtime_checkable
class Purifies(Protocol):
    """A module that cleans images before they are classified."""

    def purify(self, x: Images, /) -> Images:
        """Return cleaned images, shaped and scaled like ``x``."""
        ...


@runtime_checkable
class Follows(Protocol):
    """A purifier whose way through noise an attack can follow."""

    def following(self) -> AbstractContextManager[list[Tensor]]:
        """Collect, of each call, how far the states leave the noised images, (batch,)."""
        ...
