"""Purification against a literal loop: values, gradients in every mode, and what they keep."""

from __future__ import annotations

import gc
import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from art_denoised import (
    DiffusionClassifier,
    LikelihoodMaximization,
    Purification,
    PurifiedClassifier,
    SmoothedClassifier,
)
from art_denoised.checks import InputError
from art_denoised.diffusion import DiffusionModel, LevelNoise, Native, noise_levels, preview_cost
from art_denoised.diffusion.cost import FlopCounter
from art_denoised.purification import DDIM
from art_denoised.purification.purification import State
from tests.rdc.test_classifier import Counting, images, small_model

SAMPLERS = ("ddpm", "ddim", "sde", "euler", "heun", "gdmp")
LEVELS = (0.3, 0.2)


def purification(**options) -> Purification:
    given = {"sigma": LEVELS, "steps": 3, "seed": 0, **options}
    return Purification(small_model(), **given)


def literal(x: torch.Tensor, purify: Purification) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the steps of the sampler make of images, and their distance along the path."""
    noise, number, distances = LevelNoise(purify.seed, stream=(2,)), 0, []

    def draw(k: int) -> torch.Tensor:
        return noise(x, range(len(x)), [number + k] * len(x))

    def denoise(u: torch.Tensor, sigma: float) -> torch.Tensor:
        return 2 * purify.model((u + 1) / 2, sigma / 2) - 1

    start = u = 2 * x - 1
    for i, sigma in enumerate(purify.sigmas):
        number = 2 * i * 2**20
        base, eps = u, draw(0)
        u = base + 2 * sigma * eps
        levels = purify.sampler.levels(2 * sigma, purify.steps, 0.002)
        for pair in pairwise(levels):
            number += 2
            u = purify.sampler.step(denoise, u, pair, [draw(0), draw(1)], start)
            abar = 1 / (1 + pair[1] ** 2)
            z, z_t = (abar**0.5 * state for state in (u, base + pair[1] * eps))
            distances.append(abar * (z - z_t).square().mean((1, 2, 3)))
    return (u + 1) / 2, torch.stack(distances).mean(0)


def gradient(function, x: torch.Tensor) -> torch.Tensor:
    leaf = x.clone().requires_grad_()
    weights = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).reshape(x.shape)
    return torch.autograd.grad((function(leaf) * weights).sum(), leaf)[0]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_values_and_exact_gradients_are_those_of_the_literal_loop(sampler):
    purify, x = purification(sampler=sampler), images()
    torch.testing.assert_close(purify(x), literal(x, purify)[0])
    expected = gradient(lambda x: literal(x, purify)[0], x)
    torch.testing.assert_close(gradient(purify, x), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("followed", [False, True])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_exact_gradients_are_those_of_finite_differences(sampler, followed):
    """Also of the distance along the path, which the second pass takes from its own start."""
    purify, x = purification(sampler=sampler), images()

    def value(x: torch.Tensor) -> torch.Tensor:
        with purify.following() as distances:
            purified = purify(x)
        return (distances[0] if followed else purified.sin()).sum()

    leaf = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(value(leaf), leaf)
    way, h = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).reshape(x.shape).cos(), 1e-6
    with torch.no_grad():
        slope = (value(x + h * way) - value(x - h * way)) / (2 * h)
    assert float((found * way).sum()) == pytest.approx(float(slope), rel=1e-6)


def test_bpda_is_the_identity_and_the_surrogate_a_shorter_run():
    x = images()
    weights = gradient(lambda x: x, x)
    exact, bpda, surrogate = (purification(gradient=g) for g in Purification.gradients)
    for other in (bpda, surrogate):
        assert torch.equal(other(x.clone().requires_grad_()), exact(x))
    assert torch.equal(gradient(bpda, x), weights)
    assert bpda.surrogate_steps == 1
    torch.testing.assert_close(gradient(surrogate, x), gradient(purification(steps=1), x))
    assert not torch.allclose(gradient(surrogate, x), gradient(exact, x), rtol=0.1)


@pytest.mark.parametrize("kind", [Purification, LikelihoodMaximization])
def test_an_unknown_way_of_taking_gradients_is_refused_whenever_it_is_set(kind):
    options = {"sigma": 0.2} if kind is Purification else {}
    purify = kind(small_model(), **options)
    for way in kind.gradients:
        purify.gradient = way
        assert purify.gradient == way
    with pytest.raises(InputError, match="Exact"):
        purify.gradient = "Exact"


def test_the_distance_along_the_path_is_a_mean_whatever_the_steps_and_passes():
    """In the value and in the gradient, that of the surrogate included."""

    def followed(**options) -> tuple[torch.Tensor, torch.Tensor]:
        leaf, purify = images().requires_grad_(), purification(**options)
        with purify.following() as outer, purify.following() as inner:
            purify(leaf)
        assert torch.equal(outer[0], inner[0])
        assert len(outer) == len(inner) == 1
        return outer[0], torch.autograd.grad(outer[0].sum(), leaf)[0]

    purify, start = purification(), 2 * images() - 1
    state, noise = State(start, start, torch.zeros(len(start))), LevelNoise(0, stream=(2,))
    for move in purify.moves(purify.steps):
        state = purify.move(state, start, move, noise)
    torch.testing.assert_close(followed()[0], state.deviation / 6)  # 2 passes of 3 steps
    torch.testing.assert_close(followed()[0], literal(images(), purify)[1])
    surrogate = followed(gradient="surrogate", surrogate_steps=1)[1]
    torch.testing.assert_close(surrogate, followed(steps=1)[1])


def test_a_sampler_that_draws_more_than_the_streams_hold_is_refused():
    class Greedy(DDIM):
        draws = 3

    with pytest.raises(InputError, match="3 times"):
        purification(sampler=Greedy())


@pytest.mark.parametrize("sampler", ["sde", "heun"])
def test_what_is_kept_grows_by_an_image_a_step(sampler):
    """The network's own activations are kept for one step at a time."""

    def kept(steps: int) -> int:
        pointers: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            pointers[storage.data_ptr()] = storage.nbytes()
            return tensor

        purify = purification(sampler=sampler, steps=steps, sigma=0.3)
        x = images().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            result = purify(x)
        assert result.requires_grad
        return sum(pointers.values())

    image = (images().numel() + len(images())) * 8  # and how far it strayed
    assert kept(23) - kept(3) == 20 * image


