"""Likelihood maximization: likelier, within its ball, and with the gradient it says; and RDC."""

from __future__ import annotations

import weakref
from statistics import NormalDist

import pytest
import torch
from torch import nn

from art_denoised import DiffusionClassifier, LikelihoodMaximization
from art_denoised.checks import InputError
from art_denoised.data import digits
from art_denoised.demo import digits_diffusion
from art_denoised.diffusion import EDM, DiffusionModel, LevelNoise, Levels, Native, preview_cost
from art_denoised.models.cost import saved, weights
from art_denoised.rdc import RDC, Adam, Momentum
from art_denoised.rdc.likelihood import State
from art_denoised.types import GradientModes, Purifies, Seeded
from tests.rdc.test_classifier import LEVELS, Counting, Nan, images, small_model

SLOW, MOMENTUM = Adam(lr=0.01), Momentum(LEVELS)
ONE_LEVEL = Momentum(Levels((0.5,), (1.0,)))
FORMS = pytest.mark.parametrize("form", ["adam", "adam_reference", MOMENTUM], ids=str)


def maximize(**options) -> LikelihoodMaximization:
    defaults = {"steps": 3, "eta": 0.2, "seed": 0}
    return LikelihoodMaximization(small_model(), **{**defaults, **options})


def inner(n: int = 2) -> torch.Tensor:
    """Images far from 0 and 1, where the clamps have no kinks."""
    return 0.4 + 0.2 * images(n)


class Linear(nn.Module):
    """D(x_noisy) = slope x_noisy + target in [-1, 1]; keeps the noise levels that it was told."""

    def __init__(self, target, slope=0.0):
        super().__init__()
        self.slope, self.sigmas = slope, []
        self.target = torch.tensor(target, dtype=torch.float64).reshape(1, 1, 1, 2)

    def forward(self, x, sigma, y):
        self.sigmas.append(float(sigma[0]))
        return self.slope * x + self.target


def two_pixels(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).reshape(1, 1, 1, 2)


@pytest.mark.parametrize("form", [Adam(0.05), Adam(0.05, project=False), Adam(0.004)], ids=str)
def test_adam_is_that_of_torch(form):
    """torch.optim.Adam on the mean squared error in [-1, 1], as in the reference code."""
    network, start, eta, steps = Linear((0.9, -0.3), slope=0.4), two_pixels(0.5, 0.2), 0.06, 4
    model = DiffusionModel(network, Native())
    x_hat = LikelihoodMaximization(model, steps=steps, eta=eta, form=form, seed=0)(start)
    sigmas, noise = list(network.sigmas), LevelNoise(0, stream=(1,))
    # Uniform in [0.4, 0.6]: the distribution function of a number that is no noise of the step.
    drawn = [noise(start, [0], [2 * step + 1])[0, 0, 0, 0] for step in range(steps)]
    assert sigmas == pytest.approx([0.4 + 0.2 * NormalDist().cdf(float(eps)) for eps in drawn])

    x = start.clone().requires_grad_()
    # The gradient in [0, 1] is twice that in [-1, 1], which only the epsilon of Adam sees.
    optimizer = torch.optim.Adam([x], lr=form.lr)
    for step, sigma in enumerate(sigmas):
        z = 2 * x - 1
        x_noisy = z + sigma * noise(start, [0], [2 * step])
        loss = nn.functional.mse_loss(network(x_noisy, torch.tensor([sigma]), None), z)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if form.project:
            with torch.no_grad():
                x.copy_(torch.minimum(torch.maximum(x, start - eta), start + eta).clamp(0, 1))
    torch.testing.assert_close(x_hat, x.detach().clamp(0, 1), rtol=1e-9, atol=1e-12)


