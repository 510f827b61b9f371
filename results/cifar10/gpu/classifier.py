"""Train a classifier of the copy of CIFAR-10 on one large card: a wide ResNet-32.

python results/cifar10/gpu/classifier.py [--minutes 8] [--count] [--tiny]
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import card
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from art_denoised import TrainingConfig
from art_denoised.training import EpochRow, Evaluation, train

sys.path.append(str(Path(__file__).parent.parent))
from networks import ResNet

EPOCHS = 80


def network(tiny: bool = False) -> nn.Module:
    """Return the untrained network."""
    torch.manual_seed(0)
    return ResNet(8) if tiny else ResNet(32, width=64)


def loss(network: nn.Module, x: Tensor, y: Tensor, step: int) -> Tensor:
    return F.cross_entropy(network(x), y, label_smoothing=0.1)


def print_cost() -> None:
    net, x, y = network(), torch.rand(1, 3, 32, 32), torch.zeros(1, dtype=torch.long)
    steps = {"training": card.flop(lambda: loss(net, x, y, 0).backward())}
    card.print_cost(net, {"forward": card.flop(lambda: net(x)), **steps}, {"training": EPOCHS})


def main() -> None:
    arguments = card.parser(__doc__, EPOCHS).parse_args()
    if arguments.count:
        print_cost()
        return
    given = card.chosen(arguments, "classifier")
    data = card.load(given)
    config = TrainingConfig(
        epochs=1, batch_size=16 if given.tiny else 512, optimizer="sgd", lr=0.4,
        weight_decay=5e-4, clip=1.0, schedule="one-cycle", average=0.998,
    )  # fmt: skip
    net = network(given.tiny).to(card.DEVICE)

    def short(few: Any, config: TrainingConfig) -> object:
        return train(copy.deepcopy(net), few, loss, config, progress=False)

    config = card.fitting(given, data, config, {short: 1.0})

    def measure(network: nn.Module, rows: Sequence[EpochRow]) -> dict[str, float]:
        return {"accuracy": card.accuracy(network, data["holdout"])}

    rows = train(
        net, data["train"], loss, config, evaluation=Evaluation(measure), run=given.out,
        progress=False,
    )  # fmt: skip
    card.write(given, net, rows, accuracy=card.accuracy(card.rounded(net), data["test"]))


if __name__ == "__main__":
    main()
