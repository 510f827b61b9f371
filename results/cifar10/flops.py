"""Print the FLOP of one image through the networks of these results; a multiply-add counts twice.

cd results/cifar10; python flops.py
"""

from __future__ import annotations

import torch
from networks import classifier, unet
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from art_denoised import DnCNN


def main() -> None:
    x, sigma = torch.zeros(1, 3, 32, 32), torch.full((1,), 0.25)
    denoisers: dict[str, nn.Module] = {"U-Net": unet(), "DnCNN 7 x 24": DnCNN(3, 7, 24)}
    for name, network in {**denoisers, "classifier": classifier()}.items():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network.eval()(x, sigma) if name in denoisers else network(x)
        print(f"{name:14}{counter.get_total_flops() / 1e9:.3f} GFLOP")


if __name__ == "__main__":
    main()
