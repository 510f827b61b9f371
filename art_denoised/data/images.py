"""Data sets: folders and files of images, the digits, and the images that a run chooses."""

from __future__ import annotations

import hashlib
import inspect
import lzma
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from art_denoised import checks
from art_denoised.checks import InputError, one_line
from art_denoised.types import Image, Images, Labels

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

Transform: TypeAlias = Callable[[Any], Any]  # of PIL images
_SUFFIXES = frozenset([".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"])
_GREY = ("1", "L", "LA", "I;16")
_COLOUR = ("RGB", "RGBA", "P", "PA", "CMYK", "YCbCr")
# What systems and NAS devices leave in folders beside hidden names, with thumbnails or what was
# deleted.
_OF_SYSTEMS = (
    *("__macosx", "__pycache__", "@eadir", "#recycle", "$recycle.bin", "lost+found"),
    "system volume information",
)
_PHOTOMETRIC = 262  # TIFF's tag, which Pillow heeds in 8 bits alone
_MOST_PIXELS = 10**8  # a larger one is a bomb, or no image that a classifier takes
# What numpy and zipfile raise: torn, encrypted (RuntimeError), of an unknown compression
# (NotImplementedError), or with a header that claims more than there is memory.
_DAMAGED = (
    *(OSError, ValueError, EOFError, RuntimeError, NotImplementedError, MemoryError, SyntaxError),
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError),
)


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


class ImageFolder:
    """Images in one folder for each class.

    Classes are the folders in alphabetical order, or as they are given. Hidden folders and files,
    and those of operating systems such as ``__MACOSX`` and ``@eaDir``, are ignored. Images have one
    channel if the first one is grey, else three. EXIF rotation is applied; palettes and CMYK become
    RGB; 16-bit grey keeps its 16 bits.

    Args:
        folder: Folder that holds the folders of the classes.
        classes: Names of the classes in the order of the labels; synonyms of a name follow it after
            commas, as in "cat, tabby". None: the names of the folders.
        transform: Function from PIL image to PIL image, such as a classifier's `EvalTransform`.

    Attributes:
        classes: Names of the classes, by label.

    Raises:
        InputError: There are no folders, one of them holds no image or is none of ``classes``.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Path(folder, "cat").mkdir()
        ...     Image.new("RGB", (8, 6), (255, 0, 0)).save(Path(folder, "cat", "1.png"))
        ...     data = ImageFolder(folder)
        ...     tuple(data[0][0].shape), data[0][1], data.classes
        ((3, 6, 8), 0, ('cat',))
    """

    def __init__(
        self,
        folder: Path | str,
        classes: Sequence[str] | None = None,
        transform: Transform | None = None,
    ) -> None:
        self._transform = transform
        if not (root := checks.path("folder", folder)).is_dir():
            raise InputError(f"{folder} is no folder; give one that holds a folder for each class")
        folders = [one for one in sorted(root.iterdir()) if one.is_dir()]
        folders = [one for one in folders if not _is_hidden(one.name)]
        if not folders:
            raise InputError(f"{folder} holds no folders; give one folder of images for each class")
        known = [one.name for one in folders]
        names = known if classes is None else [*checks.words("classes", classes)]
        labels = _labels(names)
        self.classes = tuple(name.split(",")[0].strip() for name in names)
        self._samples: list[tuple[Path, int]] = []
        for one in folders:
            if _folded(one.name) not in labels:
                raise InputError(
                    f"folder {one.name!r} is none of the classes {', '.join(self.classes)}; rename "
                    "it, or write it after the name of its class, with a comma between"
                )
            files = [f for f in sorted(one.rglob("*")) if f.suffix.lower() in _SUFFIXES]
            inside = [f for f in files if not any(map(_is_hidden, f.relative_to(one).parts))]
            files = [f for f in inside if f.is_file()]
            if not files:
                raise InputError(f"{one} holds no images; remove it or fill it")
            self._samples += [(file, labels[_folded(one.name)]) for file in files]
        with _opened(self._samples[0][0]) as first:
            self._grey = first.mode in _GREY

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return (image, label); the image is float32 in [0, 1], (channels, height, width).

        Raises:
            InputError: The file cannot be read as an image of this kind.
        """
        path, label = self._samples[index]
        return _read(path, self._grey, self._transform), label


def read_classes(path: Path | str) -> list[str]:
    r"""Read names of classes, one a line in the order of the labels; blank lines are ignored.

    Args:
        path: Text file in UTF-8. Synonyms of a name follow it after commas.

    Raises:
        InputError: The file cannot be read, or holds no name.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "classes.txt").write_text("cat, tabby\ndog\n")
        ...     read_classes(Path(folder, "classes.txt"))
        ['cat, tabby', 'dog']
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"classes {path} cannot be read ({one_line(error)})") from None
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise InputError(f"classes {path} holds no names; give one a line")
    return names


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.casefold() in _OF_SYSTEMS