@pytest.mark.parametrize("seed", [None, 0])
def test_noise_of_the_steps_is_drawn_again_rather_than_kept(seed):
    """What is kept for the gradient holds the noise of the pass alone, whatever the steps."""

    def kept(steps: int) -> int:
        purify = purification(sampler="gdmp", steps=steps, sigma=0.3, seed=seed)
        result = purify(images(2).requires_grad_())
        assert result.requires_grad
        tensors = [one for one in gc.get_objects() if isinstance(one, torch.Tensor)]
        return sum(tensor.shape == (1, 8, 8) for tensor in tensors)

    assert kept(9) == kept(3)


def test_the_preview_is_the_cost_of_a_run():
    x = images(3, torch.float32)
    for gradient_name in Purification.gradients:
        for sampler in ("gdmp", "heun")[: 1 + (gradient_name == "exact")]:
            model = small_model(torch.float32)
            purify = Purification(
                model, sigma=0.3, steps=4, sampler=sampler, gradient=gradient_name, seed=0
            )
            net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
            defence = PurifiedClassifier(purify, net, copies=2)
            cost = preview_cost(defence, (1, 8, 8), images=3)
            with torch.no_grad(), FlopCounter() as forward:
                defence(x)
            with FlopCounter() as both:
                leaf = x.clone().requires_grad_()
                torch.autograd.grad(defence(leaf)[:, 3].sum(), leaf)
            assert cost.flop == forward.flop
            assert both.flop == pytest.approx(cost.gradient_flop, rel=0.01)
            model.network = counting = Counting(model.network)
            with torch.no_grad():
                defence(x)
            assert counting.rows == cost.nfe == defence.nfe(3)


