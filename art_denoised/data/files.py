"""Images in files: a folder for each class, or the arrays of an .npz."""

from __future__ import annotations

import lzma
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from art_denoised import checks
from art_denoised.checks import InputError, one_line
from art_denoised.types import Images, Labels

if TYPE_CHECKING:
    from PIL.Image import Image

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
        folders = [one for one in sorted(Path(folder).iterdir()) if one.is_dir()]
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

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
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


def _opened(path: Path) -> Image:
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(path)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, ValueError) as error:
        raise InputError(f"{path} cannot be read as an image: {one_line(error)}") from None
    if image.width * image.height > _MOST_PIXELS:
        raise InputError(f"{path} has {image.width} x {image.height} pixels; give a smaller image")
    return image


def _read(path: Path, grey: bool, transform: Transform | None) -> torch.Tensor:
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
