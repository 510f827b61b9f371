"""Schedulers of diffusers: their own x0 at matched noise, or a refusal that names the key."""

from __future__ import annotations

import inspect
import json

import diffusers
import pytest
import torch

from art_denoised.checks import InputError
from art_denoised.denoisers import OneShotDenoiser
from art_denoised.diffusion import load_diffusion
from art_denoised.diffusion.folders import (
    FLOW_MATCHING,
    KNOWN_KEYS,
    VARIANCE_EXPLODING,
    VARIANCE_PRESERVING,
)
from tests.diffusion.test_model import save, unet

pytestmark = pytest.mark.filterwarnings("ignore:__array_")  # diffusers with numpy 2
X = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
EPS = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def rewrite(folder, **changes) -> None:
    """Change keys of a saved scheduler; None as name of a key's value removes it."""
    path = folder / "scheduler_config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def own_estimate(name: str, network, step: int, **options):
    """The clean images that a scheduler itself estimates at a step, and the noise level there."""
    scheduler = getattr(diffusers, name)(**options)
    abar = scheduler.alphas_cumprod[step]
    sigma = ((1 - abar) / abar).sqrt()
    sample = 2 * X - 1 + sigma * EPS
    output = network(abar.sqrt() * sample, step).sample
    if hasattr(scheduler, "convert_model_output"):  # multistep solvers, of order sigma
        scheduler.set_timesteps(1000)
        scheduler._step_index = int((scheduler.timesteps - step).abs().argmin())
        x0 = scheduler.convert_model_output(output, sample=abar.sqrt() * sample)
    elif hasattr(scheduler, "init_noise_sigma") and hasattr(scheduler, "scale_model_input"):
        scheduler.set_timesteps(1000)
        scaled = abar.sqrt() * sample
        if getattr(scheduler, "sigmas", None) is not None:
            scaled = sample
        x0 = scheduler.step(output, scheduler.timesteps[999 - step], scaled).pred_original_sample
    return x0, float(sigma) / 2


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DDPMScheduler", {"clip_sample": False}),
        ("DDIMScheduler", {"clip_sample": False, "beta_schedule": "squaredcos_cap_v2"}),
        ("DDIMParallelScheduler", {"clip_sample": False, "beta_schedule": "scaled_linear"}),
        ("EulerDiscreteScheduler", {}),
        ("EulerAncestralDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", {}),
        ("UniPCMultistepScheduler", {}),
    ],
)
@torch.no_grad()
def test_x0_is_the_scheduler_s_own(tmp_path, name, options, prediction):
    network, step = unet(), 400
    options = {**options, "prediction_type": prediction}
    save(tmp_path, network, getattr(diffusers, name)(**options))
    x0, sigma = own_estimate(name, network, step, **options)
    x_hat = load_diffusion(tmp_path)(X + sigma * EPS, sigma)
    torch.testing.assert_close(2 * x_hat - 1, x0, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_the_old_key_of_the_prediction_is_read(tmp_path):
    network = unet()
    save(tmp_path, network, diffusers.DDPMScheduler(prediction_type="sample"))
    expected = load_diffusion(tmp_path)(X, 0.25)
    rewrite(tmp_path, predict_epsilon=False, prediction_type=...)
    assert torch.equal(load_diffusion(tmp_path)(X, 0.25), expected)
    rewrite(tmp_path, predict_epsilon=True)
    assert not torch.equal(load_diffusion(tmp_path)(X, 0.25), expected)
    rewrite(tmp_path, predict_epsilon=False, prediction_type="epsilon")
    with pytest.raises(InputError, match="predict_epsilon is False but prediction_type is 'epsilo"):
        load_diffusion(tmp_path)


@torch.no_grad()
def test_clipping_of_samples_is_that_of_the_one_shot_denoiser(tmp_path):
    network = unet()
    save(tmp_path, network, diffusers.DDIMScheduler())
    x0, sigma = own_estimate("DDIMScheduler", network, 400)
    level = sigma * (1 - 1e-5)  # rounding would lead to the next step
    x_hat = OneShotDenoiser(load_diffusion(tmp_path))(X + sigma * EPS, level)
    torch.testing.assert_close(2 * x_hat - 1, x0, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("DDPM", {"clip_sample_range": 2.0}, "clip_sample_range is 2.0"),
        ("DDPM", {"clip_sample": ..., "clip_sample_range": 2.0}, "clip_sample_range is 2.0"),
        ("DDPM", {"thresholding": True}, "thresholding is True"),
        ("DDPM", {"beta_schedule": "cosine"}, "beta_schedule is 'cosine', which DDPMScheduler"),
        ("DDPM", {"prediction_type": "flow_prediction"}, "prediction_type is 'flow_prediction'"),
        ("DDPM", {"new_key": 3}, "new_key is 3, which is not known"),
        ("DPMSolverMultistep", {"use_flow_sigmas": True}, "use_flow_sigmas is True"),
        ("EulerDiscrete", {"timestep_type": "continuous"}, "timestep_type is 'continuous'"),
        ("EDMDPMSolverMultistep", {"thresholding": True}, "thresholding is True"),
        ("FlowMatchEulerDiscrete", {"invert_sigmas": True}, "invert_sigmas is True"),
        ("FlowMatchLCM", {}, "consistency model"),
        ("TCD", {}, "consistency model"),
        ("LCM", {}, "consistency model"),
        ("IPNDM", {}, "IPNDMScheduler, which is not supported"),
        ("SCM", {}, "SCMScheduler, which is not supported"),
    ],
)
def test_what_changes_x0_is_refused_by_name(tmp_path, name, changes, words):
    save(tmp_path, unet(), getattr(diffusers, f"{name}Scheduler")())
    rewrite(tmp_path, **changes)
    with pytest.raises(InputError, match=words) as caught:
        load_diffusion(tmp_path)
    assert "damaged" not in str(caught.value)


