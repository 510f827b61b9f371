"""Train a U-Net denoiser by the hybrid objective on one large card, white box.

    python results/cifar10/gpu/denoiser.py --sigma 0.25 [--minutes 8] [--count] [--tiny]

The classifier is that of classifier.py, read from --classifier; ``--tiny`` takes an untrained one.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import card
import classifier
import torch
from torch import nn

from art_denoised import DenoisedClassifier, Objective, TrainingConfig, UNetDenoiser, train_denoiser

EPOCHS = 45  # of mse; 2/9 as many of stability follow


def network(tiny: bool = False) -> UNetDenoiser:
    """Return the untrained denoiser, most of whose weights are at low resolution."""
    torch.manual_seed(0)
    widths = (8, 16) if tiny else (64, 128, 256, 256)
    return UNetDenoiser.from_config(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * len(widths),
        up_block_types=("UpBlock2D",) * len(widths),
        norm_num_groups=8,
        add_attention=False,
    )


def print_cost() -> None:
    net, judge = network(), classifier.network().eval().requires_grad_(False)
    x, sigma = torch.rand(1, 3, 32, 32), torch.tensor([0.25])
    y = torch.zeros(1, dtype=torch.long)

    def step(name: str) -> float:
        _, loss, _ = Objective(name, 0.25, judge).parts(TrainingConfig())[0]
        return card.flop(lambda: loss(net(x, sigma), x, y, judge).backward())

    flop = {"forward": card.flop(lambda: net(x, sigma)), "mse": step("mse")}
    flop["stability"] = step("stability")
    card.print_cost(net, flop, {"mse": EPOCHS, "stability": round(2 / 9 * EPOCHS)})


def main() -> None:
    parser = card.parser(__doc__, EPOCHS)
    parser.add_argument("--sigma", type=float, default=0.25)
    parser.add_argument("--classifier", type=Path, default=Path(__file__).parent / "classifier")
    arguments = parser.parse_args()
    if arguments.count:
        print_cost()
        return
    sigma = arguments.sigma
    given = card.chosen(arguments, f"denoiser-{sigma:g}")
    data = card.load(given)
    judge = classifier.network(given.tiny).eval()
    if not given.tiny:
        judge = card.read(judge, arguments.classifier)
    objective = Objective("hybrid", sigma, judge.to(card.DEVICE))
    net = network(given.tiny).to(card.DEVICE)
    config = TrainingConfig(epochs=1, batch_size=16 if given.tiny else 256, lr=5e-4)

    def short(loss: str, few: Any, config: TrainingConfig) -> object:
        part = replace(objective, loss=loss)
        return train_denoiser(copy.deepcopy(net), few, part, config, progress=False)

    parts = {partial(short, "mse"): 1.0, partial(short, "stability"): 2 / 9}
    config = card.fitting(given, data, config, parts)
    rows = train_denoiser(
        net, data["train"], objective, config, validation=data["holdout"], run=given.out,
        progress=False,
    )  # fmt: skip
    card.rounded(net)
    figures = {"accuracy_under_noise": under_noise(net, judge, data, sigma)}
    card.write(given, net, rows, sigma=sigma, **figures)


def under_noise(net: nn.Module, judge: nn.Module, data: card.Data, sigma: float) -> float:
    """Return the accuracy behind the denoiser of test images with noise, one draw each."""
    behind = DenoisedClassifier(judge, net, sigma=sigma)
    generator = torch.Generator(card.DEVICE).manual_seed(0)

    def noisy(x: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(x.shape, generator=generator, device=x.device)
        return behind(x + sigma * noise)

    return card.accuracy(noisy, data["test"])


if __name__ == "__main__":
    main()
