"""Training diffusion models: what is refused, and that a killed training resumes."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils.data import TensorDataset

from art_denoised import DiffusionModel, EDMLoss, InputError, TrainingConfig, train_diffusion
from art_denoised.diffusion import DDPM, unet_diffusion

CONFIG = TrainingConfig(epochs=1, batch_size=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p_std": 0}, "p_std is 0"),
        ({"p_mean": float("nan")}, "p_mean is nan"),
        ({"drop": 1.0}, "drop is 1.0"),
    ],
)
def test_bad_losses(options, message):
    with pytest.raises(InputError, match=message):
        EDMLoss(**options)


def test_labels_out_of_range_are_refused():
    data = TensorDataset(torch.rand(8, 1, 8, 8), torch.full((8,), 5))
    model = unet_diffusion(1, 8, classes=3, widths=(8,))
    with pytest.raises(InputError, match=r"label 5 .*0 to 2"):
        train_diffusion(model, data, config=CONFIG, progress=False)


def test_other_families_are_refused():
    model = DiffusionModel(torch.nn.Identity(), DDPM((0.9, 0.1)))
    with pytest.raises(InputError, match="DDPM"):
        train_diffusion(model, [], progress=False)


def test_the_loss_is_compared_on_resuming(tmp_path):
    def run(loss, resume):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = unet_diffusion(1, 8, classes=3, widths=(8,))
        data = TensorDataset(torch.ones(8, 1, 8, 8) / 2, torch.arange(8) % 3)
        options = {"run": tmp_path, "resume": resume, "progress": False}
        return train_diffusion(model, data, loss, CONFIG, **options)

    rows = run(None, False)
    assert run(EDMLoss(), True) == rows
    with pytest.raises(InputError, match=r"loss\.p_mean is -1\.2, not 0\.7"):
        run(EDMLoss(p_mean=0.7), True)
    header = json.loads((tmp_path / "train.jsonl").read_text().splitlines()[0])
    assert {"torch", "art-denoised"} <= set(header["settings"]["versions"])
