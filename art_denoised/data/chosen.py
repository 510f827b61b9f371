"""The one door for images and labels of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.data.sources import ImageData
from art_denoised.types import Image, Images, Labels


class Chosen:
    """The images of a run: chosen by index, and checked where they enter.

    Args:
        data: Pairs of an image (channels, height, width) in [0, 1] and its class.
        indices: Indices of the images; None: all.
        classes: Number of classes; None: not known yet.

    Attributes:
        indices: The indices, as ints.
        classes: Number of classes that labels are checked for, once it is known.
        shape: (channels, height, width) of the images, once one was read; all must have it.
        notices: What the user should know of the choice, once `settings` has read all images.

    Raises:
        InputError: An index that is not in the data, or is there twice.

    Example:
        >>> from art_denoised.data import load_data
        >>> images = Chosen(load_data("digits"), [7, 9])
        >>> x, label = images[7]
        >>> tuple(x.shape), label, len(images)
        ((1, 8, 8), 9, 2)
    """

    def __init__(
        self, data: ImageData, indices: Sequence[int] | None = None, classes: int | None = None
    ) -> None:
        self._data = data
        self.shape: tuple[int, ...] | None = None  # of the first image: all must have it
        self.indices = checks.indices(range(len(data)) if indices is None else indices, len(data))
        self.classes = classes
        self.notices: list[str] = []

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[tuple[int, Image, int]]:
        """Yield (index, image, label)."""
        for index in self.indices:
            yield (index, *self[index])

    def __getitem__(self, index: int) -> tuple[Image, int]:
        """Return image and label of one index.

        Raises:
            InputError: The data hold no such pair there; the message names the image.
        """
        entry = self._data[index]
        try:
            if not isinstance(entry, (tuple, list)) or len(entry) != 2:
                raise InputError(
                    f"the data give {_kind(entry)}; give pairs of an image and its class"
                )
            x = checks.images(_own(entry[0])[None], shape=self.shape)[0].float()
            label = int(checks.labels([entry[1]], self.classes)[0])
        except InputError as error:
            raise InputError(f"image {index}: {error}") from None
        self.shape = tuple(x.shape)
        return x, label

    def stack(self, indices: Sequence[int]) -> tuple[Images, Labels]:
        """Return some of the images as a batch, and their labels.

        Args:
            indices: Indices in the data set.

        Raises:
            InputError: The data hold no such pair there; the message names the image.
        """
        pairs = [self[index] for index in indices]
        return torch.stack([x for x, _ in pairs]), torch.tensor([label for _, label in pairs])

    def settings(
        self, watch: Callable[[Iterable[Any]], Iterable[Any]] = lambda images: images
    ) -> dict[str, Any]:
        """Return what tells these images and labels from any others, reading all of them.

        Args:
            watch: Wrapper of the iteration, for a progress bar.
        """
        pixels, labels = hashlib.sha256(), []
        for index, x, label in watch(self):
            pixels.update(f"{index} {tuple(x.shape)}".encode())
            pixels.update(x.cpu().contiguous().numpy().tobytes())
            labels.append((index, label))
        only = {label for _, label in labels}
        if len(labels) > 1 and len(only) == 1:
            self.notices = [
                f"all {len(labels)} images are of class {only.pop()}; choose images of several "
                "classes to measure the accuracy on the data set"
            ]
        classes = getattr(self._data, "classes", None)  # a number or an array, in some data sets
        named = isinstance(classes, (list, tuple)) and all(isinstance(c, str) for c in classes)
        return {
            **({"classes": list(classes)} if named and classes else {}),
            "images": len(self.indices),
            "indices": _compact(self.indices),
            "labels": labels_fingerprint(labels),
            "pixels": pixels.hexdigest()[:16],
        }


def labels_fingerprint(pairs: Iterable[tuple[int, int]]) -> str:
    """Return a short hash of (index, label) pairs, whatever their order.

    Example:
        >>> labels_fingerprint([(1, 3), (0, 2)]) == labels_fingerprint([(0, 2), (1, 3)])
        True
    """
    return hashlib.sha256(repr(sorted(pairs)).encode()).hexdigest()[:16]


def index_range(compact: Any) -> Sequence[int]:
    """Return the indices that a header holds: a "start:stop:step", or a list of them.

    Example:
        >>> list(index_range("0:10:4")), index_range([3, 1])
        ([0, 4, 8], [3, 1])
    """
    return range(*map(int, compact.split(":"))) if isinstance(compact, str) else list(compact)


def _compact(indices: Sequence[int]) -> Any:
    step = indices[1] - indices[0] if len(indices) > 1 else 1
    if indices and step > 0:
        whole = range(indices[0], indices[-1] + 1, step)
        if list(whole) == list(indices):
            return f"{whole.start}:{whole.stop}:{whole.step}"
    return list(indices)


def _own(x: Any) -> torch.Tensor:
    """Return a copy: nothing may write into the data set, and its arrays may be read-only."""
    if not isinstance(x, (torch.Tensor, np.ndarray)):
        raise InputError(
            f"the image is a {type(x).__name__}; give a float tensor in [0, 1], for example by "
            "torchvision.transforms.ToTensor()"
        )
    return x.detach().clone() if isinstance(x, torch.Tensor) else torch.from_numpy(x.copy())


def _kind(entry: Any) -> str:
    return f"{len(entry)} values" if isinstance(entry, (tuple, list)) else type(entry).__name__
