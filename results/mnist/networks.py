"""Networks of MNIST digits for images in [0, 1], with the weights of this folder.

art-denoised certify --model networks:plain --data imagefolder:data/test ...
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from art_denoised import DiffusionModel, load_data, load_diffusion
from art_denoised.models import load_weights

HERE = Path(__file__).parent


def cnn() -> nn.Module:
    """Return the small CNN of Wong and Kolter (ICML 2018), untrained."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )


def plain() -> nn.Module:
    """Return the CNN trained on clean images."""
    return _trained("plain")


def adversarial() -> nn.Module:
    """Return the CNN trained on PGD images, l_inf 0.2."""
    return _trained("adversarial")


def diffusion() -> DiffusionModel:
    """Return the class-conditional diffusion model."""
    model = load_diffusion(HERE / "diffusion", classes=10).requires_grad_(False)
    return model.to(memory_format=torch.channels_last)  # a sixth faster on a CPU


def _trained(name: str) -> nn.Module:
    model = cnn()
    load_weights(model, HERE / f"{name}.safetensors")
    return model.eval()


def held_out(skip: int, first: int = 0, limit: int | None = None):
    """Return every ``skip``-th test image from index ``first`` on, as tensors x and y."""
    data = load_data(f"imagefolder:{HERE / 'data' / 'test'}")
    chosen = range(first, len(data), skip)[:limit]
    pairs = [data[i] for i in chosen]
    return torch.stack([x for x, _ in pairs]), torch.tensor([y for _, y in pairs])
