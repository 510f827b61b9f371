"""Data sets as the command line names them, each a sequence of (image, label)."""

from __future__ import annotations

import hashlib
import inspect
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.types import Image

SPECS = "digits, imagefolder:DIR, npz:FILE or torchvision:NAME:DIR"


class ImageData(Protocol):
    """A sequence of pairs: a float tensor (channels, height, width) in [0, 1], and its class."""

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def __getitem__(self, index: int, /) -> tuple[Any, Any]:
        """Return (image, label)."""
        ...


def load_data(spec: str, *, train: bool = False) -> ImageData:
    """Open a data set.

    Args:
        spec: ``digits``, the 500 held-out images of scikit-learn's handwritten digits;
            ``imagefolder:DIR`` with one folder of images a class, of one channel if the
            first is grey and of three otherwise; ``npz:FILE`` with arrays ``x``
            (images, channels, height, width) in [0, 1] and ``y`` (class indices);
            ``torchvision:NAME:DIR``, the test part of a data set already in DIR, of ImageNet the
            validation part.
        train: Take the training part where the data set has one: of ``digits`` the 1,297 images
            that are not held out, and of torchvision's. Folders and files are taken whole.

    Raises:
        InputError: The specification or what it points to cannot be used.

    Example:
        >>> image, label = load_data("digits")[0]
        >>> tuple(image.shape), int(label)
        ((1, 8, 8), 2)
    """
    kind, _, rest = spec.partition(":")
    if spec == "digits":
        return digits(train=train)
    if kind == "npz" and rest:
        return _npz(Path(rest))
    if kind == "imagefolder" and rest:
        return _imagefolder(Path(rest))
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


def select(data: ImageData, skip: int = 1, limit: int | None = None) -> range:
    """Return the indices of every ``skip``-th image, at most ``limit`` of them.

    Example:
        >>> list(select(range(10), skip=4))
        [0, 4, 8]
    """
    indices = range(0, len(data), checks.count("skip", skip))
    return indices if limit is None else indices[: checks.count("max", limit)]


class Chosen:
    """The images of a run: chosen by index, and checked where they enter.

    Args:
        data: Pairs of an image (channels, height, width) in [0, 1] and its class.
        indices: Indices of the images; None: all.
        classes: Number of classes; None: not known yet.

    Attributes:
        indices: The indices, as ints.
        classes: Number of classes that labels are checked for, once it is known.

    Raises:
        InputError: An index that is not in the data, or is there twice.

    Example:
        >>> images = Chosen(load_data("digits"), [7, 9])
        >>> x, label = images[7]
        >>> tuple(x.shape), label, len(images)
        ((1, 8, 8), 2, 2)
    """

    def __init__(
        self, data: ImageData, indices: Sequence[int] | None = None, classes: int | None = None
    ) -> None:
        self._data, self._shape = data, None
        self.indices = checks.indices(range(len(data)) if indices is None else indices, len(data))
        self.classes = classes

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
            if not isinstance(entry[0], (torch.Tensor, np.ndarray)):
                raise InputError(
                    f"the image is a {type(entry[0]).__name__}; give a float tensor in [0, 1], for "
                    "example by transform=ToTensor()"
                )
            x = checks.images(entry[0][None], shape=self._shape)[0].float()
            label = int(checks.labels([entry[1]], self.classes)[0])
        except InputError as error:
            raise InputError(f"image {index}: {error}") from None
        self._shape = tuple(x.shape)
        return x, label

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
            pixels.update(x.contiguous().numpy().tobytes())
            labels.append((index, label))
        return {
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


def _kind(entry: Any) -> str:
    return f"{len(entry)} values" if isinstance(entry, (tuple, list)) else type(entry).__name__


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
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} cannot be read as .npz without pickle: {error}") from None
    images, labels = checks.images(_native(x)).float(), checks.labels(_native(y))
    if len(images) != len(labels):
        raise InputError(f"{path} holds {len(images)} images but {len(labels)} labels")
    return _Pairs(images, labels)


def _native(array: np.ndarray) -> np.ndarray:
    """Return an array in the byte order of this machine, the only one that torch takes."""
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _imagefolder(folder: Path) -> ImageData:
    datasets, to_tensor = _import_torchvision()
    try:
        dataset = datasets.ImageFolder(_existing(folder), transform=to_tensor)
    except FileNotFoundError as error:
        raise InputError(f"{folder} is not an image folder: {_first_line(error)}") from None
    if _is_grey(dataset.samples[0][0]):  # torchvision makes three equal channels of one
        dataset.loader = _load_grey
    return dataset


def _is_grey(path: str) -> bool:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.mode in ("1", "L")
    except (OSError, UnidentifiedImageError) as error:
        raise InputError(f"{path} cannot be read as an image: {_first_line(error)}") from None


def _load_grey(path: str) -> Any:
    from PIL import Image

    with Image.open(path) as image:
        if image.mode not in ("1", "L"):
            raise InputError(
                f"{path} has mode {image.mode}, but the first image of its folder is grey; give "
                "images of one kind"
            )
        return image.convert("L")


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
    except (RuntimeError, OSError, ValueError, TypeError) as error:
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
