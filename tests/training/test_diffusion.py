"""Training diffusion models: what is refused, before or at the first batch."""

from __future__ import annotations

import pytest
import torch

from art_denoised import DiffusionModel, Plan, train_diffusion
from art_denoised.checks import InputError
from art_denoised.diffusion import DDPM, unet_diffusion


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "label 5 is out of range"),
        ({"p_std": 0}, "p_std is 0"),
        ({"p_mean": float("nan")}, "p_mean is nan"),
        ({"drop": 1.0}, "drop is 1.0"),
    ],
)
def test_bad_input(options, message):
    data = torch.utils.data.TensorDataset(torch.rand(8, 1, 8, 8), torch.full((8,), 5))
    model = unet_diffusion(1, 8, classes=3, widths=(8,))
    plan = Plan(epochs=1, batch_size=8)
    with pytest.raises(InputError, match=message):
        train_diffusion(model, data, plan=plan, progress=False, **options)


def test_other_families_are_refused():
    model = DiffusionModel(torch.nn.Identity(), DDPM((0.9, 0.1)))
    with pytest.raises(InputError, match="family DDPM"):
        train_diffusion(model, [], progress=False)
