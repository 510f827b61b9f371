"""The robust diffusion classifier with the settings of its release."""

from __future__ import annotations

from typing import Any

from art_denoised.diffusion.levels import noise_levels
from art_denoised.diffusion.model import DiffusionModel
from art_denoised.rdc.classifier import DiffusionClassifier
from art_denoised.rdc.likelihood import RDC, Adam, LikelihoodMaximization


def chen2024(
    diffusion: DiffusionModel,
    unconditional: DiffusionModel | None = None,
    *,
    levels: int = 125,
    shape: tuple[int, int, int] = (3, 32, 32),
    seed: int | None = None,
    gradient: str = "exact",
    **options: Any,
) -> RDC:
    """Build the robust diffusion classifier of the release of Chen et al.

    The settings are those of its script "RDCN+TK.py". The noise levels are 126 numbers from 1e-4 to
    3 without the last, with its weights ("rdc_legacy") and the mean of the error over pixels.
    Likelihood maximization takes 5 steps of Adam without a ball, with learning rate 0.1 in [-1, 1],
    at noise levels from 0.4 to 0.6. The release replaces its gradient by the identity ("bpda").

    Source: Chen et al., "Robust Classification via a Single Diffusion Model" (ICML 2024, arXiv
    2305.15241), and its public code.

    Args:
        diffusion: Class-conditional diffusion model, in eval mode.
        unconditional: Diffusion model for likelihood maximization, which the release takes from
            another file; None: ``diffusion``, which must have a null class then.
        levels: Number of noise levels; the release also uses 1,000.
        shape: Channels, height and width of the images.
        seed: Seed of all noise; None: fresh noise in every call.
        gradient: Gradient of likelihood maximization, "exact" or "bpda".
        **options: Further arguments of `DiffusionClassifier`: max_batch, recompute, prior.

    Raises:
        InputError: A model cannot be used so, or a value is out of range.

    Example:
        >>> from art_denoised.diffusion import edm_diffusion
        >>> import torch
        >>> size = {"img_resolution": 8, "img_channels": 3, "model_channels": 16}
        >>> small = {**size, "model_type": "SongUNet", "channel_mult": [1], "num_blocks": 1}
        >>> conditional = edm_diffusion(label_dim=4, **small).eval()
        >>> rdc = chen2024(conditional, edm_diffusion(**small).eval(), levels=3, shape=(3, 8, 8))
        >>> rdc(torch.rand(2, 3, 8, 8)).shape
        torch.Size([2, 4])
    """
    settings = chen2024_settings(levels, shape)
    form = settings.pop("form")
    return RDC(
        LikelihoodMaximization(
            diffusion if unconditional is None else unconditional,
            steps=5,
            form=form,
            gradient=gradient,
            seed=seed,
        ),
        DiffusionClassifier(diffusion, seed=seed, **settings, **options),
    )


def chen2024_settings(levels: int, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Return noise levels, temperature and the form of likelihood maximization of the release."""
    channels, height, width = shape
    return {
        "levels": noise_levels(levels, "rdc_legacy", "linear"),
        "temperature": float(channels * height * width),  # a mean over pixels
        "form": Adam(lr=0.05, project=False, eps=2e-8),  # 0.1 and 1e-8 in [-1, 1]
    }
