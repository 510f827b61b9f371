"""Measure the diffusion classifier on 1,000 test images, by number of levels.

python results/mnist/accuracy.py [LEVELS ...] > results/mnist/accuracy.txt
"""

from __future__ import annotations

import sys

import torch
from defences import P_MEAN, P_STD, diffusion_classifier
from networks import held_out

from art_denoised.smoothing import proportion_interval


def main() -> None:
    torch.set_num_threads(1)
    x, y = held_out(10)
    print(f"{len(y)} test images, every tenth; p_mean {P_MEAN}, p_std {P_STD}, seed 0\n")
    for levels in map(int, sys.argv[1:] or ("32", "16", "8")):
        classifier = diffusion_classifier(levels=levels)
        with torch.no_grad():
            hits = int((classifier(x).argmax(1) == y).sum())
        low, high = proportion_interval(hits, len(y))
        print(f"{levels:3} levels  {hits / len(y):.1%} ({low:.1%}-{high:.1%})", flush=True)


if __name__ == "__main__":
    main()
