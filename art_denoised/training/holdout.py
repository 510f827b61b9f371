"""Images that are not trained on, and judge a training."""

from __future__ import annotations

from typing import Any

import torch

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.types import Images, Labels


def stack_holdout(data: Any, classes: int | None = None) -> tuple[Images, Labels]:
    """Read all pairs of a data set into two tensors.

    Args:
        data: Pairs of image and label, at least one, with a length; no DataLoader.
        classes: Number of classes, if labels are to be checked for it.

    Raises:
        InputError: Something else, or images of several sizes.

    Example:
        >>> x, y = stack_holdout([(torch.zeros(1, 8, 8), 3), (torch.ones(1, 8, 8), 4)])
        >>> x.shape, y.tolist()
        (torch.Size([2, 1, 8, 8]), [3, 4])
    """
    try:
        images, labels = zip(*(data[i] for i in range(len(data))), strict=True)
        x = torch.stack([torch.as_tensor(image) for image in images])
        y = torch.tensor([int(label) for label in labels])
    except (TypeError, ValueError, RuntimeError, LookupError, NotImplementedError):
        raise InputError(
            "the holdout must be pairs of an image and its class, at least one, all images of one "
            "size; of a DataLoader give its dataset"
        ) from None
    return checks.images(x).float(), checks.labels(y, classes)
