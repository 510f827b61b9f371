"""Train a small CIFAR-10 (JPEG copy) classifier on clean images; resuming is exact.

    python results/cifar10/train_classifier.py DATA [--network resnet20] [--epochs 30] [--seed 0]

DATA holds {train,test}/{airplane..truck}/*.jpg. SGD with momentum 0.9, a one-cycle schedule, crops
and flips. One thread, so that a seed gives the same weights. Each epoch writes a checkpoint beside
the weights, from which the same command continues. An epoch of ResNet-20 is about 12 TFLOP.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from networks import ARCHITECTURES, CLASSES, HERE
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F


def load(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Read all images of one split: uint8 (n, 3, 32, 32) and labels."""
    files = [
        (path, y) for y, name in enumerate(CLASSES) for path in sorted((folder / name).iterdir())
    ]
    pixels = np.stack([np.asarray(Image.open(path)) for path, _ in files])
    labels = torch.tensor([y for _, y in files])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), labels


def augment(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Crop from a border of 4 reflected pixels, and flip, independently for each image."""
    n, _, height, width = x.shape
    padded = F.pad(x, (4, 4, 4, 4), mode="reflect")
    top, left = torch.randint(0, 9, (2, n), generator=generator)
    rows = (top[:, None] + torch.arange(height))[:, None, :, None]
    columns = left[:, None] + torch.arange(width)
    flip = torch.rand(n, generator=generator) < 0.5
    columns = torch.where(flip[:, None], columns.flip(1), columns)[:, None, None, :]
    item, channel = torch.arange(n)[:, None, None, None], torch.arange(3)[None, :, None, None]
    return padded[item, channel, rows, columns]


@torch.inference_mode()
def accuracy(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    network.eval()
    hits = 0
    for x, y in zip(images.split(256), labels.split(256), strict=True):
        hits += int((network(x.float() / 255).argmax(1) == y).sum())
    return hits / len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--network", choices=list(ARCHITECTURES), default="resnet20")
    parser.add_argument("--name", default="classifier", help="stem of the file names")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    images, labels = load(arguments.data / "train")
    test = load(arguments.data / "test")
    network = ARCHITECTURES[arguments.network]().to(memory_format=torch.channels_last)
    steps = len(images) // arguments.batch
    optimizer = torch.optim.SGD(
        network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, arguments.lr, epochs=arguments.epochs, steps_per_epoch=steps, pct_start=0.2
    )
    saved = arguments.out / f"{arguments.name}.checkpoint.pt"
    parts = {"network": network, "optimizer": optimizer, "schedule": schedule}
    first = 0
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        first = state.pop("epoch")
        for name, part in parts.items():
            part.load_state_dict(state[name])
    for epoch in range(first, arguments.epochs):
        start, total = time.perf_counter(), 0.0
        generator = torch.Generator().manual_seed(arguments.seed * 1000 + epoch)
        order = torch.randperm(len(images), generator=generator)
        network.train()
        for chosen in order[: steps * arguments.batch].split(arguments.batch):
            x = augment(images[chosen].float() / 255, generator)
            x = x.contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(network(x), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        row = {
            "epoch": epoch + 1,
            "loss": round(total / steps, 4),
            "test_accuracy": accuracy(network, *test),
            "seconds": round(time.perf_counter() - start, 1),
        }
        with (arguments.out / f"{arguments.name}.log.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")
        print(row, flush=True)
        state = {name: part.state_dict() for name, part in parts.items()}
        torch.save({"epoch": epoch + 1, **state}, saved.with_suffix(".new"))
        saved.with_suffix(".new").replace(saved)
    weights = {name: value.contiguous() for name, value in network.state_dict().items()}
    save_file(weights, arguments.out / f"{arguments.name}.safetensors")


if __name__ == "__main__":
    main()
