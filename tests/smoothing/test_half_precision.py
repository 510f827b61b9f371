"""Labels in half precision against float32, by the recipe of Carlini et al. (2023)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from art_denoised import DenoisedClassifier, OneShotDenoiser, load_diffusion
from art_denoised.diffusion import openai_diffusion
from tests.golden.published import SMALL, weights

# Images of 4x4 pixels, since a CPU without half precision computes it slowly.
FLAGS = {**SMALL, "image_size": 4, "channel_mult": "1", "attention_resolutions": "4"}
FLAGS |= {"learn_sigma": True, "num_head_channels": 16}
SIGMA, IMAGES = 0.25, (1000, 3, 4, 4)


def recipe(path, dtype):
    """Return a classifier of random weights behind a U-Net that learned its variance."""
    diffusion = load_diffusion(path, openai=FLAGS, dtype=dtype)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = nn.Sequential(nn.Flatten(), nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 10))
    return DenoisedClassifier(
        classifier.to(dtype).eval(), OneShotDenoiser(diffusion).eval(), sigma=SIGMA
    )


@torch.no_grad()
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 0.002), (torch.bfloat16, 0.02)], ids=str
)
def test_labels_are_those_of_float32_but_for_near_ties(tmp_path, dtype, tolerance):
    model = openai_diffusion(FLAGS)
    weights(model.network)
    torch.save(model.network.state_dict(), tmp_path / "model.pt")
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(IMAGES, generator=generator)
    x_noisy = x + SIGMA * torch.randn(IMAGES, generator=generator)
    full = recipe(tmp_path / "model.pt", torch.float32)(x_noisy)
    half = recipe(tmp_path / "model.pt", dtype)(x_noisy.to(dtype))
    first, second = full.topk(2).values.T
    near = first - second < tolerance * full.abs().amax(1)
    same = half.argmax(1) == full.argmax(1)
    assert half.dtype == dtype
    assert same[~near].all()
    assert near.float().mean() < 0.1
    assert len(full.argmax(1).unique()) > 2