def test_memory_in_the_preview_is_that_of_one_step_and_the_states():
    few, many = (preview_cost(purification(steps=s, sigma=0.3), (1, 8, 8)).memory for s in (5, 9))
    assert many - few == 4 * 64 * 8


def test_the_gradient_of_heun_s_step_keeps_two_evaluations_and_the_identity_none():
    def held(sampler: str, gradient: str) -> int:
        purify = purification(sampler=sampler, gradient=gradient, sigma=0.3)
        return preview_cost(purify, (1, 8, 8)).memory

    weights, states = held("ddpm", "bpda"), 4 * 64 * 8
    one, two = (held(name, "exact") - weights - states for name in ("ddpm", "heun"))
    assert two == 2 * one > 0


def test_a_seed_makes_it_a_function_of_each_image():
    purify, x = purification(), images(4)
    torch.testing.assert_close(purify(x)[2:3], purify(x[2:3]))
    assert torch.equal(purify.purify(x), purify(x))
    with torch.inference_mode():
        assert torch.equal(purify(x), purification()(x))
    purify.seed = None
    first = purify(x[:1].expand(2, -1, -1, -1))
    assert not torch.allclose(first[0], first[1])


def test_gradients_cannot_be_differentiated_again():
    x = images().requires_grad_()
    with pytest.raises(InputError, match="again"):
        torch.autograd.grad(purification()(x).sum(), x, create_graph=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sigma": None}, "sigma is None and t is None"),
        ({"t": 0.1}, "t is 0.1"),
        ({"sigma": ()}, "no noise levels"),
        ({"sigma": (0.1, 1e4)}, "10000"),
        ({"sigma": -0.1}, "-0.1"),
        ({"sampler": "euler-maruyama"}, "euler-maruyama"),
        ({"gradient": "adjoint"}, "adjoint"),
        ({"surrogate_steps": 4}, "surrogate_steps is 4"),
        ({"steps": 0}, "steps is 0"),
    ],
    ids=str,
)
def test_bad_input(options, words):
    with pytest.raises(InputError, match=words):
        purification(**options)


def test_models_that_cannot_purify():
    conditional = DiffusionModel(nn.Identity(), Native(), classes=3)
    with pytest.raises(InputError, match="null class"):
        Purification(conditional, sigma=0.1)

    class Broken(nn.Module):
        def forward(self, x, c_noise, y):
            return x * torch.nan

    with pytest.raises(InputError, match="NaN"):
        Purification(DiffusionModel(Broken(), Native()), sigma=0.1)(images())


@pytest.mark.parametrize(
    "build",
    [
        lambda: Purification(small_model(), t=0.1, steps=1, seed=0),
        lambda: LikelihoodMaximization(small_model(), steps=1, seed=0),
        lambda: DiffusionClassifier(small_model(), levels=noise_levels(1), seed=0),
        lambda: SmoothedClassifier(nn.Flatten(), sigma=0.25, samples=1),
    ],
    ids=["purification", "likelihood maximization", "diffusion classifier", "smoothing"],
)
@pytest.mark.filterwarnings("ignore:.*jit.trace.*:FutureWarning")
def test_what_draws_noise_on_the_host_is_not_traced(monkeypatch, build):
    """A traced purification with a seed gave another image in every call; fresh noise froze."""
    x, module = images(1), build()
    with pytest.raises(InputError, match="cannot be traced|tracing would freeze"):
        torch.jit.trace(module, x, check_trace=False)
    make_fx = SimpleNamespace(get_proxy_mode=lambda: object())  # whose module is slow to import
    monkeypatch.setitem(sys.modules, "torch.fx.experimental.proxy_tensor", make_fx)
    with pytest.raises(InputError, match="cannot be traced|tracing would freeze"):
        module(x)
