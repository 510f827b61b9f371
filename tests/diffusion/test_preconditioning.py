"""The conversions: one ideal network in all parameterisations is one and the same D."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from art_denoised.checks import InputError
from art_denoised.diffusion import DDPM, EDM, Flow, Native

S2 = 0.3  # variance of the images, which are Gaussian around 0: so E[x | z] is known
BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
ABAR = tuple((1 - BETAS).cumprod(0).tolist())


def posterior(x, sigma):
    return x * S2 / (S2 + sigma**2)


def abar_of(step):
    return torch.tensor(ABAR, dtype=torch.float64)[step]


# What each training would end in, derived from its own forward process and not from the code.
def eps_network(z, step):
    a = abar_of(step)
    return z * (1 - a).sqrt() / (a * S2 + 1 - a)  # E[eps | z]


def x0_network(z, step):
    a = abar_of(step)
    return z * a.sqrt() * S2 / (a * S2 + 1 - a)  # E[x | z]


def v_network(z, step):
    a = abar_of(step)
    return a.sqrt() * eps_network(z, step) - (1 - a).sqrt() * x0_network(z, step)


def flow_network(z, time):
    t = time / 1000  # z = (1 - t) x + t n
    total = (1 - t) ** 2 * S2 + t**2
    return z * t / total - z * (1 - t) * S2 / total  # E[n - x | z]


def edm_network(z, c_noise, sigma_data=0.5):
    """Karras et al., equation 8: the target is (x - c_skip x_noisy) / c_out."""
    sigma = (4 * c_noise).exp()
    total = sigma**2 + sigma_data**2
    x = z * total.sqrt()
    return (posterior(x, sigma) - x * sigma_data**2 / total) * total.sqrt() / (sigma * sigma_data)


KINDS = {
    "eps": (DDPM(ABAR), eps_network),
    "v": (DDPM(ABAR, "v_prediction"), v_network),
    "x0": (DDPM(ABAR, "sample"), x0_network),
    "flow": (Flow(), flow_network),
    "edm": (EDM(), edm_network),
    "native": (Native(), posterior),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("step", [0, 3, 100, 500, 900, 999])
def test_every_preconditioning_gives_the_posterior_mean(name, step):
    preconditioning, network = KINDS[name]
    sigma = ((1 - abar_of(step)) / abar_of(step)).sqrt()  # a level of the grid: matched noise
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    c_skip, c_out, c_in, c_noise = preconditioning.at(sigma)
    x_hat = c_skip * x + c_out * network(c_in * x, c_noise)
    torch.testing.assert_close(x_hat, posterior(x, sigma), rtol=1e-9, atol=1e-12)


@given(st.floats(0.011, 150))
def test_the_conservative_level_is_the_smallest_that_is_not_below(sigma):
    ddpm = DDPM(ABAR)
    level = ddpm.at_least(sigma)
    grid = sorted(((1 - a) / a) ** 0.5 for a in ABAR)
    assert level >= sigma
    assert level == pytest.approx(next(g for g in grid if g >= sigma), rel=1e-12)
    step = int(ddpm.at(torch.tensor(level, dtype=torch.float64)).c_noise)
    assert ((1 - ABAR[step]) / ABAR[step]) ** 0.5 == pytest.approx(level)


def test_levels_beyond_the_training_are_refused():
    for one, _ in KINDS.values():
        assert one.at_least(one.sigma_min / 2) == pytest.approx(one.sigma_min)
        assert one.at_least(one.sigma_max) == one.sigma_max
        with pytest.raises(InputError, match="smaller sigma"):
            one.at_least(one.sigma_max * 1.01)


def test_a_level_of_the_training_is_its_own_conservative_level():
    ddpm = DDPM(ABAR)
    for sigma in ddpm.sigmas[::100].tolist():
        assert ddpm.at_least(sigma) == sigma


def test_flow_reaches_from_the_second_time_to_the_last_but_one():
    """t of 1000 steps of diffusers; at t = 1 there is no image left."""
    assert Flow().sigma_max == pytest.approx(0.999 / (1 - 0.999))
    assert Flow().sigma_min == pytest.approx(0.001 / (1 - 0.001), rel=2e-3)
    assert DDPM((1.0, 0.5)).sigma_min == 0


def test_the_nearest_step_is_told():
    ddpm = DDPM(ABAR)
    sigma = ((1 - abar_of(torch.arange(1000))) / abar_of(torch.arange(1000))).sqrt()
    assert torch.equal(ddpm.at(sigma).c_noise, torch.arange(1000))
    assert torch.equal(ddpm.at(sigma * 1.0001).c_noise, torch.arange(1000))


@pytest.mark.parametrize("abar", [(), (0.9, 0.5, 0.6), (0.9, 0.5, 0.5), (1.1, 0.5), (0.5, 0.0)])
def test_bad_schedules(abar):
    with pytest.raises(InputError, match="alphas_cumprod"):
        DDPM(abar)
    with pytest.raises(InputError, match="prediction is 'x'"):
        DDPM(ABAR, "x")  # type: ignore[arg-type]


def test_defaults_are_those_of_table_1_and_of_diffusers():
    assert EDM() == EDM(sigma_data=0.5, sigma_min=0.002, sigma_max=80.0)
    assert Native() == Native(sigma_min=0.002, sigma_max=80.0)
    assert Flow() == Flow(time_scale=1000.0, sigma_min=0.001, sigma_max=999.0)


@pytest.mark.parametrize(
    ("make", "value"),
    [
        (lambda: EDM(sigma_data="0.5"), "sigma_data is '0.5'"),
        (lambda: EDM(sigma_data=0), "sigma_data is 0"),
        (lambda: EDM(sigma_min=float("nan")), "sigma_min is nan"),
        (lambda: EDM(sigma_min=1, sigma_max=0.5), "sigma_max 0.5"),
        (lambda: Flow(time_scale=-1), "time_scale is -1"),
        (lambda: Flow(sigma_min=-0.1), "sigma_min is -0.1"),
        (lambda: Native(sigma_min=2, sigma_max=2), "sigma_max 2"),
    ],
)
def test_bad_noise_levels(make, value):
    with pytest.raises(InputError, match=re.escape(value)):
        make()


def test_a_schedule_is_not_printed():
    assert repr(DDPM(ABAR, "v_prediction")) == "DDPM(prediction='v_prediction')"