def test_momentum_by_hand():
    """Three steps of 0.02; targets 0.52 and 0.3, so the gradient is along x less the target.

    g / |g| is (-1, 10) / 11, then (0, 1), then (1, 8) / 9; its sums are (-1/11, 10/11), (-1/11,
    21/11) and (2/99, 277/99). Without momentum the first pixel would end at 0.5 or 0.52 otherwise.
    """
    network = Linear((2 * 0.52 - 1, 2 * 0.3 - 1))
    form = Momentum(Levels((0.5,), (3.0,)))
    lm = LikelihoodMaximization(DiffusionModel(network, Native()), steps=2, eta=0.04, form=form)
    torch.testing.assert_close(lm(two_pixels(0.5, 0.5)), two_pixels(0.54, 0.46))
    lm = LikelihoodMaximization(DiffusionModel(network, Native()), steps=3, eta=0.06, form=form)
    torch.testing.assert_close(lm(two_pixels(0.5, 0.5)), two_pixels(0.52, 0.44))


def test_momentum_is_kept_in_the_range_at_each_step_and_stays_where_there_is_no_gradient():
    """The first pixel goes below 0, back to 0, and up as its momentum goes from 1 to 0 and -1."""
    network = Linear((2 * 0.005 - 1, 0.0))
    form = Momentum(Levels((0.5,), (1.0,)))
    lm = LikelihoodMaximization(DiffusionModel(network, Native()), steps=3, eta=0.06, form=form)
    torch.testing.assert_close(lm(two_pixels(0.01, 0.5)), two_pixels(0.02, 0.5))


