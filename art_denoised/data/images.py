"""Data sets by name, each a sequence of (image, label), and the images that a run chooses."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from art_denoised import checks
from art_denoised.checks import InputError, one_line
from art_denoised.data.files import ImageFolder, Transform, read_npz
from art_denoised.types import Image, Images, Labels


class ImageData(Protocol):
    """A sequence of pairs: a float tensor (channels, height, width) in [0, 1], and its class."""

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def __getitem__(self, index: int, /) -> tuple[Any, Any]:
        """Return (image, label)."""
        ...


def load_data(
    spec: str,
    *,
    train: bool = False,
    classes: Sequence[str] | None = None,
    transform: Transform | None = None,
) -> ImageData:
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
        transform: Function from PIL image to PIL image for the photographs of a folder or of
            torchvision, such as a classifier's `EvalTransform`.

    Raises:
        InputError: The specification or what it points to cannot be used.

    Example:
        >>> image, label = load_data("digits")[0]
        >>> tuple(image.shape), int(label)
        ((1, 8, 8), 2)
    """
    train = checks.flag("train", train)
    if not isinstance(spec, str):
        raise InputError(f"data is a {type(spec).__name__}; give digits or KIND:PLACE")
    kind, _, rest = spec.partition(":")
    if classes is not None and kind != "imagefolder":
        raise InputError(f"data is {spec!r}, whose labels are numbers; leave classes out")
    if transform is not None and kind not in ("imagefolder", "torchvision"):
        raise InputError(f"data is {spec!r}, which holds arrays; leave resizing and cropping out")
    if spec == "digits":
        return digits(train=train)
    if kind == "npz" and rest:
        return _Pairs(*read_npz(Path(rest)))
    if kind == "imagefolder" and rest:
        return ImageFolder(_existing(Path(rest)), classes, transform)
    name, _, folder = rest.partition(":")
    if kind == "torchvision" and name and folder:
        return _torchvision(name, Path(folder), train, transform)
    raise InputError(
        f"data is {spec!r}; give digits, imagefolder:DIR, npz:FILE or torchvision:NAME:DIR"
    )


def digits(*, train: bool) -> ImageData:
    """Return scikit-learn's 8x8 handwritten digits, 1,297 for training or 500 held out.

    Example:
        >>> len(digits(train=True)), len(digits(train=False))
        (1297, 500)
    """
    train = checks.flag("train", train)
    x, y = _digits()
    order = np.random.RandomState(0).permutation(len(x))  # numpy keeps this stream for ever
    order = order[500:] if train else order[:500]
    images = torch.from_numpy(x[order].reshape(-1, 1, 8, 8) / 16).float()
    return _Pairs(images, torch.from_numpy(y[order]))


@cache  # scikit-learn reads them from text, which takes longer than all that we do with them
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Return all 1,797 digits, as rows of 64 grey values from 0 to 16, and their classes."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return x, y


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


class Shard(Sequence[int]):
    """One of several equal parts of the images of a run, for a machine of its own.

    It is given to `certify`, `predict` or `evaluate` as ``indices``. The log then names all images
    of the run and the part, and `merge` joins the parts. No row depends on the division: the
    noise of an image depends on its index alone.

    Args:
        whole: Indices of all images of the run.
        part: Number of this part, from 1.
        parts: Number of parts. With more of them than images some are empty.
        block: Number of neighbouring images that stay together. `evaluate` takes its batches, whose
            images are attacked together.

    Raises:
        InputError: There is no such part.

    Example:
        >>> list(Shard(range(10), 2, 4)), list(Shard(range(10), 2, 4, block=2))
        ([1, 5, 9], [2, 3])
    """

    def __init__(self, whole: Sequence[int], part: int, parts: int, block: int = 1) -> None:
        self.whole = whole
        self.parts = checks.count("the number of shards", parts)
        self.part = checks.count("shard", part)
        if self.part > self.parts:
            raise InputError(f"shard is {part}/{parts}; give 1/{parts} to {parts}/{parts}")
        mine, step = (self.part - 1) * block, self.parts * block
        starts = range(mine, len(whole), step)
        self._indices = [i for start in starts for i in whole[start : start + block]]

    @property
    def name(self) -> str:
        """The part and the number of parts, such as "2/4"."""
        return f"{self.part}/{self.parts}"

    def in_blocks(self, block: int) -> Shard:
        """Return this part of the same images, where neighbours stay together."""
        return Shard(self.whole, self.part, self.parts, block)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, place: Any) -> Any:
        return self._indices[place]


