"""Pack the images that the denoiser of these results is trained on, and those it is judged on.

No image of the table is among them: these are crops of fifteen other photographs of scikit-image,
scikit-learn, matplotlib and the wheels of gradio and imgaug, and images of CIFAR-10 enlarged. The
validation images are the 20 of ImageNet that ship in the foolbox wheel.
"""

from __future__ import annotations

import argparse
import io
import zipfile
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

PHOTOGRAPHS = {
    "skimage": [
        *("data/astronaut.png", "data/retina.jpg", "data/ihc.png", "data/hubble_deep_field.jpg"),
        *("data/brick.png", "data/grass.png", "data/gravel.png"),
    ],
    "sklearn": ["datasets/images/china.jpg", "datasets/images/flower.jpg"],
    "matplotlib": ["mpl-data/sample_data/grace_hopper.jpg"],
}
# Packages that need not be installed: their wheels are read.
WHEELS = {
    "gradio": [f"gradio/media_assets/images/{name}" for name in ("lion.jpg", "cheetah1.jpg")]
    + ["gradio/media_assets/images/tower.jpg", "gradio/test_data/cheetah2.jpg"],
    "imgaug": ["imgaug/quokka.jpg"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cifar10", type=Path, help="folder of CIFAR-10's training images by class")
    parser.add_argument("wheels", type=Path, help="folder of the wheels of gradio and imgaug")
    parser.add_argument("--out", type=Path, default=Path("data"))
    options = parser.parse_args()
    options.out.mkdir(exist_ok=True, parents=True)
    rng = np.random.default_rng(0)
    small = rng.permutation(sorted(options.cifar10.glob("*/*.*")))
    first, more = _installed(), _installed() + _in_wheels(options.wheels)
    # Little of an image shows what noise is; the classifier needs to see enough to name it.
    _pack(options.out / "train.npz", small[:3000], first, (64, 112), (160, 400), 64, rng)
    rng = np.random.default_rng(1)
    _pack(options.out / "stability.npz", small[-900:], more, (112, 144), (160, 320), 112, rng)
    held = sorted((resources.files("foolbox") / "data").glob("imagenet_*.jpg"))
    labels = [int(path.stem.split("_")[2]) for path in held]
    _save(options.out / "validation.npz", [_central(Image.open(path)) for path in held], labels)


def _installed() -> list[Image.Image]:
    return [
        Image.open(str(resources.files(package) / file)).convert("RGB")
        for package, files in PHOTOGRAPHS.items()
        for file in files
    ]


def _in_wheels(folder: Path) -> list[Image.Image]:
    found = []
    for package, files in WHEELS.items():
        (wheel,) = folder.glob(f"{package}-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            found += [Image.open(io.BytesIO(archive.read(f))).convert("RGB") for f in files]
    return found


def _pack(
    path: Path,
    small: np.ndarray,
    photographs: list[Image.Image],
    enlarged: tuple[int, int],
    reduced: tuple[int, int],
    side: int,
    rng: np.random.Generator,
) -> None:
    """Write crops: one of each small image, enlarged, and as many of photographs, reduced.

    ``enlarged`` and ``reduced`` are the least and the greatest length of the shorter side.
    """
    x = [_crop(Image.open(file).convert("RGB"), side, enlarged, rng) for file in small]
    x += [_crop(photographs[i % len(photographs)], side, reduced, rng) for i in range(len(small))]
    _save(path, x, len(x) * [0])  # no class is trained on


def _save(path: Path, x: list[np.ndarray], y: list[int]) -> None:
    """Write images of 8 bits, channels first, and their labels."""
    np.savez(path, x=np.stack(x).transpose(0, 3, 1, 2), y=np.array(y))


def _crop(
    image: Image.Image, side: int, shorter: tuple[int, int], rng: np.random.Generator
) -> np.ndarray:
    """Return a square of an image that has been resized, at random in both."""
    scale = rng.integers(shorter[0], shorter[1] + 1) / min(image.size)
    size = tuple(max(side, round(scale * length)) for length in image.size)
    image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
    left, top = (int(rng.integers(0, length - side + 1)) for length in size)
    return np.array(image.crop((left, top, left + side, top + side)))


def _central(image: Image.Image) -> np.ndarray:
    return np.array(ImageOps.fit(image.convert("RGB"), (224, 224), Image.Resampling.BICUBIC))


if __name__ == "__main__":
    main()