def test_momentum_sums_all_levels_with_their_weights_and_their_noise():
    """Sixteen images, of which some pixels go up and others down; gradients by hand."""
    levels, slope, steps, eta = Levels((0.3, 0.5, 0.9), (3.0, 0.5, 1.0)), 0.4, 3, 0.09
    network, noise = Linear((0.3, -0.2), slope=slope), LevelNoise(0, stream=(1,))
    start = 0.2 + 0.6 * torch.rand(
        16, 1, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    x, m = start, torch.zeros_like(start)
    for _ in range(steps):
        z, g = 2 * x - 1, torch.zeros_like(x)
        for level, (sigma, weight) in enumerate(zip(levels.sigmas, levels.weights, strict=True)):
            eps = noise(start, [0], [level])
            residual = slope * (z + sigma * eps) + network.target - z
            g = g + weight * (slope - 1) * residual
        m = m + g / g.abs().sum((1, 2, 3), keepdim=True)
        x = x - eta / steps * m.sign()
    assert 0 < int((x > start).sum()) < x.numel()
    lm = LikelihoodMaximization(
        DiffusionModel(network, Native()), steps=steps, eta=eta, form=Momentum(levels), seed=0
    )
    torch.testing.assert_close(lm(start), x, rtol=0, atol=1e-6)  # sigma is float32


def test_by_default_there_are_five_steps_and_momentum_takes_32_levels():
    for form, nfe in (("adam", 5), ("adam_reference", 5), ("momentum", 5 * 32)):
        assert LikelihoodMaximization(small_model(), form=form).nfe() == nfe


def test_the_reference_leaves_the_ball_and_ours_does_not():
    """At the default eta: five steps of 0.05 in one direction, and 8 / 255."""
    model, start = DiffusionModel(Linear((1.0, -1.0)), Native()), two_pixels(0.5, 0.1)
    moved = {
        form: (LikelihoodMaximization(model, form=form, seed=0)(start) - start).flatten().tolist()
        for form in ("adam", "adam_reference")
    }
    assert moved["adam"] == pytest.approx([8 / 255, -8 / 255])
    assert moved["adam_reference"] == pytest.approx([0.246, -0.1], abs=0.001)  # clipped at 0


def agrees_with_finite_differences(module, x, head=None) -> None:
    def value(x):
        return (module(x) * weights).sum() if head is None else head(module(x))

    def draw(seed):
        return torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(seed))

    weights, step, h = draw(1), draw(2), 1e-7
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(leaf), leaf)
    with torch.no_grad():
        up, down = (float(value(x + s * h * step)) for s in (1, -1))
    assert float((gradient * step).sum()) == pytest.approx((up - down) / (2 * h), rel=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_exact_gradients_agree_with_finite_differences(steps):
    agrees_with_finite_differences(maximize(steps=steps, form=SLOW), inner())


@FORMS
def test_exact_gradients_agree_where_the_projection_is_active(form):
    """Some pixels at the bounds of the ball, some at those of [0, 1], some at none."""
    x, eta = images(3), 0.07
    lm = maximize(form=form, eta=eta)
    x_hat = lm(x)
    inside = (x_hat > 0) & (x_hat < 1)
    assert 0 < int(inside.sum()) < inside.numel()
    if form != "adam_reference":
        at_ball = ((x_hat - x).abs() - eta).abs() < 1e-9
        assert 0 < int((at_ball & inside).sum()) < int(inside.sum())
    agrees_with_finite_differences(lm, x)


def test_gradients_of_both_in_sequence_agree_with_finite_differences():
    rdc = nn.Sequential(
        maximize(form=SLOW), DiffusionClassifier(small_model(), levels=LEVELS, seed=1)
    )
    agrees_with_finite_differences(rdc, inner(), lambda z: z.log_softmax(1)[:, 4].sum())


def test_second_derivatives_are_refused_not_wrong():
    x = inner().requires_grad_()
    with pytest.raises(InputError, match="create_graph"):
        torch.autograd.grad(maximize()(x).sum(), x, create_graph=True)


def test_bpda_is_the_identity_and_not_the_gradient():
    x = inner().requires_grad_()
    weights = torch.randn(x.shape, dtype=x.dtype)
    exact, bpda = (
        torch.autograd.grad((maximize(gradient=how)(x) * weights).sum(), x)[0]
        for how in ("exact", "bpda")
    )
    assert torch.equal(bpda, weights)
    assert not torch.allclose(exact, bpda, rtol=0.01)
    assert torch.equal(
        maximize(gradient="exact")(x).detach(), maximize(gradient="bpda")(x).detach()
    )


@pytest.mark.parametrize("form", ["adam", MOMENTUM], ids=str)
def test_it_stays_in_the_ball_and_in_the_range(form):
    x = images(4)
    x_hat = maximize(form=form, eta=0.05, steps=5)(x)
    assert (x_hat - x).abs().max() <= 0.05 + 1e-12
    assert x_hat.min() >= 0
    assert x_hat.max() <= 1
    assert (x_hat != x).any()


@pytest.mark.parametrize("form", ["adam", "adam_reference", "momentum"])
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
        x_hat = maximize()(x)
        assert not torch.is_grad_enabled()
    lm = maximize()
    with torch.inference_mode():
        assert torch.equal(lm(x * 1.0), x_hat)
    assert not x_hat.requires_grad
    assert torch.equal(x_hat, maximize()(x))


def test_memory_does_not_grow_with_steps():
    """Each step is taken again in the backward pass, and nothing else: no graph is kept."""

    def kept(steps):
        alive = weakref.WeakSet()

        class Held:
            def __init__(self, tensor):
                self.tensor = tensor
                alive.add(self)

        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
            x_hat = maximize(steps=steps)(inner(2).requires_grad_())
        assert x_hat.requires_grad
        return sum(held.tensor.numel() for held in alive)

    assert 0 < kept(4) - kept(1) <= 3 * 3 * inner(2).numel()  # a step takes that of three batches
    lm = maximize(steps=4)
    lm.model.network = counting = Counting(lm.model.network)
    x = inner(2).requires_grad_()
    y = lm(x)
    assert counting.rows == 4 * 2
    y.sum().backward()
    assert counting.rows == 2 * 4 * 2


@pytest.mark.parametrize("form", ["adam", "adam_reference", ONE_LEVEL], ids=str)
@pytest.mark.parametrize(("gradient", "states"), [("exact", 4), ("bpda", 1)])
def test_memory_is_that_of_a_step_and_of_states(form, gradient, states):
    """Image, momentum and second moment, in float64: of each step for exact gradients."""
    model = small_model()
    one, four = (
        LikelihoodMaximization(model, steps=steps, form=form, gradient=gradient) for steps in (1, 4)
    )
    leaf, zero = images(1).requires_grad_(), torch.zeros_like(images(1))

    def step() -> None:
        one.step(leaf, State(leaf, zero, zero), 0, LevelNoise(0), gradient == "exact")

    expected = weights(four) + saved(step, four) + states * 3 * 64 * 8
    assert preview_cost(four, (1, 8, 8)).memory == expected


def test_levels_of_momentum_are_evaluated_one_after_another():
    one, three = (
        preview_cost(LikelihoodMaximization(small_model(), form=form), (1, 8, 8))
        for form in (ONE_LEVEL, Momentum(LEVELS))
    )
    assert (three.nfe, three.memory) == (3 * one.nfe, one.memory)


def test_memory_counts_what_keeps_the_image_in_bounds():
    """In float64, half as much again for temporaries.

    The ball keeps what each of its bounds compares, two images each; [0, 1] keeps one, in the
    reference's last step too.
    """
    ball, reference = (
        preview_cost(LikelihoodMaximization(small_model(), form=form, seed=0), (1, 8, 8)).memory
        for form in ("adam", "adam_reference")
    )
    assert ball - reference == 1.5 * 4 * 64 * 8


def test_fixed_and_fresh_noise():
    x = inner()
    before = torch.get_rng_state()
    assert torch.equal(maximize(seed=5)(x), maximize(seed=5)(x))
    assert not torch.equal(maximize(seed=None)(x), maximize(seed=None)(x))
    assert torch.allclose(maximize(seed=5)(x[:1]), maximize(seed=5)(x)[:1])
    assert torch.equal(before, torch.get_rng_state())


def test_bad_input():
    model = DiffusionModel(small_model().network, EDM(), classes=10)
    with pytest.raises(InputError, match="no null class"):
        LikelihoodMaximization(model)
    for bad in ({"form": "sgd"}, {"gradient": "none"}, {"steps": 0}, {"eta": 0}, {"seed": -1}):
        with pytest.raises(InputError, match=f"{next(iter(bad))} is"):
            maximize(**bad)
    with pytest.raises(InputError, match="lr is -1"):
        Adam(lr=-1)
    for wrong, words in ((2 * images() - 1, "rescale"), (255 * images(), "divide by 255")):
        with pytest.warns(UserWarning, match=words):
            LikelihoodMaximization(small_model())(wrong)
    for x in (images(), images().requires_grad_()):
        with pytest.raises(InputError, match="NaN"):
            LikelihoodMaximization(DiffusionModel(Nan(), Native()))(x)


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
        LikelihoodMaximization(model, steps=3, eta=0.2, form=SLOW, seed=0, bf16=bf16)
        for bf16 in (False, True)
    )
    assert 0 < (half(x) - full(x)).abs().mean() < 0.002  # the first step of Adam is a sign
    default = LikelihoodMaximization(model, steps=3, eta=0.2, form=SLOW, seed=0)
    assert torch.equal(default(x), full(x))
    (gradient,) = torch.autograd.grad(half(x).sum(), x)
    assert bool(torch.isfinite(gradient).all())


@FORMS
def test_an_empty_batch_stays_empty(form):
    assert maximize(form=form)(torch.rand(0, 1, 8, 8)).shape == (0, 1, 8, 8)


@pytest.mark.parametrize("gradient", ["exact", "bpda"])
def test_it_runs_compiled(gradient):
    lm, x = maximize(gradient=gradient), inner()
    compiled, leaf = torch.compile(lm, backend="eager"), x.clone().requires_grad_()
    compiled(leaf).sum().backward()
    assert torch.isfinite(leaf.grad).all()
    torch.testing.assert_close(compiled(x), lm(x))


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
