"""Images of a data set as tensors, checked one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.data import ImageData
from art_denoised.types import Images, Labels


def stack_images(
    data: ImageData, indices: Sequence[int], classes: int | None = None
) -> tuple[Images, Labels]:
    """Return copies of images and their true classes as tensors.

    Args:
        data: Pairs of an image (channels, height, width) in [0, 1] and its class.
        indices: Indices of the images.
        classes: Number of classes that labels are checked against; None: not checked.

    Returns:
        Images (batch, channels, height, width), float32, and labels (batch,).

    Raises:
        InputError: An image or label cannot be used. The message names the image.

    Example:
        >>> from art_denoised.data import load_data
        >>> x, y = stack_images(load_data("digits"), [0, 5])
        >>> x.shape, y
        (torch.Size([2, 1, 8, 8]), tensor([2, 7]))
    """
    images, labels = [], []
    for index in indices:
        x, label = _pair(index, data[index])
        try:
            images.append(checks.images(_tensor(x)[None]).float())
            labels.append(checks.labels([int(label)], classes))
        except InputError as error:
            raise InputError(f"image {index}: {error}") from None
        except (TypeError, ValueError, RuntimeError):
            raise InputError(
                f"image {index} has the label {label!r}, or an image that is not an array of "
                "numbers; give a class index, not one-hot"
            ) from None
        if images[-1].shape != images[0].shape:
            raise InputError(
                f"image {index} has shape {tuple(images[-1].shape[1:])}, but image {indices[0]} "
                f"has {tuple(images[0].shape[1:])}; crop or pad the images to one shape"
            )
    return torch.cat(images), torch.cat(labels)


def _pair(index: int, item: Any) -> tuple[Any, Any]:
    try:
        x, label = item
    except (TypeError, ValueError):
        size = f" of {len(item)}" if isinstance(item, (tuple, list)) else ""
        raise InputError(
            f"image {index} is given as a {type(item).__name__}{size}; give pairs of an image and "
            "its class"
        ) from None
    return x, label


def _tensor(x: Any) -> torch.Tensor:
    if type(x).__module__.partition(".")[0] == "PIL":
        raise InputError("it is a PIL image; convert it with torchvision.transforms.ToTensor()")
    # A copy: arrays may be read-only, and nothing here may write into the data set.
    return x.detach().clone() if isinstance(x, torch.Tensor) else torch.as_tensor(np.array(x))
