"""RDC: its two parts as one, and the capabilities that evaluations ask for."""

from __future__ import annotations

import pytest
import torch

from art_denoised.checks import InputError
from art_denoised.rdc import RDC, DiffusionClassifier, LikelihoodMaximization
from art_denoised.types import GradientModes, Purifies, Seeded
from tests.rdc.test_classifier import LEVELS, images, small_model


def parts(seed=0):
    model = small_model()
    lm = LikelihoodMaximization(model, steps=2, eta=0.1, seed=seed)
    return lm, DiffusionClassifier(model, levels=LEVELS, seed=seed)


def test_it_is_its_parts_in_sequence():
    (lm, classifier), x = parts(), images(2)
    rdc = RDC(lm, classifier)
    assert not rdc.training
    assert torch.equal(rdc(x), classifier(lm(x)))
    assert torch.equal(rdc.purify(x), lm(x))
    assert rdc.nfe(5) == 5 * (2 + 10 * 3)
    assert rdc(torch.rand(0, 1, 8, 8)).shape == (0, 10)


def test_its_capabilities():
    rdc = RDC(*parts())
    for one in (rdc, rdc.maximization):
        assert isinstance(one, Seeded)
        assert isinstance(one, GradientModes)
        assert isinstance(one, Purifies)
        assert one.gradients == ("exact", "bpda")
    assert isinstance(rdc.classifier, Seeded)
    assert not isinstance(rdc.classifier, (GradientModes, Purifies))


@pytest.mark.parametrize("make", [RDC, lambda lm, dc: lm, lambda lm, dc: dc])
def test_a_seed_can_be_freed_and_set_again(make):
    module, x = make(*parts()), images(1)
    fixed = module(x)
    module.seed = None
    assert not torch.equal(module(x), module(x))
    module.seed = 0
    assert torch.equal(module(x), fixed)


def test_gradients_can_be_switched():
    rdc = RDC(*parts())
    found = {}
    for gradient in rdc.gradients:
        rdc.gradient = gradient
        x = images(2).requires_grad_()
        rdc(x).logsumexp(1).sum().backward()
        found[gradient] = x.grad
    assert rdc.maximization.gradient == "bpda"
    assert not torch.allclose(found["exact"], found["bpda"], rtol=0.01)


def test_parts_of_different_seeds_are_refused():
    with pytest.raises(InputError, match="seeds 0 and 1"):
        RDC(parts(0)[0], parts(1)[1])


def test_the_temperature_is_fitted_on_purified_images():
    rdc, x = RDC(*parts()), images(12)
    y = torch.arange(12) % 10
    likely = rdc.classifier(rdc.purify(x)).argmax(1)
    y = torch.where(torch.arange(12) % 2 == 0, likely, y)
    expected = rdc.classifier.fit_temperature(rdc.purify(x), y)
    rdc.classifier.temperature = 1.0
    assert rdc.fit_temperature(x, y) == expected == rdc.classifier.temperature
