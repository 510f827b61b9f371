"""Steps agree with the schedulers of diffusers, with DiffPure's formula and with closed forms."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, HeunDiscreteScheduler

from art_denoised.checks import InputError
from art_denoised.purification import DDIM, Guided, Heun, ReverseSDE, vp_sigma, vp_time
from art_denoised.purification.purification import named_sampler

SHAPE = (2, 1, 4, 4)


def normal(seed: int, shape=SHAPE) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def network(z: torch.Tensor) -> torch.Tensor:
    """Noise that depends on the state, not linearly."""
    return torch.tanh(0.7 * z + 0.1)


def denoise(u: torch.Tensor, sigma: float) -> torch.Tensor:
    return u - sigma * network(u / math.sqrt(1 + sigma**2))


def sigma_of(scheduler, t: int) -> float:
    abar = float(scheduler.alphas_cumprod[t]) if t >= 0 else 1.0
    return math.sqrt((1 - abar) / abar)


def vp(u: torch.Tensor, sigma: float) -> torch.Tensor:
    return u / math.sqrt(1 + sigma**2)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_is_that_of_diffusers(eta):
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(20)
    u = sigma_of(scheduler, 950) * normal(0)
    for i, t in enumerate(scheduler.timesteps.tolist()):
        levels, n = (sigma_of(scheduler, t), sigma_of(scheduler, t - 50)), normal(i + 1)
        z = vp(u, levels[0])
        theirs = scheduler.step(network(z), t, z, eta=eta, variance_noise=n).prev_sample
        u = DDIM(eta).step(denoise, u, levels, [n], u)
        torch.testing.assert_close(vp(u, levels[1]), theirs, rtol=1e-5, atol=1e-5)  # abar: float32


def test_eta_one_is_the_ancestral_sampling_of_diffusers():
    scheduler = DDPMScheduler(clip_sample=False, variance_type="fixed_small")
    scheduler.set_timesteps(20)
    u = sigma_of(scheduler, 950) * normal(0)
    for i, t in enumerate(scheduler.timesteps.tolist()):
        levels, n = (sigma_of(scheduler, t), sigma_of(scheduler, t - 50)), normal(i + 1)
        z, same = vp(u, levels[0]), torch.Generator().manual_seed(i + 1)
        theirs = scheduler.step(network(z), t, z, generator=same).prev_sample
        u = DDIM(1.0).step(denoise, u, levels, [n], u)
        torch.testing.assert_close(vp(u, levels[1]), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # of numpy 2 about conversions in diffusers
def test_heun_is_that_of_diffusers_at_the_levels_of_edm():
    scheduler = HeunDiscreteScheduler(use_karras_sigmas=True)
    scheduler.set_timesteps(8)
    high, low = float(scheduler.sigmas[0]), float(scheduler.sigmas[-2])
    levels = Heun().levels(high, 8, low)
    their_levels = scheduler.sigmas[[0, *range(1, 16, 2)]].tolist()
    assert levels == pytest.approx(their_levels, rel=1e-5)
    ours = theirs = high * normal(0)
    for t in scheduler.timesteps:
        z = scheduler.scale_model_input(theirs, t)
        theirs = scheduler.step(network(z), t, theirs).prev_sample
    for pair in pairwise(levels):
        ours = Heun().step(denoise, ours, pair, (), ours)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_reverse_sde_is_the_euler_maruyama_step_of_diffpure():
    t, dt = 0.15, 0.01
    levels, u, n = (vp_sigma(t), vp_sigma(t - dt)), normal(0), normal(1)
    z, beta = vp(u, levels[0]), 0.1 + 19.9 * t
    abar = math.exp(-0.5 * 19.9 * t**2 - 0.1 * t)
    score = -network(z) / math.sqrt(1 - abar)
    drift = -0.5 * beta * z - beta * score
    expected = z - drift * dt + math.sqrt(beta * dt) * n
    found = ReverseSDE().step(denoise, u, levels, [n], u)
    torch.testing.assert_close(vp(found, levels[1]), expected)


def test_guidance_is_the_gradient_of_the_squared_distance():
    levels, u, image, noise = (0.8, 0.6), normal(0), normal(1), [normal(2), normal(3)]
    z = vp(u, 0.8).requires_grad_()
    reference = vp(image + 0.8 * noise[1], 0.8)
    (pull,) = torch.autograd.grad(-0.5 * (z - reference).square().sum(), z)
    abar, abar_after = 1 / 1.64, 1 / 1.36
    variance = (1 - abar_after) / (1 - abar) * (1 - abar / abar_after)  # Ho et al., equation 7
    plain = DDIM(1.0).step(denoise, u, levels, noise[:1], image)
    expected = vp(plain, 0.6) + 3 * 0.8 * variance * pull
    torch.testing.assert_close(
        vp(Guided(3.0).step(denoise, u, levels, noise, image), 0.6), expected
    )


def test_guidance_of_scale_0_is_ddpm():
    pair, u, noise = (0.8, 0.6), normal(0), [normal(2), normal(3)]
    pulled = Guided(0).step(denoise, u, pair, noise, normal(1))
    assert torch.equal(pulled, DDIM(1.0).step(denoise, u, pair, noise[:1], u))


SIGMA = 1.2
TURN = torch.linalg.qr(normal(7, (2, 2)))[0]


def matrix(*values: float) -> torch.Tensor:
    """Return the symmetric matrix with these eigenvalues."""
    return TURN @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ TURN.T


V = (0.3, 1.5)  # eigenvalues of the covariance C of the data
MU, X = torch.tensor([[-0.2, 0.1], [0.9, -1.0]], dtype=torch.float64)
KEPT = matrix(*(v / (v + SIGMA**2) for v in V))
ROOT = matrix(*((v / (v + SIGMA**2)) ** 0.5 for v in V))
FORMS = {
    "posterior": (KEPT, matrix(*V) @ (torch.eye(2) - KEPT) + SIGMA**2 * KEPT @ KEPT),
    "flow": (ROOT, SIGMA**2 * KEPT),
}


def posterior_mean(u: torch.Tensor, sigma: float) -> torch.Tensor:
    return MU + (u - MU) @ matrix(*(v / (v + sigma**2) for v in V))


@pytest.mark.parametrize(
    ("sampler", "form"),
    [
        (DDIM(1.0), "posterior"),  # a sample of the posterior of x given the noised image
        (ReverseSDE(), "posterior"),
        (DDIM(0.0), "flow"),  # which maps N(mu, C + sigma^2) to N(mu, C)
        (DDIM(0.0, "edm"), "flow"),
        (Heun(), "flow"),
    ],
    ids=str,
)
def test_purified_gaussians_have_the_mean_and_covariance_of_the_closed_form(sampler, form):
    share, covariance = FORMS[form]
    u = X + SIGMA * normal(0, (10_000, 2))
    for i, pair in enumerate(pairwise(sampler.levels(SIGMA, 200, 0.002))):
        noise = [normal(i + 1, (10_000, 2))]
        u = sampler.step(posterior_mean, u, pair, noise, u)
    torch.testing.assert_close(u.mean(0), MU + share @ (X - MU), atol=0.03, rtol=0)
    torch.testing.assert_close(u.T.cov(), covariance, atol=0.03, rtol=0.05)


@pytest.mark.parametrize(
    ("sampler", "draws"),
    [(DDIM(), 1), (DDIM(0.4), 1), (DDIM(0.0), 0), (Heun(), 0), (ReverseSDE(), 1), (Guided(), 2)],
    ids=str,
)
def test_a_step_takes_as_many_draws_as_the_sampler_says(sampler, draws):
    assert sampler.draws == draws
    seen = [normal(i) for i in range(draws)]
    u = sampler.step(denoise, normal(8), (0.8, 0.6), seen, normal(9))
    for i in range(draws):
        other = [n + (i == k) for k, n in enumerate(seen)]
        assert not torch.equal(sampler.step(denoise, normal(8), (0.8, 0.6), other, normal(9)), u)


def test_by_default_ddim_is_ancestral_and_guidance_is_that_of_gdmp_in_batches_of_100():
    """Its 20 is the number of 19, rounded: of 100 images of 3 x 32 x 32 pixels."""
    assert (DDIM().eta, DDIM().spacing, Guided().scale) == (1.0, "time", 20.0)


def test_time_and_noise_level_are_inverse():
    assert vp_time(vp_sigma(0.37)) == pytest.approx(0.37)
    assert ReverseSDE().levels(vp_sigma(0.4), 4, 0.0) == pytest.approx(
        [*map(vp_sigma, (0.4, 0.3, 0.2, 0.1)), 0]
    )


def test_levels_of_edm_end_at_half_of_a_level_that_is_close_to_the_lowest():
    assert Heun().levels(0.003, 2, 0.002) == pytest.approx((0.003, 0.0015, 0))
    assert Heun().levels(0.5, 2, 0.002) == pytest.approx((0.5, 0.002, 0))


def test_bad_input():
    for make, value in ((lambda: DDIM(1.5), "1.5"), (lambda: Guided(-1), "-1")):
        with pytest.raises(InputError, match=value):
            make()
    with pytest.raises(InputError, match="t is 2"):
        vp_sigma(2)


def test_a_sampler_by_name_has_the_values_of_its_paper():
    assert named_sampler("ddim") == DDIM(0.0)  # no fresh noise in its steps
    assert named_sampler("ddpm") == DDIM(1.0)
    assert named_sampler("euler") == DDIM(0.0, "edm")
    assert named_sampler("gdmp").scale == 20.0
