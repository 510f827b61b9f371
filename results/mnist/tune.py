"""Choose the settings of defences.py on validation images: test images 5, 15, 25, ...

python results/mnist/tune.py levels         # mean and deviation of the noise levels
python results/mnist/tune.py temperature    # temperature, and accuracy by number of levels
python results/mnist/tune.py likelihood     # eta and lr: clean, and under a short attack
python results/mnist/tune.py attack         # loss and number of steps of the attack
"""

from __future__ import annotations

import json
import sys

import numpy as np
import torch
from defences import TEMPERATURES, diffusion_classifier, rdc
from networks import diffusion, held_out
from torch import nn
from torch.nn import functional as F

from art_denoised import PGD, DiffusionClassifier
from art_denoised.diffusion import SIGMA_DATA, LevelNoise, Levels


def validation(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = held_out(10, first=5)
    chosen = np.random.default_rng(1).permutation(len(y))[:count]
    return x[chosen], y[chosen]


@torch.no_grad()
def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    return float((model(x).argmax(1) == y).double().mean())


@torch.no_grad()
def levels() -> None:
    """Compare choices of levels by new weights of one fine grid, whose errors all of them share."""
    x, y = validation(1000)
    sigmas = np.geomspace(0.25, 12, 24)
    grid = Levels(tuple(sigmas.tolist()), (1.0,) * len(sigmas))
    single = DiffusionClassifier(diffusion(), levels=grid, seed=0, max_batch=240)
    pairs = torch.cartesian_prod(torch.arange(len(sigmas)), torch.arange(10))
    noise = LevelNoise(0)
    errors = torch.stack(
        [
            single.errors(x, (torch.full((240,), i), pairs[:, 0], pairs[:, 1]), noise)
            for i in range(len(x))
        ]
    )
    errors = errors.reshape(len(x), len(sigmas), 10).double()
    print(f"{len(y)} validation images, 24 levels; cross-entropy at the best temperature")
    scale = (sigmas**2 + SIGMA_DATA**2) / (sigmas * SIGMA_DATA) ** 2
    for p_mean in (0.1, 0.3, 0.5, 0.7, 0.9):
        for p_std in (0.5, 0.8, 1.1):
            # Levels a constant factor apart: their share is the density of ln(sigma).
            weight = torch.from_numpy(
                scale * np.exp(-(((np.log(sigmas) - p_mean) / p_std) ** 2) / 2)
            )
            losses = torch.einsum("nlk,l->nk", errors, weight / weight.sum())
            right = float((losses.argmin(1) == y).double().mean())
            fitted = min(float(F.cross_entropy(-losses / t, y)) for t in np.logspace(-2, 2, 60))
            print(f"p_mean {p_mean}, p_std {p_std}: {right:.1%}, {fitted:.4f}", flush=True)


def temperature() -> None:
    x, y = validation(500)
    print(f"{len(y)} validation images")
    fitted = {}
    for levels in (8, 16):
        classifier = diffusion_classifier(levels=levels)
        fitted[levels] = round(classifier.fit_temperature(x, y), 3)
        right = accuracy(classifier, x, y)
        print(f"{levels} levels: {right:.1%}, temperature {fitted[levels]}", flush=True)
    TEMPERATURES.write_text(json.dumps(fitted) + "\n")


def likelihood(steps: int = 10, count: int = 20) -> None:
    x, y = validation(100)
    print(f"clean: {len(y)} validation images; attacked: PGD-{steps}, l_inf 0.2, {count} of them")
    for eta, lr in ((0.1, 0.05), (0.2, 0.05), (0.2, 0.1), (0.3, 0.1)):
        model = rdc(eta=eta, lr=lr)
        x_adv = PGD(0.2, steps=steps)(model, x[:count], y[:count])
        left = accuracy(model, x_adv, y[:count])
        print(f"eta {eta}, lr {lr}: {accuracy(model, x, y):.1%}, {left:.0%}", flush=True)


def attack(count: int = 20) -> None:
    x, y = validation(count)
    for loss, steps in (("ce", 20), ("margin", 20), ("ce", 50)):
        x_adv = PGD(0.2, steps=steps, loss=loss)(rdc(), x, y)
        left = accuracy(rdc(), x_adv, y)
        print(f"{loss}, PGD-{steps}: {left:.0%} of {count} validation images left", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"levels": levels, "temperature": temperature, "likelihood": likelihood, "attack": attack}[
        sys.argv[1]
    ]()
