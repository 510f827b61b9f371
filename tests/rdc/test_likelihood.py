"""Likelihood maximization: likelier, within its ball, and with the gradient it says."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from art_denoised import DiffusionClassifier, LikelihoodMaximization
from art_denoised.checks import InputError
from art_denoised.data import digits
from art_denoised.demo import digits_diffusion
from art_denoised.diffusion import EDM, Native
from art_denoised.diffusion import DiffusionModel
from tests.rdc.test_classifier import LEVELS, Counting, Nan, images, small_model


def purify(**options) -> LikelihoodMaximization:
    defaults = {"steps": 3, "eta": 0.2, "levels": LEVELS, "seed": 0}
    return LikelihoodMaximization(small_model(), **{**defaults, **options})


def inner(n: int = 2) -> torch.Tensor:
    """Images far from 0 and 1, where the clamps have no kinks."""
    return 0.4 + 0.2 * images(n)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_exact_gradients_agree_with_finite_differences(steps):
    lm, x = purify(steps=steps, rate=0.01), inner().requires_grad_()
    weights = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((lm(x) * weights).sum(), x)
    step = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
    h = 1e-7
    with torch.no_grad():
        up, down = (float((lm(x + s * h * step) * weights).sum()) for s in (1, -1))
    assert float((gradient * step).sum()) == pytest.approx((up - down) / (2 * h), rel=1e-4)


def test_gradients_of_both_in_sequence_agree_with_finite_differences():
    lm, x = purify(rate=0.01), inner().requires_grad_()
    rdc = nn.Sequential(lm, DiffusionClassifier(small_model(), levels=LEVELS, seed=1))
    (gradient,) = torch.autograd.grad(rdc(x).log_softmax(1)[:, 4].sum(), x)
    step = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
    h = 1e-7
    with torch.no_grad():
        up, down = (float(rdc(x + s * h * step).log_softmax(1)[:, 4].sum()) for s in (1, -1))
    assert float((gradient * step).sum()) == pytest.approx((up - down) / (2 * h), rel=1e-4)


def test_second_derivatives_are_refused_not_wrong():
    x = inner().requires_grad_()
    with pytest.raises(InputError, match="create_graph"):
        torch.autograd.grad(purify()(x).sum(), x, create_graph=True)


def test_bpda_is_the_identity_and_not_the_gradient():
    x = inner().requires_grad_()
    weights = torch.randn(x.shape, dtype=x.dtype)
    exact, bpda = (
        torch.autograd.grad((purify(gradient=how)(x) * weights).sum(), x)[0]
        for how in ("exact", "bpda")
    )
    assert torch.equal(bpda, weights)
    assert not torch.allclose(exact, bpda, rtol=0.01)
    assert torch.equal(purify(gradient="exact")(x).detach(), purify(gradient="bpda")(x).detach())


@pytest.mark.parametrize("form", ["adam", "momentum"])
def test_it_stays_in_the_ball_and_in_the_range(form):
    x = images(4)
    x_hat = purify(form=form, eta=0.05, steps=5)(x)
    assert (x_hat - x).abs().max() <= 0.05 + 1e-12
    assert x_hat.min() >= 0
    assert x_hat.max() <= 1
    assert (x_hat != x).any()


@pytest.mark.parametrize("form", ["adam", "momentum"])
def test_it_lowers_the_loss_it_minimises(form):
    """On noisy digits, of the packaged model, with noise that it did not see."""
    x = torch.stack([digits(train=False)[i][0] for i in range(50)])
    x = (x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    model = digits_diffusion()
    lm = LikelihoodMaximization(model, steps=5, eta=0.1, form=form, seed=0)

    def loss(x: torch.Tensor) -> float:
        eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(7))
        with torch.no_grad():
            return float((model(x + 0.25 * eps, 0.25) - x).square().mean())

    assert loss(lm(x)) < 0.9 * loss(x)


def test_it_works_without_gradients_and_leaves_the_caller_s_mode():
    x = images()
    with torch.no_grad():
        x_hat = purify()(x)
        assert not torch.is_grad_enabled()
    lm = purify()
    with torch.inference_mode():
        assert torch.equal(lm(x * 1.0), x_hat)
    assert not x_hat.requires_grad
    assert torch.equal(x_hat, purify()(x))


def test_memory_does_not_grow_with_steps():
    """Each step is taken again in the backward pass, and nothing else: no graph is kept."""

    def kept(steps):
        alive = weakref.WeakSet()

        class Held:
            def __init__(self, tensor):
                self.tensor = tensor
                alive.add(self)

        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
            x_hat = purify(steps=steps)(inner(2).requires_grad_())
        assert x_hat.requires_grad
        return sum(held.tensor.numel() for held in alive)

    assert 0 < kept(4) - kept(1) <= 3 * 3 * inner(2).numel()  # a step takes that of three batches
    lm = purify(steps=4)
    lm.model.network = counting = Counting(lm.model.network)
    x = inner(2).requires_grad_()
    y = lm(x)
    assert counting.rows == 4 * 2
    y.sum().backward()
    assert counting.rows == 2 * 4 * 2


def test_fixed_and_fresh_noise():
    x = inner()
    before = torch.get_rng_state()
    assert torch.equal(purify(seed=5)(x), purify(seed=5)(x))
    assert not torch.equal(purify(seed=None)(x), purify(seed=None)(x))
    assert torch.allclose(purify(seed=5)(x[:1]), purify(seed=5)(x)[:1])
    assert torch.equal(before, torch.get_rng_state())


def test_bad_input():
    model = DiffusionModel(small_model().network, EDM(), classes=10)
    with pytest.raises(InputError, match="no null class"):
        LikelihoodMaximization(model)
    for bad in ({"form": "sgd"}, {"gradient": "none"}, {"steps": 0}, {"eta": 0}, {"rate": -1}):
        with pytest.raises(InputError):
            purify(**bad)
    for wrong, words in ((2 * images() - 1, "rescale"), (255 * images(), "divide by 255")):
        with pytest.raises(InputError, match=words):
            LikelihoodMaximization(small_model())(wrong)
    for x in (images(), images().requires_grad_()):
        with pytest.raises(InputError, match="NaN"):
            LikelihoodMaximization(DiffusionModel(Nan(), Native()), levels=LEVELS)(x)


def test_noise_that_the_model_was_not_trained_on_is_refused():
    narrow = DiffusionModel(nn.Identity(), EDM(sigma_min=0.1, sigma_max=0.5))
    with pytest.raises(InputError, match=r"0\.4 to 0\.6.*trained on 0\.1 to 0\.5"):
        LikelihoodMaximization(narrow)
    with pytest.raises(InputError, match="trained on"):
        LikelihoodMaximization(narrow, form="momentum")


def test_the_noise_of_a_seed_is_not_that_of_a_classifier_with_the_same_seed():
    seen: list[torch.Tensor] = []

    class Perfect(nn.Module):
        """Returns the image, so that nothing moves, and keeps the noise it saw."""

        def forward(self, x, sigma, y):
            seen.append((x / sigma.reshape(-1, 1, 1, 1))[0].detach())
            return x * 0

    image = torch.full((1, 1, 8, 8), 0.5)  # 0 in [-1, 1]
    model = DiffusionModel(Perfect(), Native(), classes=2, null_class=2)
    LikelihoodMaximization(model, steps=3, seed=0)(image)
    steps = list(seen)
    seen.clear()
    DiffusionClassifier(model, levels=LEVELS, seed=0, max_batch=1)(image)
    assert len(steps) == 3
    assert min(float((a - b).abs().max()) for a in steps for b in seen) > 0.1


def test_bfloat16_is_near_and_has_gradients():
    model, x = small_model(torch.float32), inner().float().requires_grad_()
    full, half = (
        LikelihoodMaximization(model, steps=3, eta=0.2, rate=0.01, seed=0, bf16=bf16)
        for bf16 in (False, True)
    )
    assert 0 < (half(x) - full(x)).abs().mean() < 0.002  # the first step of Adam is a sign
    (gradient,) = torch.autograd.grad(half(x).sum(), x)
    assert bool(torch.isfinite(gradient).all())
