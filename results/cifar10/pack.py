"""Pack the folders of images into npz files, in a random order, so that they are decoded once.

    python results/cifar10/pack.py

Writes data/train.npz (all training images), data/test.npz (9,000 test images), data/attacked.npz
(the first 1,000 of these, on which attacks run) and data/holdout.npz (the other 1,000 test images,
the validation set of trainings).
"""

from __future__ import annotations

import numpy as np
from networks import HERE
from train_classifier import load


def main() -> None:
    for split, parts in {
        "train": {"train": slice(None)},
        "test": {
            "test": slice(9000),
            "attacked": slice(1000),
            "holdout": slice(9000, None),
        },
    }.items():
        images, labels = load(HERE / "data" / split)
        order = np.random.default_rng(0).permutation(len(labels))
        for name, part in parts.items():
            x = images.numpy()[order[part]].astype(np.float32) / 255
            np.savez(HERE / "data" / f"{name}.npz", x=x, y=labels.numpy()[order[part]])


if __name__ == "__main__":
    main()