def _folded(name: str) -> str:
    """Return a name without case, accents composed: file systems store them in two ways."""
    return unicodedata.normalize("NFC", name.casefold())


def _labels(names: Sequence[str]) -> dict[str, int]:
    labels: dict[str, int] = {}
    for label, name in enumerate(names):
        for word in name.split(","):
            if labels.setdefault(_folded(word.strip()), label) != label or not word.strip():
                raise InputError(f"class {word!r} is there twice or empty; give each name once")
    return labels


def _opened(path: Path) -> Picture:
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(path)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, ValueError) as error:
        raise InputError(f"{path} cannot be read as an image: {one_line(error)}") from None
    if image.width * image.height > _MOST_PIXELS:
        raise InputError(f"{path} has {image.width} x {image.height} pixels; give a smaller image")
    return image


def _read(path: Path, grey: bool, transform: Transform | None) -> Tensor:
    from PIL import Image as Pil
    from PIL import ImageOps

    with _opened(path) as image:
        if image.mode not in (_GREY if grey else (*_GREY, *_COLOUR)):
            kind = "grey" if grey else "8-bit or 16-bit"
            raise InputError(
                f"{path} has mode {image.mode}; give {kind} images, as the first one is"
            )
        if image.mode == "I;16" and getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0:
            raise InputError(f"{path} is a 16-bit TIFF in which 0 is white; save it inverted")
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO":  # cameras put a preview behind a JPEG
            raise InputError(f"{path} holds {frames} images; give one image a file")
        try:
            image = ImageOps.exif_transpose(image)
            may_be_transparent = "A" in image.mode or "transparency" in image.info
            if may_be_transparent and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
                # No classifier sees it: a transparent pixel has no colour.
                raise InputError(f"{path} has transparent pixels; put it on a background first")
            if image.mode == "I;16":
                image, white = Pil.fromarray(np.asarray(image, np.float32)), 65535
            else:
                image, white = image.convert("L" if grey else "RGB"), 255
            image = image if transform is None else transform(image)
            if not isinstance(image, Pil.Image):
                raise InputError(
                    f"the transform returned a {type(image).__name__}; give one from PIL image to "
                    "PIL image: ToTensor is done here, Normalize by the model"
                )
            pixels = np.asarray(image, np.float32) / white
        except InputError:
            raise
        except (OSError, SyntaxError, ValueError) as error:
            raise InputError(f"{path} cannot be read as an image: {one_line(error)}") from None
    pixels = pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1)
    channels = torch.from_numpy(np.ascontiguousarray(pixels))
    return channels if grey or len(channels) == 3 else channels.repeat(3, 1, 1)


def read_npz(path: Path) -> tuple[Images, Labels]:
    """Read images and labels, the arrays ``x`` and ``y`` of an .npz file."""
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
        raise InputError(
            f"{path} cannot be read as .npz without pickle: {one_line(error)}"
        ) from None
    if x.dtype == np.uint8 and x.size and x.max() <= 1:
        raise InputError(
            f"{path} holds x as uint8 with no value above 1, black as 8-bit images; give float32"
        )
    if x.dtype == np.uint8:
        x = x.astype(np.float32) / 255
    if x.ndim == 4 and x.shape[3] in (1, 3) and x.shape[1] not in (1, 3):  # channels last
        x = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    images, labels = checks.images(x).float(), checks.labels(y)
    if len(images) != len(labels):
        raise InputError(f"{path} holds {len(images)} images but {len(labels)} labels")
    return images, labels
