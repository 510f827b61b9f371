"""Certified radii of the diffusion classifier, by the certification that there is."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from art_denoised import (
    DiffusionClassifier,
    FixedN,
    LikelihoodMaximization,
    OneShotDenoiser,
    Smoother,
)
from art_denoised.checks import InputError
from art_denoised.data import digits
from art_denoised.demo import digits_diffusion
from art_denoised.diffusion import (
    EDM,
    DiffusionModel,
    LevelNoise,
    Levels,
    Native,
    NoisedDiffusion,
    noise_levels,
)
from art_denoised.rdc import predict_anytime
from art_denoised.smoothing import DenoisedClassifier
from tests.rdc.test_classifier import images, small_model


def test_the_diffusion_classifier_is_certified_behind_its_own_denoiser():
    """APNDC (Chen et al. 2024): denoise once without class, then classify on levels above."""
    sigma, model = 0.25, digits_diffusion()
    levels = noise_levels(16).above(2 * sigma)
    classifier = DiffusionClassifier(model, levels=levels, seed=0)
    base = DenoisedClassifier(classifier, OneShotDenoiser(model), sigma=sigma).eval()
    data = [digits(train=False)[i] for i in range(8)]
    x = torch.stack([x for x, _ in data])
    found = Smoother(base, sigma=sigma).certify(x, FixedN(120, n0=20))
    right = [c for c, (_, y) in zip(found, data, strict=True) if c.label == y]
    assert len(right) >= 7
    assert sum(c.radius for c in right) / len(data) > 0.2


def test_epndc_is_the_equation():
    """Against Chen et al. 2024, theorem 3.1, spelt out: means of two posteriors, step by step."""
    tau, y = 0.2, torch.tensor([3])  # in image units; the network's are twice as large
    model = small_model()
    x_tau = images(1) + tau * torch.randn(1, 1, 8, 8, dtype=torch.float64)
    sigmas = [2 * tau, 0.5, 0.8, 1.4, 3.0]  # the network's: the chain begins at the noise itself
    rho2 = [s**2 - sigmas[0] ** 2 for s in sigmas]
    levels = Levels(
        tuple(r**0.5 for r in rho2[2:]),
        tuple((1 / a - 1 / b) / 2 for a, b in itertools.pairwise(rho2[1:])),
    )
    loss = 0.0
    for step, (low, high) in enumerate(itertools.pairwise(sigmas[1:])):
        eps = LevelNoise(0)(x_tau, [0], [step])
        up, down = high**2 - sigmas[0] ** 2, low**2 - sigmas[0] ** 2
        x_t = 2 * x_tau - 1  # the network's units
        x_next = x_t + up**0.5 * eps
        d = 2 * model((x_next + 1) / 2, high / 2, y) - 1
        q_mean = ((high**2 - low**2) * x_t + down * x_next) / up
        p_mean = ((high**2 - low**2) * d + low**2 * x_next) / high**2
        variance = down * (high**2 - low**2) / up
        loss += float(((q_mean - p_mean).square().sum() / (2 * variance)).detach())
    classifier = DiffusionClassifier(NoisedDiffusion(model, tau), levels=levels, seed=0)
    assert float(-classifier(x_tau)[0, 3].detach()) == pytest.approx(loss, rel=1e-6)


def test_a_noised_model_is_that_of_noised_data():
    """Of N(0, 1) data: x_tau is N(0, 1 + tau^2), whose posterior mean is known."""

    class Shrink(nn.Module):
        def forward(self, x, sigma, y):
            return x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)

    model = DiffusionModel(Shrink(), Native(), image_range=(0, 1))
    tau, rho, x = 0.5, torch.tensor([0.3, 2.0], dtype=torch.float64), images(2)
    shrunk = (1 + tau**2) / (1 + tau**2 + rho**2)
    assert torch.allclose(NoisedDiffusion(model, tau)(x, rho), x * shrunk.reshape(-1, 1, 1, 1))
    edm = NoisedDiffusion(DiffusionModel(Shrink(), EDM(sigma_min=1.0, sigma_max=5.0)), 1.5)
    assert edm.sigma_min == 0.0
    assert edm.sigma_max == pytest.approx(2.0)
    assert edm.at_least(0.1) == pytest.approx(0.1)
    with pytest.raises(InputError, match="beyond"):
        NoisedDiffusion(edm, 2.6)


def test_epndc_is_certified():
    sigma, model = 0.25, digits_diffusion()
    levels = noise_levels(8, "elbo", p_mean=0.0, p_std=0.7)
    base = DiffusionClassifier(NoisedDiffusion(model, sigma), levels=levels, seed=0)
    data = [digits(train=False)[i] for i in range(8)]
    x = torch.stack([x for x, _ in data])
    found = Smoother(base, sigma=sigma).certify(x, FixedN(120, n0=20))
    assert sum(c.label == y and c.radius > 0.2 for c, (_, y) in zip(found, data, strict=True)) >= 7


def test_elimination_and_temperature_take_noised_images():
    data = [digits(train=False)[i] for i in range(40)]
    x, y = torch.stack([x for x, _ in data]), torch.tensor([y for _, y in data])
    x_tau = x + 0.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    noised = NoisedDiffusion(digits_diffusion(), 0.5)
    dc = DiffusionClassifier(noised, levels=noise_levels(8), seed=0)
    assert torch.equal(predict_anytime(dc, x_tau, z=1e9).predictions, dc(x_tau).argmax(1))
    assert dc.fit_temperature(x_tau, y) == dc.temperature
    with pytest.raises(InputError, match=r"noise 0\.5"):
        LikelihoodMaximization(noised)
