"""A diffusion model of any family as D(x_noisy, sigma, y), on images in [0, 1]."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from art_denoised.checks import InputError
from art_denoised.diffusion.families import Family

if TYPE_CHECKING:
    from art_denoised.types import Images, Labels, Sigmas


class DiffusionModel(nn.Module):
    """The posterior mean E[x | x_noisy, y] of a diffusion model, whatever its family.

    It is a `Denoiser`, in the units of images in [0, 1]: a network that lives in [-1, 1] sees
    images twice as large and noise of 2 sigma, and knows nothing else.

    Args:
        network: Called as ``network(x, c_noise, y)`` with images in its own range, c_noise of shape
            (batch,), and class indices (batch,) or None; returns what the family says, one
            channel for each of ``x``.
        family: How the network sees noise.
        classes: Number of classes of a conditional network; None: it knows none.
        null_class: Class index that stands for no class; None: a conditional network has to be
            given a class always.
        image_range: Smallest and largest pixel value in the network's units.

    Raises:
        InputError: A null class without classes, or an empty range.

    Example:
        >>> from art_denoised.diffusion.families import Native
        >>> class Shrink(nn.Module):  # the posterior mean of N(0, 1) images
        ...     def forward(self, x, sigma, y):
        ...         return x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)
        >>> model = DiffusionModel(Shrink(), Native())
        >>> x_hat = model(torch.full((1, 1, 2, 2), 0.75), 0.5)  # 0.5 under noise 1.0 in [-1, 1]
        >>> float(x_hat[0, 0, 0, 0])
        0.625
    """

    def __init__(
        self,
        network: nn.Module,
        family: Family,
        *,
        classes: int | None = None,
        null_class: int | None = None,
        image_range: tuple[float, float] = (-1.0, 1.0),
    ) -> None:
        super().__init__()
        if classes is None and null_class is not None:
            raise InputError(f"null_class is {null_class} but there are no classes; give classes")
        if null_class is not None and null_class < (classes or 0):
            raise InputError(
                f"null_class is {null_class}, which is one of the {classes} classes; give another"
            )
        if not image_range[0] < image_range[1]:
            raise InputError(f"image_range is {image_range}; give the lower end first")
        self.network, self.family = network, family
        self.training = network.training
        self.classes, self.null_class = classes, null_class
        self.image_range = image_range

    def extra_repr(self) -> str:
        """Return what it is, beside its network."""
        return (
            f"{self.family}, classes={self.classes}, null_class={self.null_class}, "
            f"image_range={self.image_range}"
        )

    @property
    def noise(self) -> float:
        """Standard deviation of the noise in the images that it models, image units."""
        return 0.0

    @property
    def scale(self) -> float:
        """Length of the network's range: noise of sigma is this many sigma to it."""
        return self.image_range[1] - self.image_range[0]

    @property
    def sigma_min(self) -> float:
        """Lowest noise level of the training, in image units."""
        return self.family.sigma_min / self.scale

    @property
    def sigma_max(self) -> float:
        """Highest noise level of the training, in image units."""
        return self.family.sigma_max / self.scale

    def at_least(self, sigma: float) -> float:
        """Return the smallest noise level of the training, not below ``sigma``; image units.

        Raises:
            InputError: The training had none as high.
        """
        level = self.family.at_least(sigma * self.scale) / self.scale
        return max(level, sigma)  # not below, in floating point either

    def forward(self, x_noisy: Images, sigma: Sigmas, y: Labels | None = None) -> Images:
        """Return E[x | x_noisy, y].

        Args:
            x_noisy: Clean images in [0, 1] plus noise.
            sigma: Standard deviation of the noise in image units, one number or one an image.
            y: Class indices, the null class among them; None: of no class.

        Raises:
            InputError: A class to a network that knows none, none to one that needs it, or one
                that it does not know.
        """
        # In float32 at least: half precision would round steps and levels.
        precision = torch.promote_types(x_noisy.dtype, torch.float32)
        level = torch.as_tensor(sigma, dtype=precision, device=x_noisy.device) * self.scale
        level = level.reshape(-1).expand(len(x_noisy))
        c_skip, c_out, c_in, c_noise = self.family.at(level)
        low, column = self.image_range[0], (-1, 1, 1, 1)
        x = low + self.scale * x_noisy
        network_in = (c_in.reshape(column) * x).to(x_noisy.dtype)
        answer = self.network(network_in, c_noise, self._labels(y, x_noisy))
        x_hat = c_skip.reshape(column) * x + c_out.reshape(column) * answer
        return ((x_hat - low) / self.scale).to(x_noisy.dtype)

    def _labels(self, y: Labels | None, x: Images) -> Labels | None:
        if self.classes is None:
            if y is not None:
                raise InputError("the diffusion model knows no classes; give one that does")
            return None
        if y is not None:
            if y.shape != (len(x),):
                raise InputError(f"labels have shape {tuple(y.shape)}; give one an image, {len(x)}")
            known = (y >= 0) & (y < self.classes)
            if self.null_class is not None:
                known |= y == self.null_class
            if not bool(known.all()):
                raise InputError(
                    f"labels span {int(y.min())} to {int(y.max())}; the diffusion model knows the "
                    f"classes 0 to {self.classes - 1}"
                )
            return y
        if self.null_class is None:
            raise InputError("the diffusion model has no null class; give the class of each image")
        return torch.full((len(x),), self.null_class, device=x.device)
