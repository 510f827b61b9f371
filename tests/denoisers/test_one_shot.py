"""Diffusion models as denoisers: never told, nor given, less noise than is certified."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from art_denoised import FixedN, OneShotDenoiser, Smoother, load_denoiser
from art_denoised.checks import InputError
from art_denoised.denoisers import UNetDenoiser
from art_denoised.diffusion import DDPM, DiffusionModel
from art_denoised.smoothing import DenoisedClassifier
from tests.diffusion.test_model import save, unet
from tests.diffusion.test_preconditioning import ABAR

COARSE = ABAR[::50]  # so that levels between steps are far from them


class Recorder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen, self.steps = [], []

    def forward(self, x, c_noise, y):
        self.seen.append(x)
        self.steps.append(c_noise)
        return torch.zeros_like(x)


@given(st.floats(0.01, 4))
def test_the_model_is_told_at_least_sigma(sigma):
    network = Recorder()
    denoiser = OneShotDenoiser(DiffusionModel(network, DDPM(COARSE)))
    denoiser(torch.rand(2, 1, 4, 4), sigma)
    abar = COARSE[int(network.steps[0][0])]
    told = ((1 - abar) / abar) ** 0.5 / 2  # in image units
    assert told >= sigma * (1 - 1e-6)
    assert denoiser.level(sigma) >= sigma
    assert told == pytest.approx(denoiser.level(sigma), rel=1e-5)


def test_the_noise_of_a_certificate_is_never_less_than_sigma():
    """What reaches the network, taken back to image units: 2.4 million values of noise.

    Its standard deviation has a relative error of 0.05% (one sigma); the limit is ten times that.
    """
    network, sigma = Recorder(), 0.3
    denoiser = OneShotDenoiser(DiffusionModel(network, DDPM(COARSE)))
    classifier = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    base = DenoisedClassifier(classifier, denoiser, sigma=sigma).eval()
    x = torch.full((1, 64, 64), 0.5)
    Smoother(base, sigma=sigma, batch_size=50).certify(x[None], FixedN(600))
    c_in = (1 + (2 * denoiser.level(sigma)) ** 2) ** -0.5
    # The 100 + 600 samples come after the passes that try the network.
    noisy = torch.cat(network.seen[-14:])
    noise = (noisy / c_in + 1) / 2 - x
    assert noise.numel() > 2_000_000
    assert float(noise.std()) > sigma * (1 - 0.005)
    assert denoiser.level(sigma) > sigma


def test_one_shot_is_the_clipped_posterior_mean(tmp_path):
    save(tmp_path, unet(), DDPMScheduler())
    denoiser = load_denoiser(tmp_path)
    assert isinstance(denoiser, OneShotDenoiser)
    x = torch.rand(3, 1, 8, 8) + torch.randn(3, 1, 8, 8)
    level = denoiser.level(0.5)
    x_hat = denoiser(x, 0.5)
    assert torch.equal(x_hat, denoiser.model(x, level).clamp(0, 1))
    assert ((x_hat == 0) | (x_hat == 1)).any()
    each = denoiser(x, torch.tensor([0.5, 0.25, 0.1]))
    torch.testing.assert_close(each[1:2], denoiser(x[1:2], 0.25))
    with pytest.raises(InputError, match="highest noise level"):
        denoiser(x, 1000.0)


def test_a_folder_without_scheduler_is_a_noise_predictor_told_sigma(tmp_path):
    unet().save_pretrained(tmp_path)
    assert isinstance(load_denoiser(tmp_path), UNetDenoiser)
