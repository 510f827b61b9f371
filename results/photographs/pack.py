"""Pack the images that the denoiser of these results is trained on, and those it is validated on.

No image of the table is among them: these are crops of seven other photographs of scikit-image, of
scikit-learn's two and matplotlib's one, and images of CIFAR-10 enlarged. The validation images are
the 20 of ImageNet that ship in the foolbox wheel.
"""

from __future__ import annotations

import argparse
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cifar10", type=Path, help="folder of CIFAR-10's training images by class")
    parser.add_argument("--out", type=Path, default=Path("data"))
    options = parser.parse_args()
    options.out.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    small = rng.permutation(sorted(options.cifar10.glob("*/*.*")))
    photographs = [
        Image.open(str(resources.files(package) / file)).convert("RGB")
        for package, files in PHOTOGRAPHS.items()
        for file in files
    ]
    for side, count in ((64, 6000), (112, 3000)):
        x = [_enlarged(path, side, rng) for path in small[: count // 2]]
        x += [
            _crop(photographs[i % len(photographs)], side, rng) for i in range(count - count // 2)
        ]
        x = x if side == 64 else x[::12]  # a step through the classifier is dear
        save(options.out / f"train-{side}.npz", x, [0] * len(x))
    held = sorted((resources.files("foolbox") / "data").glob("imagenet_*.jpg"))
    labels = [int(path.stem.split("_")[2]) for path in held]
    save(options.out / "validation.npz", [_central(Image.open(path)) for path in held], labels)


def save(path: Path, x: list[np.ndarray], y: list[int]) -> None:
    """Write images of 8 bits, channels first, and their labels."""
    np.savez(path, x=np.stack(x).transpose(0, 3, 1, 2), y=np.array(y))


def _enlarged(path: Path, side: int, rng: np.random.Generator) -> np.ndarray:
    """Return an image of 32x32 pixels, enlarged 2 to 3.5 times, or a crop of it."""
    size = max(side, int(rng.integers(64, 113)))
    return _window(Image.open(path).convert("RGB").resize((size, size), 3), side, rng)


def _crop(photograph: Image.Image, side: int, rng: np.random.Generator) -> np.ndarray:
    """Return a crop of a photograph whose shorter side has been reduced to 160 to 400 pixels."""
    width, height = photograph.size
    scale = rng.integers(160, 401) / min(width, height)
    size = (round(scale * width), round(scale * height))
    return _window(photograph.resize(size, 3, reducing_gap=2.0), side, rng)


def _central(image: Image.Image, side: int = 224) -> np.ndarray:
    return np.array(ImageOps.fit(image.convert("RGB"), (side, side), 3))


def _window(image: Image.Image, side: int, rng: np.random.Generator) -> np.ndarray:
    left, top = (int(rng.integers(0, length - side + 1)) for length in image.size)
    return np.array(image.crop((left, top, left + side, top + side)))


if __name__ == "__main__":
    main()
