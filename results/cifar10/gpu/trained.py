"""The networks that were trained here, by the names that ``--model`` takes.

    cd results/cifar10/gpu; python trained.py

writes denoiser-0.25.safetensors, denoiser-0.5.safetensors and diffusion-model/, in the forms that
``--denoiser`` and ``--diffusion`` read, of those trainings whose files are here.
"""

from __future__ import annotations

from pathlib import Path

import card
import classifier as classifier_
import denoiser
import diffusion
from torch import nn

from art_denoised import save_denoiser
from art_denoised.diffusion import save_diffusion

HERE = Path(__file__).parent


def classifier() -> nn.Module:
    """Return the classifier."""
    return card.read(classifier_.network(), HERE / "classifier")


def main() -> None:
    for sigma in (0.25, 0.5):
        folder = HERE / f"denoiser-{sigma:g}"
        if folder.exists():
            trained = card.read(denoiser.network(), folder)
            save_denoiser(trained, folder.with_name(f"{folder.name}.safetensors"), sigma=sigma)
    if (HERE / "diffusion").exists():
        model = card.read(diffusion.network(), HERE / "diffusion")
        save_diffusion(model, HERE / "diffusion-model")


if __name__ == "__main__":
    main()
