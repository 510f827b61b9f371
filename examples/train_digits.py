"""Train the packaged digits classifier and denoiser, and write their weights and card.

    python examples/train_digits.py --out art_denoised/demo

The classifier is trained on clean images only, like one that was never meant to be robust. The
denoiser is trained by mean squared error, then by the stability objective against the frozen
classifier (Salman et al. 2020, equations 5 and 6): the denoised image must keep the label that the
classifier gives the clean image. This takes about nine minutes on one CPU core.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from art_denoised import DnCNN, save_denoiser
from art_denoised.data import digits
from art_denoised.demo import digits_network

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

SIGMAS = (0.1, 0.6)  # range of sigma, drawn for each image: one denoiser serves both demo levels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("art_denoised/demo"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few steps")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(1)  # weights depend on the number of threads, through rounding
    share = 500 if arguments.quick else 1
    train, test = tensors(train=True), tensors(train=False)

    classifier = digits_network()
    fit(
        classifier,
        steps=1500 // share,
        lr=2e-3,
        loss=lambda x, y: F.cross_entropy(classifier(x), y),
    )
    classifier.eval().requires_grad_(False)

    denoiser = DnCNN(image_channels=1, depth=6, width=24)

    def mse(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(denoiser(*noisy(x)), x)

    def stability(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(classifier(denoiser(*noisy(x))), classifier(x).argmax(1))

    fit(denoiser, steps=3000 // share, lr=3e-3, loss=mse)
    fit(denoiser, steps=9000 // share, lr=2e-3, loss=stability)
    denoiser.eval()

    arguments.out.mkdir(parents=True, exist_ok=True)
    save_file(classifier.state_dict(), arguments.out / "digits_classifier.safetensors")
    save_denoiser(denoiser, arguments.out / "digits_denoiser.safetensors", sigma=SIGMAS)
    for name, (x, y) in {"train": train, "test": test}.items():
        print(f"{name}: clean accuracy {accuracy(classifier, x, y):.4f}")
        for sigma in (0.25, 0.5):
            torch.manual_seed(1)
            x_noisy = x + sigma * torch.randn_like(x)
            plain = accuracy(classifier, x_noisy, y)
            denoised = accuracy(classifier, denoiser(x_noisy, sigma), y)
            print(f"{name}: sigma {sigma}: accuracy {plain:.4f} plain, {denoised:.4f} denoised")


def fit(model: nn.Module, *, steps: int, lr: float, loss: Loss) -> None:
    x, y = tensors(train=True)
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    for _ in range(steps):
        batch = torch.randint(len(x), (128,))
        value = loss(shifted(x[batch]), y[batch])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()


def shifted(x: torch.Tensor) -> torch.Tensor:
    """Shift each batch by up to one pixel, because 1,297 images are few."""
    dx, dy = torch.randint(3, (2,)).tolist()
    return F.pad(x, (1, 1, 1, 1))[:, :, dy : dy + 8, dx : dx + 8]


def noisy(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    sigma = torch.empty(len(x)).uniform_(*SIGMAS)
    return x + sigma.reshape(-1, 1, 1, 1) * torch.randn_like(x), sigma


def tensors(*, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
    data = digits(train=train)
    images, labels = zip(*(data[i] for i in range(len(data))), strict=True)
    return torch.stack(images), torch.tensor(labels)


@torch.no_grad()
def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    return float((model(x).argmax(1) == y).float().mean())


if __name__ == "__main__":
    main()