@pytest.mark.parametrize("name", [*VARIANCE_PRESERVING, *VARIANCE_EXPLODING, *FLOW_MATCHING])
def test_every_key_of_every_scheduler_is_known(name):
    keys = set(inspect.signature(getattr(diffusers, name).__init__).parameters)
    keys -= {"self", "args", "kwargs"}
    assert keys <= KNOWN_KEYS


@pytest.mark.parametrize("name", [*VARIANCE_PRESERVING, *VARIANCE_EXPLODING, *FLOW_MATCHING])
def test_defaults_of_every_scheduler_are_accepted(tmp_path, name):
    try:
        scheduler = getattr(diffusers, name)()
    except ImportError:
        pytest.skip(f"{name} needs a package that is not installed")
    save(tmp_path, unet(), scheduler)
    assert torch.isfinite(load_diffusion(tmp_path)(X, 0.25)).all()


def test_flow_matching_has_a_thousand_times_by_default(tmp_path):
    save(tmp_path, unet(), diffusers.FlowMatchEulerDiscreteScheduler())
    rewrite(tmp_path, num_train_timesteps=...)
    assert load_diffusion(tmp_path).preconditioning.time_scale == 1000
    rewrite(tmp_path, num_train_timesteps=500)
    assert load_diffusion(tmp_path).preconditioning.time_scale == 500


@pytest.mark.parametrize(("abar", "kept"), [(1.2e-9, 2), (0.8e-9, 1)])
def test_steps_with_less_than_a_billionth_of_the_image_are_left_out(tmp_path, abar, kept):
    betas = [0.5, 1 - 2e-5, 1 - abar / 1e-5]
    save(tmp_path, unet(), diffusers.DDPMScheduler(num_train_timesteps=3, trained_betas=betas))
    found = load_diffusion(tmp_path).preconditioning.alphas_cumprod
    assert len(found) == kept + 1


def test_old_keys_without_a_value_are_ignored(tmp_path):
    save(tmp_path, unet(), diffusers.DDPMScheduler())
    rewrite(tmp_path, timestep_values=None)
    load_diffusion(tmp_path)
