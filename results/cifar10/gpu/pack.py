"""Pack the JPEG files of the copy of CIFAR-10 into one npz of bytes, to be decoded on the device.

    python results/cifar10/gpu/pack.py [DATA] [--out FILE.npz]

DATA holds {train,test}/{airplane..truck}/*.jpg; results/cifar10/data by default. For "train" and
"test" the file holds the bytes of all images (uint8) one after another, where each ends, and the
labels, in the random order of results/cifar10/pack.py: the first 9,000 test images are its test
set, the others its holdout. Decoded, the images would take 184 MB.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parent.parent))
from networks import CLASSES, HERE


def packed(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return bytes, ends and labels of one split."""
    files = [(f, y) for y, name in enumerate(CLASSES) for f in sorted((folder / name).iterdir())]
    order = np.random.default_rng(0).permutation(len(files))
    chosen = [np.frombuffer(files[i][0].read_bytes(), np.uint8) for i in order]
    ends = np.cumsum([len(file) for file in chosen])
    return np.concatenate(chosen), ends, np.array([files[i][1] for i in order], np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, nargs="?", default=HERE / "data")
    parser.add_argument("--out", type=Path, default=HERE / "data" / "jpeg.npz")
    given = parser.parse_args()
    parts = {}
    for split in ("train", "test"):
        names = (f"{split}_jpeg", f"{split}_ends", f"{split}_labels")
        parts |= dict(zip(names, packed(given.data / split), strict=True))
    np.savez_compressed(given.out, **parts)
    print(f"{given.out}: {given.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
