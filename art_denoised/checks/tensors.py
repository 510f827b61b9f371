"""Checks of images and labels."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from art_denoised.checks.values import InputError

if TYPE_CHECKING:
    from art_denoised.types import Images, Labels

_TOLERANCE = 1e-6  # rounding of an image that was scaled into the range in float32


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
        >>> import numpy as np
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


def attacked_images(
    x: Any,
    *,
    clip_values: tuple[Any, Any] = (0.0, 1.0),
    shape: Sequence[int] | None = None,
    slack: float = 0.5,
) -> Images:
    """Return ``x`` as `images` does, with a warning in place of an error on pixels out of range.

    Some attacks leave the range on their way and clip at the end only.

    Args:
        x: Array or tensor of shape (batch, channels, height, width), floating point.
        clip_values: Smallest and largest pixel value.
        shape: The (channels, height, width) that the model expects.
        slack: How far outside ``clip_values`` pixels may lie without a warning, as a share of the
            range.

    Raises:
        InputError: Wrong dtype or shape, NaN or infinite pixels.

    Example:
        >>> import numpy as np
        >>> attacked_images(np.full((2, 1, 8, 8), 1.25)).shape
        torch.Size([2, 1, 8, 8])
    """
    x = images(x, clip_values=clip_values, shape=shape, slack=math.inf)
    try:
        _check_range(x, clip_values, slack)
    except InputError as error:
        warnings.warn(str(error), stacklevel=3)
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
    y = _label_tensor(y)
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
        InputError: The shape is another one, or a label is out of range.

    Example:
        >>> import numpy as np
        >>> class_indices([[2], [0]], 3), class_indices(np.eye(3), 3)
        (tensor([2, 0]), tensor([0, 1, 2]))
    """
    y = _label_tensor(y)
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    elif y.ndim == 2 and y.shape[1] == nb_classes:
        y = y.argmax(1)
    return labels(y, nb_classes)


def _label_tensor(y: Any) -> torch.Tensor:
    try:
        return torch.as_tensor(y)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"labels must be an array of class indices: {error}") from None
