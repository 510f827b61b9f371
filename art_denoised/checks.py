"""Checks of what the user hands in, made once, at the door.

Each function returns the checked value in the form the library works with, or raises `InputError`
with one line that names the value and the remedy. The command line prints that line and exits
with 2; a library user gets a ``ValueError``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, SupportsFloat, SupportsIndex

import numpy as np
import torch
from torch import nn

if TYPE_CHECKING:
    from art_denoised.types import Images, Labels, Logits

_TOLERANCE = 1e-6  # rounding of an image that was scaled into the range in float32


class InputError(ValueError):
    """The input cannot be used; the message names the value and the remedy.

    Args:
        message: What is wrong, with the value.
        remedy: Argument of the called function that would mend it, such as ``resume=True``. The
            command line names the option of that argument.

    Attributes:
        remedy: That argument and its value.
    """

    def __init__(self, message: str, **remedy: Any) -> None:
        super().__init__(message)
        self.remedy = remedy


def positive(name: str, value: SupportsFloat) -> float:
    """Return ``value`` as a positive, finite float.

    Raises:
        InputError: ``value`` is not a number, not finite, or not above 0.

    Example:
        >>> positive("eps", "0.25")
        0.25
    """
    number = _number(name, value)
    if not (math.isfinite(number) and number > 0):
        raise InputError(f"{name} is {value}; give a positive number")
    return number


def sigma(value: SupportsFloat, clip_values: tuple[float, float] = (0.0, 1.0)) -> float:
    """Return the noise level as a float in image units.

    Raises:
        InputError: Not positive and finite, or so much larger than the range of the pixels that
            it must have been meant in other units (0..255).

    Example:
        >>> sigma(0.25)
        0.25
    """
    number = positive("sigma", value)
    low, high = float(np.min(clip_values[0])), float(np.max(clip_values[1]))
    if number > 10 * (high - low):
        raise InputError(
            f"sigma is {number:g}, more than ten times the range of the images "
            f"[{low:g}, {high:g}]; give it in image units (for example 64/255 = 0.25)"
        )
    return number


def eps(value: SupportsFloat, norm: str = "linf") -> float:
    """Return the radius of an attack as a float in image units; 0 is no attack.

    Raises:
        InputError: Negative, not finite, or in the l_inf norm above 1, the range of the pixels.

    Example:
        >>> eps(8 / 255)
        0.03137254901960784
    """
    number = _number("eps", value)
    if not 0 <= number < math.inf:
        raise InputError(f"eps is {value}; give a number >= 0")
    if norm == "linf" and number > 1:
        raise InputError(
            f"eps is {number:g}, more than the range of the images; give it in image units, "
            f"{number:g}/255 = {number / 255:.3g}"
        )
    return number


def alpha(value: SupportsFloat) -> float:
    """Return the failure probability of one certificate as a float in (0, 0.5).

    Raises:
        InputError: Outside (0, 0.5).

    Example:
        >>> alpha(0.001)
        0.001
    """
    number = _number("alpha", value)
    if not 0 < number < 0.5:
        raise InputError(f"alpha is {value}; give a failure probability in (0, 0.5), usually 0.001")
    return number


def count(name: str, value: SupportsIndex, minimum: int = 1) -> int:
    """Return ``value`` as an int of at least ``minimum``.

    Raises:
        InputError: Not an integer, or below ``minimum``.

    Example:
        >>> count("n0", 100)
        100
    """
    try:
        number = value.__index__()
    except AttributeError:
        raise InputError(f"{name} is {value!r}; give a whole number >= {minimum}") from None
    if number < minimum:
        raise InputError(f"{name} is {number}; give a whole number >= {minimum}")
    return number


def sample_count(n: SupportsIndex, alpha: float) -> int:
    """Return ``n`` if that many samples can certify anything at all at ``alpha``.

    With every sample agreeing, the Clopper-Pearson bound is alpha^(1/n); it must exceed 1/2.

    Raises:
        InputError: Even unanimous samples would end in an abstention.

    Example:
        >>> sample_count(10, 0.001)
        10
    """
    number = count("n", n)
    needed = math.floor(math.log2(1 / alpha)) + 1
    if number < needed:
        raise InputError(
            f"n is {number}; at alpha = {alpha:g} no image can be certified "
            f"with fewer than {needed} samples"
        )
    return number


def radii(values: Sequence[SupportsFloat]) -> tuple[float, ...]:
    """Return l2 radii as floats, ascending and each once.

    Raises:
        InputError: One is negative, not finite, or not a number.

    Example:
        >>> radii([0.5, 0, 0.25])
        (0.0, 0.25, 0.5)
    """
    numbers = sorted({_number("radius", value) for value in values})
    for number in numbers:
        if not 0 <= number < math.inf:
            raise InputError(f"radius is {number}; give numbers >= 0 in image units")
    return tuple(numbers)


def indices(values: Sequence[SupportsIndex], images: int) -> list[int]:
    """Return indices of images as ints.

    Raises:
        InputError: One is not in the data, or there twice.

    Example:
        >>> indices(np.arange(2), images=500)
        [0, 1]
    """
    numbers = [count("index", value, 0) for value in values]
    for number in numbers:
        if number >= images:
            raise InputError(f"image {number} is not in the data; give indices 0 to {images - 1}")
    if len(set(numbers)) != len(numbers):
        twice = next(number for number in numbers if numbers.count(number) > 1)
        raise InputError(f"image {twice} is named twice; give each index once")
    return numbers


def images(
    x: Any,
    *,
    clip_values: tuple[Any, Any] = (0.0, 1.0),
    shape: Sequence[int] | None = None,
    slack: float = 0.0,
) -> Images:
    """Return ``x`` as a tensor of NCHW images after checking it.

    Args:
        x: Array or tensor of shape (batch, channels, height, width), floating point.
        clip_values: Smallest and largest pixel value, scalars or arrays of one image's shape.
        shape: The (channels, height, width) that the model expects.
        slack: How far outside ``clip_values`` pixels may lie, as a share of the range. An attack
            in progress may leave the range a little; images in other units leave it by far.

    Raises:
        InputError: Wrong dtype or shape, NaN or infinite pixels, pixels out of range.

    Example:
        >>> images(np.full((2, 1, 8, 8), 0.5)).shape
        torch.Size([2, 1, 8, 8])
    """
    try:
        x = torch.as_tensor(x)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"images must be an array of numbers: {error}") from None
    if x.ndim != 4:
        raise InputError(
            f"images have shape {tuple(x.shape)}; give (batch, channels, height, width), "
            "for one image x[None]"
        )
    if shape is not None and tuple(x.shape[1:]) != tuple(shape):
        hint = ""
        if tuple(x.shape[1:]) == (*tuple(shape)[1:], shape[0]):
            hint = "; they look channels-last, transpose them with (0, 3, 1, 2)"
        raise InputError(
            f"images have shape {tuple(x.shape[1:])} each; the model takes {tuple(shape)}{hint}"
        )
    if not x.is_floating_point():
        raise InputError(
            f"images have dtype {str(x.dtype).removeprefix('torch.')}; "
            "convert them to floating point in clip_values, for 8-bit images x / 255"
        )
    if x.numel() == 0:
        raise InputError("there are no images; give at least one")
    if not bool(torch.isfinite(x).all()):
        raise InputError("images hold NaN or infinite pixels; clean them first")
    _check_range(x, clip_values, slack)
    return x


def _check_range(x: torch.Tensor, clip_values: tuple[Any, Any], slack: float) -> None:
    low = torch.as_tensor(clip_values[0], dtype=torch.float64)
    high = torch.as_tensor(clip_values[1], dtype=torch.float64)
    margin, x = slack * (high - low) + _TOLERANCE, x.detach().cpu()
    below = (x < low - margin).any()
    above = (x > high + margin).any()
    if bool(below | above):
        remedy = "divide by 255" if float(x.max()) > 2 and float(high.max()) <= 1 else "rescale"
        raise InputError(
            f"images span [{float(x.min()):g}, {float(x.max()):g}] but clip_values are "
            f"({float(low.min()):g}, {float(high.max()):g}); {remedy} or set clip_values"
        )


def labels(y: Any, nb_classes: int | None = None) -> Labels:
    """Return ``y`` as a tensor of class indices, shape (batch,).

    Raises:
        InputError: Not one integer a row, or out of range.

    Example:
        >>> labels([3, 0], nb_classes=4)
        tensor([3, 0])
    """
    try:
        y = torch.as_tensor(y)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"labels must be an array of class indices: {error}") from None
    if y.ndim != 1 or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise InputError(
            f"labels have shape {tuple(y.shape)} and dtype {str(y.dtype).removeprefix('torch.')}; "
            "give one integer class index an image"
        )
    high = "" if nb_classes is None else f" to {nb_classes - 1}"
    y = y.long()  # not every unsigned type can be compared
    bad = y[(y < 0) | (y >= nb_classes)] if nb_classes is not None else y[y < 0]
    if bad.numel():
        raise InputError(f"label {int(bad[0])} is out of range; labels go from 0{high}")
    return y


def class_indices(y: Any, nb_classes: int) -> Labels:
    """Return labels in any form that ART takes as class indices, shape (batch,).

    Args:
        y: Indices, of shape (batch,) or (batch, 1); or one-hot or probabilities, (batch, classes).
        nb_classes: How many classes there are.

    Raises:
        InputError: Another shape, or as for `labels`.

    Example:
        >>> class_indices([[2], [0]], 3), class_indices(np.eye(3), 3)
        (tensor([2, 0]), tensor([0, 1, 2]))
    """
    y = torch.as_tensor(y)
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    elif y.ndim == 2 and y.shape[1] == nb_classes:
        y = y.argmax(1)
    return labels(y, nb_classes)


def eval_mode(model: object) -> None:
    """Check that no layer of ``model`` is in a training mode that makes a difference.

    A certificate holds for the very function that was sampled; batch norm, dropout or stochastic
    depth in training mode is not a function of one image. Those of PyTorch are known by their
    class, others by theirs being named so.

    Raises:
        InputError: Some such layer is training.

    Example:
        >>> eval_mode(nn.Dropout().eval())
    """
    if not isinstance(model, nn.Module):
        return
    for name, module in model.named_modules():
        if module.training and _depends_on_mode(module):
            raise InputError(
                f"the model is in training mode ({type(module).__name__} at "
                f"{name or 'the top'!r}); call model.eval() first"
            )


def _depends_on_mode(module: nn.Module) -> bool:
    kinds = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd, nn.RReLU)
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return module.track_running_stats
    dropout = getattr(module, "dropout", 0)  # of recurrent layers and attention
    return (
        isinstance(module, kinds)
        or type(module).__name__.endswith(("DropPath", "StochasticDepth"))
        or (isinstance(dropout, float) and dropout > 0)
    )


def logits(output: Any, batch: int) -> Logits:
    """Return the output of a classifier if it is one row of logits an image.

    Raises:
        InputError: Another type or shape, a single class, or NaN among the values.

    Example:
        >>> logits(torch.zeros(2, 10), batch=2).shape
        torch.Size([2, 10])
    """
    if not isinstance(output, torch.Tensor):
        raise InputError(f"the model returned {type(output).__name__}; it must return a tensor")
    if output.ndim != 2 or output.shape[0] != batch or output.shape[1] < 2:
        raise InputError(
            f"the model returned shape {tuple(output.shape)} for {batch} images; "
            f"it must return logits of shape ({batch}, classes)"
        )
    if bool(torch.isnan(output).any()):
        raise InputError("the model returned NaN logits; a label cannot be read from them")
    return output


@torch.no_grad()
def class_count(model: Callable[[Images], Any], x: Images) -> int:
    """Return how many logits a classifier gives, by classifying ``x``: one image, before a run.

    Raises:
        InputError: The model cannot take such an image, or does not return logits.

    Example:
        >>> class_count(nn.Flatten(), torch.zeros(1, 1, 8, 8))
        64
    """
    return logits(_tried("model", model, x), len(x)).shape[1]


@torch.no_grad()
def denoises(denoiser: Callable[..., Any], x: Images, sigma: float) -> None:
    """Check that a denoiser makes an image of an image, by denoising ``x`` before a run.

    Raises:
        InputError: It cannot take such an image, or returns something of another shape.

    Example:
        >>> denoises(lambda x_noisy, sigma: x_noisy, torch.zeros(1, 1, 8, 8), 0.25)
    """
    x_hat = _tried("denoiser", denoiser, x, torch.full((len(x),), sigma, device=x.device))
    if getattr(x_hat, "shape", None) != x.shape:
        what = tuple(x_hat.shape) if isinstance(x_hat, torch.Tensor) else type(x_hat).__name__
        raise InputError(
            f"the denoiser returned {what} for an image of shape {tuple(x.shape)}; it must return "
            "an image of that shape"
        )


def _tried(name: str, model: Callable[..., Any], x: Images, *more: Any) -> Any:
    try:
        return model(x, *more)
    except InputError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"the {name} failed on an image of shape {tuple(x.shape[1:])}, {x.dtype} "
            f"({type(error).__name__}: {reason}); give the shape and dtype that it was made for"
        ) from error


def _number(name: str, value: SupportsFloat) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise InputError(f"{name} is {value!r}; give a number") from None
