"""A small pretrained classifier and denoiser of 8x8 handwritten digits, and the demo over them.

Weights, card and provenance: README.md in this folder.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from art_denoised.demo.digits_mlp import digits_diffusion_network
from art_denoised.denoisers.checkpoints import load_denoiser
from art_denoised.diffusion.model import DiffusionModel
from art_denoised.models.weights import load_weights

_FOLDER = Path(__file__).parent


def digits_network() -> nn.Module:
    """Return the classifier's architecture, untrained: (batch, 1, 8, 8) in [0, 1] to 10 logits.

    Example:
        >>> sum(p.numel() for p in digits_network().parameters())
        9930
    """
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )


def digits_classifier() -> nn.Module:
    """Return the packaged classifier, trained on clean digits without any noise.

    Example:
        >>> import torch
        >>> digits_classifier()(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    model = digits_network()
    load_weights(model, _FOLDER / "digits_classifier.safetensors")
    return model.eval()


def digits_denoiser() -> nn.Module:
    """Return the packaged denoiser, a small DnCNN for noise of sigma up to about 0.5.

    Example:
        >>> import torch
        >>> digits_denoiser()(torch.rand(2, 1, 8, 8), 0.25).shape
        torch.Size([2, 1, 8, 8])
    """
    return load_denoiser(_FOLDER / "digits_denoiser.safetensors")


def digits_diffusion() -> DiffusionModel:
    """Return the packaged class-conditional diffusion model, with a null class.

    Example:
        >>> import torch
        >>> digits_diffusion()(torch.rand(2, 1, 8, 8), 0.25, torch.tensor([3, 4])).shape
        torch.Size([2, 1, 8, 8])
    """
    model = digits_diffusion_network()
    load_weights(model, _FOLDER / "digits_diffusion.safetensors")
    return model.eval()
