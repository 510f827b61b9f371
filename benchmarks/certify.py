"""Time fixed-n certification beside ART's, a literal Cohen loop, and the bare forward pass.

    python benchmarks/certify.py [--images 4] [--n 1000] [--threads 2] [--repeats 3]

All run in this process, on the same model (a ResNet-20 for 32x32 images, random weights) with the
same n and thread count. The unit is the time of the bare forward pass over as many images at its
best batch size. Repeats are interleaved, and the best and the spread are given.
"""

from __future__ import annotations

import argparse
import platform
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version

import numpy as np
import torch
from scipy.stats import beta, norm
from torch import nn
from torch.nn import functional as F

from art_denoised import certify

SIGMA, ALPHA, N0 = 0.25, 0.001, 100
BATCHES = (16, 32, 64, 128, 256)


class Block(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outside), nn.BatchNorm2d(outside)
        self.stride, self.grow = stride, outside - inside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(
            y + F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.grow))
        )


def resnet20() -> nn.Module:
    torch.manual_seed(0)
    sizes = (
        [(16, 16, 1)] * 3 + [(16, 32, 2)] + [(32, 32, 1)] * 2 + [(32, 64, 2)] + [(64, 64, 1)] * 2
    )
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        *(Block(*size) for size in sizes),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    ).eval()


def forward(model: nn.Module, count: int, batch: int) -> None:
    x = torch.rand(batch, 32, 32, 3).permute(0, 3, 1, 2)  # channels last, as ours
    with torch.inference_mode():
        for _ in range(-(-count // batch)):
            model(x)


def cohen(model: nn.Module, images: torch.Tensor, n: int, batch: int) -> None:
    """Certify as in the reference code: repeat, add noise, argmax, count on the CPU."""
    for x in images:
        votes = []
        for count in (N0, n):
            counts = np.zeros(10, int)
            with torch.no_grad():
                for _ in range(-(-count // batch)):
                    this = min(batch, count)
                    count -= this
                    copies = x.repeat((this, 1, 1, 1))
                    labels = model(copies + torch.randn_like(copies) * SIGMA).argmax(1)
                    for label in labels.numpy():
                        counts[label] += 1
            votes.append(counts)
        k = votes[1][votes[0].argmax()]
        norm.ppf(beta.ppf(ALPHA, k, n - k + 1))


def peers(model: nn.Module, images: torch.Tensor, n: int) -> dict[str, Callable[[], object]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing

    theirs = PyTorchRandomizedSmoothing(
        model=model,
        loss=nn.CrossEntropyLoss(),
        input_shape=(3, 32, 32),
        nb_classes=10,
        clip_values=(0, 1),
        sample_size=N0,
        scale=SIGMA,
        alpha=ALPHA,
        device_type="cpu",
    )
    total = len(images) * (n + N0)
    run: dict[str, Callable[[], object]] = {
        f"forward, batch {batch}": lambda batch=batch: forward(model, total, batch)
        for batch in BATCHES
    }

    def ours() -> None:
        for index, x in enumerate(images):
            certify(model, x, sigma=SIGMA, n0=N0, n=n, alpha=ALPHA, index=index, batch_size=64)

    run["ours, batch 64"] = ours
    run["Cohen loop, batch 1000"] = lambda: cohen(model, images, n, 1000)
    run["Cohen loop, batch 64"] = lambda: cohen(model, images, n, 64)
    run["ART certify, batch 32"] = lambda: theirs.certify(images.numpy(), n)
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = resnet20()
    images = torch.rand(arguments.images, 3, 32, 32)
    run = peers(model, images, arguments.n)
    seconds: dict[str, list[float]] = {name: [] for name in run}
    forward(model, 256, 64)  # warm up
    for _ in range(arguments.repeats):
        for name, task in run.items():
            start = time.perf_counter()
            task()
            seconds[name].append(time.perf_counter() - start)
    unit = min(min(times) for name, times in seconds.items() if name.startswith("forward"))
    print(
        f"{arguments.images} images, n0 = {N0}, n = {arguments.n}, {arguments.threads} threads, "
        f"{arguments.repeats} repeats\n{platform.machine()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, adversarial-robustness-toolbox "
        f"{version('adversarial-robustness-toolbox')}\n"
    )
    print(f"{'':28}{'best (s)':>10}{'worst (s)':>11}{'x forward':>11}")
    for name, times in seconds.items():
        print(f"{name:28}{min(times):10.2f}{max(times):11.2f}{min(times) / unit:11.2f}")


if __name__ == "__main__":
    main()
