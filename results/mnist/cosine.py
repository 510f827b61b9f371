"""Compare the exact gradient of RDC with BPDA's, by steps of likelihood maximization.

    python results/mnist/cosine.py > results/mnist/cosine.txt

The figure is the mean cosine between the gradients of cross-entropy, at the first images that
robustness.py attacks, before any attack.
"""

from __future__ import annotations

import sys

import torch
from defences import ETA, LR, rdc
from robustness import images
from torch.nn import functional as F


def gradient(how: str, steps: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    leaf = x.clone().requires_grad_()
    F.cross_entropy(rdc(gradient=how, steps=steps)(leaf), y, reduction="sum").backward()
    return leaf.grad.flatten(1)


def main() -> None:
    torch.set_num_threads(1)
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    x, y = (part[:count] for part in images())
    print(f"{count} test images, eta {ETA}, lr {LR}\n\nsteps N   cosine")
    for steps in range(1, 6):
        pair = (gradient(how, steps, x, y) for how in ("exact", "bpda"))
        print(f"{steps:7}   {float(F.cosine_similarity(*pair).mean()):.2f}", flush=True)


if __name__ == "__main__":
    main()
