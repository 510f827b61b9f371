"""Time PGD and adversarial training beside plain loops, torchattacks and ART.

    python benchmarks/adversarial.py [--threads 1] [--rounds 5] [--json FILE] [--tiny]

A ResNet-8 for 32x32 images with random weights. In each round every contestant runs once; the
figure is the median of the ratios to the plain loop of the same round. With one thread, processor
time is measured, which other programs disturb less. The plain loops are the usual ones: an attack
in eval mode, a step in training mode, channels_last, a DataLoader, SGD with momentum.
"""

from __future__ import annotations

import logging
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from record import Record, options, ratio, turns
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from art_denoised import PGD, TrainingConfig, train_robust
from art_denoised.training import RECIPES

EPS = 8 / 255


class Block(nn.Module):
    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        self.short = nn.Conv2d(into, out, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.short(x))


def resnet8() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1), Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    return net.to(memory_format=torch.channels_last)


def plain_pgd(
    net: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int, size: float
) -> torch.Tensor:
    x_adv = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1)
    for _ in range(steps):
        x_adv.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(net(x_adv), y), x_adv)
        x_adv = x_adv.detach() + size * gradient.sign()
        x_adv = torch.min(torch.max(x_adv, x - EPS), x + EPS).clamp(0, 1)
    return x_adv


def plain_training(data: TensorDataset, batch: int, steps: int, size: float) -> None:
    net = resnet8()
    optimizer = torch.optim.SGD(
        net.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    for x, y in DataLoader(data, batch_size=batch, shuffle=True, drop_last=True):
        x = x.contiguous(memory_format=torch.channels_last)
        net.eval()
        x_adv = plain_pgd(net, x, y, steps, size * EPS)
        net.train()
        loss = F.cross_entropy(net(x_adv), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def our_training(data: TensorDataset, batch: int, steps: int, size: float, average: float) -> None:
    config = TrainingConfig(
        epochs=1, batch_size=batch, optimizer="sgd", lr=0.1, weight_decay=5e-4, clip=0.0,
        schedule="constant", average=average, augment="none", bf16=False,
    )  # fmt: skip
    recipe = replace(RECIPES["pgd"], eps=EPS, steps=steps, relative_step_size=size)
    train_robust(resnet8(), data, recipe, config, progress=False)


def art_training(data: TensorDataset, batch: int, steps: int, size: float) -> None:
    from art.defences.trainer import AdversarialTrainerMadryPGD

    x, y = (tensor.numpy() for tensor in data.tensors)
    trainer = AdversarialTrainerMadryPGD(
        art_classifier(resnet8()), nb_epochs=1, batch_size=batch, eps=EPS, eps_step=size * EPS,
        max_iter=steps,
    )  # fmt: skip
    trainer.attack.set_params(verbose=False)
    trainer.fit(x, np.eye(10, dtype=np.float32)[y])


def art_classifier(net: nn.Module) -> object:
    from art.estimators.classification import PyTorchClassifier

    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    return PyTorchClassifier(
        net, nn.CrossEntropyLoss(), (3, 32, 32), 10, optimizer, clip_values=(0, 1),
        device_type="cpu",
    )  # fmt: skip


def attacks(steps: int, images: int) -> dict[str, Callable[[], object]]:
    import torchattacks
    from art.attacks.evasion import ProjectedGradientDescent

    net, size = resnet8().eval(), EPS / 4
    x = torch.rand(images, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    y = torch.arange(images) % 10
    theirs = torchattacks.PGD(net, eps=EPS, alpha=size, steps=steps)
    arts = ProjectedGradientDescent(
        art_classifier(net), eps=EPS, eps_step=size, max_iter=steps, num_random_init=1,
        batch_size=images, verbose=False,
    )  # fmt: skip
    ours = PGD(EPS, steps=steps, step_size=size)
    return {
        "plain loop": lambda: plain_pgd(net, x, y, steps, size),
        "ours": lambda: ours(net, x, y),
        "torchattacks": lambda: theirs(x, y),
        "ART": lambda: arts.generate(x.numpy(), y.numpy()),
    }


def trainings(steps: int, size: float, images: int, batch: int) -> dict[str, Callable[[], object]]:
    data = TensorDataset(torch.rand(images, 3, 32, 32), torch.arange(images) % 10)
    return {
        "plain loop": lambda: plain_training(data, batch, steps, size),
        "ours": lambda: our_training(data, batch, steps, size, 0.0),
        "ours, averaged weights": lambda: our_training(data, batch, steps, size, 0.995),
        "ART": lambda: art_training(data, batch, steps, size),
    }


def compare(
    record: Record, title: str, tasks: dict[str, Callable[[], object]], rounds: int
) -> None:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times = turns(tasks, rounds, clock)
    for name, taken in times.items():
        median = statistics.median(taken)
        record.add(title, name, median_s=median, **ratio(taken, times["plain loop"]))


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    images, batch, rounds = (2, 2, 1) if arguments.tiny else (32, 48, arguments.rounds)
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    record = Record("adversarial", arguments.json, "adversarial-robustness-toolbox", "torchattacks")
    for steps in (2,) if arguments.tiny else (10, 50):
        compare(record, f"PGD-{steps}, {images} images", attacks(steps, images), rounds)
    for title, steps, size, updates in (
        ("PGD-7 training", 7, 0.25, 5),
        ("single-step training", 1, 1.0, 10),
    ):
        updates = 1 if arguments.tiny else updates
        tasks = trainings(steps, size, updates * batch, batch)
        compare(record, f"{title}, {updates} steps of {batch}", tasks, rounds)


if __name__ == "__main__":
    main()
