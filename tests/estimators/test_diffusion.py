"""The robust diffusion classifier in ART: its module and nothing else, attacked unchanged."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from art_denoised import RobustDiffusionClassifier
from art_denoised.checks import InputError
from art_denoised.demo import digits_diffusion
from art_denoised.diffusion import noise_levels

IMAGES = 6


def rdc(**options: object) -> RobustDiffusionClassifier:
    defaults = {"steps": 2, "eta": 0.1, "levels": noise_levels(8), "seed": 0}
    return RobustDiffusionClassifier(
        digits_diffusion(), input_shape=(1, 8, 8), **{**defaults, **options}
    )


@pytest.fixture(scope="module")
def data(digits):
    return digits[0][:IMAGES].numpy(), digits[1][:IMAGES].numpy()


def test_it_predicts_and_differentiates_what_its_module_computes(data):
    x, y = data
    defence = rdc()
    assert isinstance(defence.model, nn.Sequential)
    images = torch.from_numpy(x).requires_grad_()
    logits = defence.model(images)
    np.testing.assert_allclose(defence.predict(x), logits.detach().numpy(), rtol=1e-4)
    nn.functional.cross_entropy(logits, torch.from_numpy(y)).backward()
    gradient = defence.loss_gradient(x, y)
    scale = np.abs(images.grad.numpy()).max()
    np.testing.assert_allclose(gradient, images.grad.numpy(), rtol=1e-3, atol=1e-4 * scale)
    assert defence.class_gradient(x[:2], label=3).shape == (2, 1, 1, 8, 8)
    np.testing.assert_allclose(defence.predict(x, batch_size=1), defence.predict(x), rtol=1e-4)


def test_the_temperature_is_fitted_behind_likelihood_maximization(digits):
    noise = 0.5 * torch.randn(digits[0][:100].shape, generator=torch.Generator().manual_seed(0))
    x, y = (digits[0][:100] + noise).clamp(0, 1).numpy(), digits[1][:100].numpy()
    defence = rdc(eta=1.0, lr=0.2)  # on images that are hard, for it gets all others right
    lm, classifier = defence.model
    with torch.no_grad():
        purified = lm(torch.from_numpy(x))
    fitted = defence.fit_temperature(x, np.eye(10)[y])
    assert classifier.temperature == fitted
    assert fitted == classifier.fit_temperature(purified, torch.from_numpy(y))
    assert fitted != classifier.fit_temperature(torch.from_numpy(x), torch.from_numpy(y))
    with pytest.raises(InputError, match="100 images and 3 labels"):
        defence.fit_temperature(x, y[:3])


def test_cost_is_known_before_a_run():
    assert rdc(steps=5).nfe == 8 * 10 + 5
    assert rdc(steps=0).nfe == 80
    assert rdc(form="momentum", steps=2).nfe == 80 + 2 * 8
    cost = rdc(steps=5).cost(images=3)
    assert cost.nfe == 3 * rdc(steps=5).nfe
    assert "255" in str(cost)


def test_bad_input():
    with pytest.raises(InputError, match="shape"):
        RobustDiffusionClassifier(digits_diffusion(), input_shape=(3, 8, 8))
    with pytest.raises(InputError, match="steps is -1"):
        rdc(steps=-1)
    with pytest.warns(UserWarning, match="divide by 255"):
        rdc().predict(np.full((1, 1, 8, 8), 255.0, np.float32))
    x = np.random.default_rng(0).random((1, 1, 8, 8), np.float32)
    for call in (rdc().predict, lambda x: rdc().loss_gradient(x, np.array([3]))):
        with pytest.warns(UserWarning, match="rescale"):  # images in [-1, 1]
            call(2 * x - 1)
    with pytest.raises(InputError, match="NaN"):
        rdc().predict(np.full((1, 1, 8, 8), np.nan, np.float32))
