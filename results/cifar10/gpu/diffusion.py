"""Train a class-conditional EDM model of 20 M parameters on one large card.

    python results/cifar10/gpu/diffusion.py [--minutes 8] [--count] [--tiny]

Afterwards the accuracy of the diffusion classifier (16 levels) on 500 test images is measured.
"""

from __future__ import annotations

import copy
from typing import Any

import card
import torch
from torch.utils.data import TensorDataset

from art_denoised import (
    DiffusionClassifier,
    DiffusionModel,
    EDMLoss,
    TrainingConfig,
    noise_levels,
    train_diffusion,
)
from art_denoised.diffusion import unet_diffusion

EPOCHS = 60
P_MEAN, P_STD = 0.0, 0.8  # of the levels of the classifier: results/cifar10/diffusion.py


def network(tiny: bool = False) -> DiffusionModel:
    """Return the untrained model."""
    torch.manual_seed(0)
    return unet_diffusion(3, 32, classes=10, widths=(8, 16) if tiny else (64, 128, 256, 320))


def print_cost() -> None:
    net, x, y = network(), torch.rand(1, 3, 32, 32), torch.zeros(1, dtype=torch.long)
    steps = {"training": card.flop(lambda: EDMLoss(p_mean=P_MEAN)(net, x, y, 0).backward())}
    forward = card.flop(lambda: net(x, 0.25, y))
    card.print_cost(net, {"forward": forward, **steps}, {"training": EPOCHS})


def main() -> None:
    arguments = card.parser(__doc__, EPOCHS).parse_args()
    if arguments.count:
        print_cost()
        return
    given = card.chosen(arguments, "diffusion")
    data = card.load(given)
    net, loss = network(given.tiny).to(card.DEVICE), EDMLoss(p_mean=P_MEAN)
    config = TrainingConfig(
        epochs=1, batch_size=16 if given.tiny else 256, lr=1e-3, weight_decay=0.0, average=0.9995
    )

    def short(few: Any, config: TrainingConfig) -> object:
        return train_diffusion(copy.deepcopy(net), few, loss, config, progress=False)

    config = card.fitting(given, data, config, {short: 1.0})
    rows = train_diffusion(net, data["train"], loss, config, run=given.out, progress=False)
    levels = noise_levels(1 if given.tiny else 16, p_mean=P_MEAN, p_std=P_STD)
    model = card.rounded(net)
    as_classifier = DiffusionClassifier(
        model, levels=levels, seed=0, bf16=card.DEVICE.type == "cuda"
    )
    few = TensorDataset(*(t[: 4 if given.tiny else 500] for t in data["test"].tensors))
    card.write(given, net, rows, accuracy=card.accuracy(as_classifier, few), images=len(few))


if __name__ == "__main__":
    main()