class Chosen:
    """The images of a run: chosen by index, and checked where they enter.

    Attributes:
        indices: The indices, as ints; by default all.
        whole: The indices of all shards; the same if there are none.
        classes: Number of classes that labels are checked for, once it is known.
        shape: (channels, height, width) of the images, once one was read; all must have it.
        shard: Which part of the whole run this is; None: it is the whole.
        notices: What the user should know of the choice, once `settings` has read all images.
    """

    def __init__(
        self, data: ImageData, indices: Sequence[int] | None = None, classes: int | None = None
    ) -> None:
        if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
            raise InputError(
                f"data is a {type(data).__name__}; give a sequence of pairs (image, class), such "
                "as a Dataset of torch, not its DataLoader"
            )
        self._data = data
        self._seen: dict[int, tuple[bytes, int]] = {}  # hash of the image and label
        self.shape: tuple[int, ...] | None = None
        self.indices = checks.indices(range(len(data)) if indices is None else indices, len(data))
        self.shard = indices if isinstance(indices, Shard) and indices.parts > 1 else None
        self.whole = self.indices
        if self.shard is not None:
            self.whole = checks.indices(self.shard.whole, len(data))
        self.classes = classes
        self.notices: list[str] = []

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[tuple[int, Image, int]]:
        """Yield (index, image, label)."""
        for index in self.indices:
            yield (index, *self[index])

    def __getitem__(self, index: int) -> tuple[Image, int]:
        """Return image and label of one index, or raise an InputError that names the image."""
        entry = self._data[index]
        try:
            if not isinstance(entry, (tuple, list)) or len(entry) != 2:
                several = isinstance(entry, (tuple, list))
                kind = f"{len(entry)} values" if several else type(entry).__name__
                raise InputError(f"the data give {kind}; give pairs of an image and its class")
            x = checks.images(_batched(entry[0]), shape=self.shape)[0].float()
            x = x.clone()  # nothing may write into the data set
            label = int(checks.labels([entry[1]], self.classes)[0])
            found = hashlib.blake2b(x.cpu().numpy().tobytes(), digest_size=8).digest()
            if self._seen.setdefault(index, (found, label)) != (found, label):
                raise InputError(
                    "a second reading gave another image or label; give data without random "
                    "transforms"
                )
        except InputError as error:
            raise InputError(f"image {index}: {error}") from None
        self.shape = tuple(x.shape)
        return x, label

    def stack(self, indices: Sequence[int]) -> tuple[Images, Labels]:
        """Return the images of some indices as a batch, and their labels."""
        pairs = [self[index] for index in indices]
        return torch.stack([x for x, _ in pairs]), torch.tensor([label for _, label in pairs])

    def settings(self, watch: Callable[[Iterable[Any]], Iterable[Any]] = iter) -> dict[str, Any]:
        """Return what tells these images from any others; a shard reads those of all shards.

        ``watch`` wraps the iteration, for a progress bar.
        """
        whole = self
        if self.shard is not None:
            whole = Chosen(self._data, self.whole, self.classes)
            whole.shape, whole._seen = self.shape, self._seen
        pixels, labels = hashlib.sha256(), []
        for index, x, label in watch(whole):
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
            "images": len(self.whole),
            "indices": _compact(self.whole),
            "labels": labels_fingerprint(labels),
            "pixels": pixels.hexdigest()[:16],
            **({} if self.shard is None else {"shard": self.shard.name}),
        }


def labels_fingerprint(pairs: Iterable[tuple[int, int]]) -> str:
    """Return a short hash of (index, label) pairs, whatever their order."""
    return hashlib.sha256(repr(sorted(pairs)).encode()).hexdigest()[:16]


def index_range(compact: Any) -> Sequence[int]:
    """Return the indices that a header holds: a "start:stop:step", or a list of them."""
    return range(*map(int, compact.split(":"))) if isinstance(compact, str) else list(compact)


def _compact(indices: Sequence[int]) -> Any:
    step = indices[1] - indices[0] if len(indices) > 1 else 1
    if indices and step > 0:
        whole = range(indices[0], indices[-1] + 1, step)
        if list(whole) == list(indices):
            return f"{whole.start}:{whole.stop}:{whole.step}"
    return list(indices)


def _batched(x: Any) -> Any:
    """Return one image of a data set as a batch; `checks.images` reads arrays of any layout."""
    if not isinstance(x, (Tensor, np.ndarray)):
        raise InputError(
            f"the image is a {type(x).__name__}; give a float tensor in [0, 1], for example by "
            "torchvision.transforms.ToTensor()"
        )
    return x[None] if isinstance(x, np.ndarray) else checks.dense("the image", x).detach()[None]


@dataclass(frozen=True)
class _Pairs:
    images: Images
    labels: Labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image, int]:
        return self.images[index], int(self.labels[index])


def _torchvision(name: str, folder: Path, train: bool, transform: Transform | None) -> ImageData:
    try:
        from torchvision import datasets
        from torchvision.transforms import Compose, ToTensor
    except ImportError:
        raise InputError(
            "this data needs torchvision; install it with: pip install '.[vision]' in its clone"
        ) from None
    dataset: Any = getattr(datasets, name, None)
    parameters = inspect.signature(dataset).parameters if inspect.isclass(dataset) else {}
    # ImageNet's test part has no labels.
    split = "train" if train else "val" if name == "ImageNet" else "test"
    which: dict[str, Any] = {"train": train} if "train" in parameters else {"split": split}
    if "root" not in parameters or next(iter(which)) not in parameters:
        raise InputError(
            f"torchvision has no data set with parts named {name!r}; for example CIFAR10"
        )
    steps = [ToTensor()] if transform is None else [transform, ToTensor()]
    try:
        return dataset(root=_existing(folder), transform=Compose(steps), **which)
    except Exception as error:  # whatever the many readers of torchvision raise
        raise InputError(f"{name} cannot be read from {folder}: {one_line(error)}") from None


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise InputError(f"data folder {folder} does not exist; give an existing folder")
    return folder
