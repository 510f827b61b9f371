"""Data sets as the command line names them, each a sequence of (image, label)."""

from __future__ import annotations

import inspect
import lzma
import zipfile
import zlib
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.data.folders import ImageFolder

# What numpy and zipfile raise: torn, encrypted (RuntimeError), of an unknown compression
# (NotImplementedError), or with a header that claims more than there is memory.
_DAMAGED = (
    *(OSError, ValueError, EOFError, RuntimeError, NotImplementedError, MemoryError, SyntaxError),
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError),
)
SPECS = "digits, imagefolder:DIR, npz:FILE or torchvision:NAME:DIR"


class ImageData(Protocol):
    """A sequence of pairs: a float tensor (channels, height, width) in [0, 1], and its class."""

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def __getitem__(self, index: int, /) -> tuple[Any, Any]:
        """Return (image, label)."""
        ...


def load_data(spec: str, *, train: bool = False, classes: Sequence[str] | None = None) -> ImageData:
    """Open a data set.

    Args:
        spec: ``digits``, the 500 held-out images of scikit-learn's handwritten digits;
            ``imagefolder:DIR`` with one folder of images for each class (`ImageFolder`);
            ``npz:FILE`` with arrays ``x``, images in [0, 1] or 8-bit integers, channels first or
            last, and ``y`` (class indices);
            ``torchvision:NAME:DIR``, the test part of a data set already in DIR, of ImageNet the
            validation part.
        train: Take the training part where the data set has one: the 1,297 other images of
            ``digits``, and the training part of torchvision's. Folders and files are taken whole.
        classes: Names of the folders of an image folder, in the order of the labels.

    Raises:
        InputError: The specification or what it points to cannot be used.

    Example:
        >>> image, label = load_data("digits")[0]
        >>> tuple(image.shape), int(label)
        ((1, 8, 8), 2)
    """
    kind, _, rest = spec.partition(":")
    if classes is not None and kind != "imagefolder":
        raise InputError(f"data is {spec!r}, whose labels are numbers; leave classes out")
    if spec == "digits":
        return digits(train=train)
    if kind == "npz" and rest:
        return _npz(Path(rest))
    if kind == "imagefolder" and rest:
        return ImageFolder(_existing(Path(rest)), classes)
    name, _, folder = rest.partition(":")
    if kind == "torchvision" and name and folder:
        return _torchvision(name, Path(folder), train)
    raise InputError(f"data is {spec!r}; give {SPECS}")


def digits(*, train: bool) -> ImageData:
    """Return scikit-learn's 8x8 handwritten digits, 1,297 for training or 500 held out.

    Example:
        >>> len(digits(train=True)), len(digits(train=False))
        (1297, 500)
    """
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(x))  # numpy keeps this stream for ever
    order = order[500:] if train else order[:500]
    images = torch.from_numpy(x[order].reshape(-1, 1, 8, 8) / 16).float()
    return _Pairs(images, torch.from_numpy(y[order]))


def select(data: Sized, skip: int = 1, limit: int | None = None) -> Sequence[int]:
    """Return the indices of every ``skip``-th image, or a random sample of them.

    The sample is the same in every run and in ascending order. A smaller sample is part of a larger
    one. It holds all classes also where the images are sorted by class.

    Args:
        data: Data set.
        skip: Distance of the images.
        limit: Number of images at most; None: no limit.

    Raises:
        InputError: ``skip`` or ``limit`` is below 1.

    Example:
        >>> list(select(range(10), skip=4)), select(range(10), limit=3)
        ([0, 4, 8], [2, 4, 8])
    """
    indices = range(0, len(data), checks.count("skip", skip))
    if limit is None or len(indices) <= checks.count("max", limit):
        return indices
    order = np.random.RandomState(0).permutation(len(indices))  # numpy keeps this stream for ever
    return [indices[place] for place in sorted(order[:limit])]


class _Pairs:
    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index], int(self.labels[index])


def _npz(path: Path) -> ImageData:
    if not path.is_file():
        raise InputError(f"data file {path} does not exist; give an .npz file")
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise InputError(f"{path} holds a single array (.npy); give an .npz with x and y")
        with loaded as arrays:
            if not {"x", "y"} <= set(arrays):
                raise InputError(
                    f"{path} holds arrays {sorted(arrays)}; it must hold x (images) and y (labels)"
                )
            x, y = arrays["x"], arrays["y"]
    except InputError:
        raise
    except _DAMAGED as error:
        raise InputError(f"{path} cannot be read as .npz without pickle: {error}") from None
    images, labels = checks.images(_plain(x)).float(), checks.labels(_native(y))
    if len(images) != len(labels):
        raise InputError(f"{path} holds {len(images)} images but {len(labels)} labels")
    return _Pairs(images, labels)


def _plain(x: np.ndarray) -> np.ndarray:
    """Return images as floats with channels first, where it is clear what they are."""
    if x.dtype == np.uint8:
        x = x.astype(np.float32) / 255
    if x.ndim == 4 and x.shape[3] in (1, 3) and x.shape[1] not in (1, 3):
        x = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    return _native(x)


def _native(array: np.ndarray) -> np.ndarray:
    """Return an array in the byte order of this machine, the only one that torch takes."""
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _torchvision(name: str, folder: Path, train: bool) -> ImageData:
    datasets, to_tensor = _import_torchvision()
    dataset: Any = getattr(datasets, name, None)
    parameters = inspect.signature(dataset).parameters if inspect.isclass(dataset) else {}
    # ImageNet's test part has no labels.
    split = "train" if train else "val" if name == "ImageNet" else "test"
    which: dict[str, Any] = {"train": train} if "train" in parameters else {"split": split}
    if "root" not in parameters or next(iter(which)) not in parameters:
        raise InputError(
            f"torchvision has no data set with parts named {name!r}; for example CIFAR10"
        )
    try:
        return dataset(root=_existing(folder), transform=to_tensor, **which)
    except Exception as error:  # whatever the many readers of torchvision raise
        raise InputError(f"{name} cannot be read from {folder}: {_first_line(error)}") from None


def _import_torchvision() -> tuple[Any, Any]:
    try:
        from torchvision import datasets
        from torchvision.transforms import ToTensor
    except ImportError:
        raise InputError(
            "this data needs torchvision; install it with: pip install '.[vision]' in its clone"
        ) from None
    return datasets, ToTensor()


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise InputError(f"data folder {folder} does not exist; give an existing folder")
    return folder


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
