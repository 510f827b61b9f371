"""The settings of the release of RDC, against its code on random weights and the same noise."""

from __future__ import annotations

import pytest
import torch

from art_denoised import RobustDiffusionClassifier
from art_denoised.checks import InputError
from art_denoised.diffusion import edm_diffusion
from art_denoised.rdc import Adam, chen2024
from tests.golden.published import (
    RDC_LEVELS,
    RDC_NETWORK,
    RDC_SEED,
    RDC_UNCONDITIONAL,
    figures,
    frozen,
    normal,
    weights,
)

SHAPE = (3, 8, 8)
X = normal(4, 1, *SHAPE).mul(0.2).add(0.5).clamp(0, 1)


def diffusion(config, seed):
    built = edm_diffusion(**config).eval().requires_grad_(False)
    weights(built.network, seed)
    return built


@pytest.fixture(scope="module")
def models():
    return diffusion(RDC_NETWORK, 0), diffusion(RDC_UNCONDITIONAL, 1)


def test_images_and_logits_equal_the_release(models):
    expected = frozen("rdc")
    rdc = chen2024(*models, levels=RDC_LEVELS, shape=SHAPE, seed=RDC_SEED)
    purified = rdc.purify(X)
    assert float((purified - X).abs().mean()) == pytest.approx(expected["moved"], abs=1e-5)
    assert figures(purified) == pytest.approx(expected["images"], abs=1e-5)
    alone = torch.tensor(expected["alone"])
    torch.testing.assert_close(rdc.classifier(X), alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rdc(X), torch.tensor(expected["logits"]), atol=1e-5, rtol=1e-5)


def test_the_estimator_is_the_same_module(models):
    options = {"levels": 4, "seed": 0, "gradient": "bpda"}
    estimator = RobustDiffusionClassifier.chen2024(*models, input_shape=SHAPE, **options)
    rdc = chen2024(*models, shape=SHAPE, **options)
    assert torch.equal(torch.from_numpy(estimator.predict(X.numpy())), rdc(X))
    assert estimator.nfe == rdc.nfe() == 4 * 4 + 5
    with pytest.raises(InputError, match="temperature belongs to the release"):
        RobustDiffusionClassifier.chen2024(*models, input_shape=SHAPE, temperature=2.0)


def test_the_grid_is_that_of_the_release(models):
    rdc = chen2024(*models, shape=SHAPE)
    grid = torch.linspace(1e-4, 3, 126)[:-1]
    torch.testing.assert_close(torch.tensor(rdc.classifier.levels.sigmas), grid)
    assert rdc.nfe() == 4 * 125 + 5
    assert rdc.maximization.form == Adam(lr=0.05, project=False, eps=2e-8)


def test_a_class_conditional_model_alone_needs_a_null_class(models):
    with pytest.raises(InputError, match="no null class"):
        chen2024(models[0], shape=SHAPE)
    null = diffusion({**RDC_NETWORK, "label_dropout": 0.1}, 0)
    assert chen2024(null, shape=SHAPE, levels=3)(X).shape == (1, 4)
