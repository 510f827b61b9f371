"""Diffusion models in image units, and loading them from diffusers folders."""

from __future__ import annotations

import json
import math

import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
    VQDiffusionScheduler,
)
from torch import nn

from art_denoised.checks import InputError
from art_denoised.data import digits
from art_denoised.demo import digits_diffusion
from art_denoised.denoisers import OneShotDenoiser
from art_denoised.diffusion import (
    DDPM,
    EDM,
    DiffusionModel,
    Flow,
    Native,
    NoisedDiffusion,
    load_diffusion,
    self_test,
    unet_diffusion,
)
from art_denoised.diffusion.model import checked_unconditional, sinusoids
from art_denoised.purification import Purification
from art_denoised.rdc import DiffusionClassifier, LikelihoodMaximization
from tests.diffusion.test_preconditioning import ABAR
from tests.nets import SMALL_UNET


class Recorder(nn.Module):
    """A network that remembers what it was given."""

    def forward(self, x, c_noise, y):
        self.seen = x, c_noise, y
        return torch.zeros_like(x)


def test_a_network_in_minus_one_to_one_sees_twice_the_noise():
    network = Recorder()
    x = torch.rand(3, 1, 4, 4)
    DiffusionModel(network, Native())(x, torch.tensor([0.1, 0.2, 0.3]))
    assert torch.allclose(network.seen[0], 2 * x - 1)
    assert torch.allclose(network.seen[1], torch.tensor([0.2, 0.4, 0.6]))
    DiffusionModel(network, Native(), image_range=(0, 1))(x, 0.1)
    assert torch.allclose(network.seen[0], x)
    assert torch.allclose(network.seen[1], torch.full((3,), 0.1))


def test_the_null_class_stands_for_none():
    network = Recorder()
    model = DiffusionModel(network, EDM(), classes=10, null_class=10)
    x = torch.rand(2, 1, 4, 4)
    model(x, 0.5)
    assert network.seen[2].tolist() == [10, 10]
    model(x, 0.5, torch.tensor([3, 4]))
    assert network.seen[2].tolist() == [3, 4]
    with pytest.raises(InputError, match="no null class"):
        DiffusionModel(network, EDM(), classes=10)(x, 0.5)
    with pytest.raises(InputError, match="knows no classes"):
        DiffusionModel(network, EDM())(x, 0.5, torch.tensor([3, 4]))
    with pytest.raises(InputError, match="no classes"):
        DiffusionModel(network, EDM(), null_class=3)
    with pytest.raises(InputError, match="one of the 10 classes"):
        DiffusionModel(network, EDM(), classes=10, null_class=3)


@pytest.mark.parametrize("labels", [[3, 11], [-1, 0], [1], [[1, 2]]])
def test_labels_that_it_does_not_know(labels):
    model = DiffusionModel(Recorder(), EDM(), classes=10, null_class=12)
    with pytest.raises(InputError, match="labels"):
        model(torch.rand(2, 1, 4, 4), 0.5, torch.tensor(labels))


@pytest.mark.parametrize(
    "build",
    [
        lambda model: Purification(model, sigma=0.1),
        DiffusionClassifier,
        LikelihoodMaximization,
        OneShotDenoiser,
        lambda model: self_test(model, torch.zeros(1, 1, 8, 8)),
    ],
)
def test_a_classifier_is_no_diffusion_model(build):
    """As `attack --purify` is given where it is confused with --model."""
    with pytest.raises(InputError, match="diffusion model is a Identity"):
        build(nn.Identity())


@pytest.mark.parametrize("classes", ["10", 10.0, True, 0])
def test_a_number_of_classes_is_a_whole_number(classes, tmp_path):
    for build in (
        lambda: DiffusionModel(nn.Identity(), Native(), classes=classes),
        lambda: load_diffusion(tmp_path, classes=classes),
    ):
        with pytest.raises(InputError, match=f"classes is {classes!r}"):
            build()


def test_levels_are_in_image_units():
    model = DiffusionModel(Recorder(), EDM(sigma_min=0.01, sigma_max=80))
    assert (model.sigma_min, model.sigma_max) == (0.005, 40)
    assert model.at_least(0.25) == 0.25
    with pytest.raises(InputError, match="beyond 80"):
        model.at_least(41)


def test_an_empty_range_is_refused():
    for image_range in ((1.0, 1.0), (1.0, 0.0)):
        with pytest.raises(InputError, match="image_range"):
            DiffusionModel(Recorder(), Native(), image_range=image_range)


def test_levels_of_noised_images_are_what_is_added():
    """By hand, in image units: trained on 0.1 to 1, and 0.06^2 + 0.08^2 = 0.1^2."""
    model = NoisedDiffusion(DiffusionModel(Recorder(), EDM(sigma_min=0.2, sigma_max=2)), 0.06)
    assert model.sigma_min == pytest.approx(0.08)
    assert model.sigma_max == pytest.approx((1 - 0.0036) ** 0.5)
    assert model.at_least(0.01) == pytest.approx(0.08)
    assert 0.8 <= model.at_least(0.8) < 0.8 + 1e-9
    assert NoisedDiffusion(DiffusionModel(Recorder(), EDM(sigma_min=0.2)), 0.3).sigma_min == 0


def test_a_noised_model_asks_at_all_the_noise_and_takes_its_share_of_the_answer():
    """By hand, in image units: 0.06^2 + 0.08^2 = 0.1^2, and 0.64 of it is additional."""
    network, x = Recorder(), torch.rand(2, 1, 4, 4)
    x_hat = NoisedDiffusion(DiffusionModel(network, Native()), 0.06)(x, 0.08)
    torch.testing.assert_close(network.seen[1], torch.tensor([0.2, 0.2]))
    torch.testing.assert_close(x_hat, x + 0.64 * (0.5 - x))


def unet(**changes) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(**{**SMALL_UNET, **changes}).eval()


def save(folder, network, scheduler, pipeline: bool = False):
    network.save_pretrained(folder / "unet" if pipeline else folder)
    scheduler.save_pretrained(folder / "scheduler" if pipeline else folder)


@pytest.mark.parametrize("pipeline", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_ddpm_folders_denoise_as_diffusers_does(tmp_path, pipeline, prediction):
    """One step of diffusers' DDIM to the end is its estimate of the clean image."""
    network = unet()
    scheduler = DDIMScheduler(prediction_type=prediction, clip_sample=False)
    save(tmp_path, network, scheduler, pipeline)
    model = load_diffusion(tmp_path)
    step = 300
    abar = scheduler.alphas_cumprod[step]
    sigma = ((1 - abar) / abar).sqrt() / 2
    x_noisy = torch.rand(2, 1, 8, 8) + sigma * torch.randn(2, 1, 8, 8)
    z = abar.sqrt() * (2 * x_noisy - 1)
    scheduler.set_timesteps(1000)
    with torch.no_grad():
        expected = scheduler.step(network(z, step).sample, step, z).pred_original_sample
        x_hat = model(x_noisy, float(sigma))
    torch.testing.assert_close(x_hat, (expected + 1) / 2, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_edm_folders_denoise_as_diffusers_does(tmp_path):
    network, scheduler = unet(), EDMEulerScheduler(sigma_data=0.4)
    save(tmp_path, network, scheduler)
    scheduler.set_timesteps(10)
    at = 5
    sigma, told = float(scheduler.sigmas[at]), scheduler.timesteps[at]
    x = torch.rand(2, 1, 8, 8) + sigma / 2 * torch.randn(2, 1, 8, 8)
    sample = 2 * x - 1
    output = network(scheduler.scale_model_input(sample, told), told).sample
    expected = scheduler.step(output, told, sample).pred_original_sample
    x_hat = load_diffusion(tmp_path)(x, sigma / 2)
    torch.testing.assert_close(x_hat, (expected + 1) / 2, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_flow_folders_denoise_as_diffusers_does(tmp_path):
    """The last Euler step of diffusers, from t to 0, is its estimate of the clean image."""
    network, scheduler = unet(), FlowMatchEulerDiscreteScheduler()
    save(tmp_path, network, scheduler)
    scheduler.set_timesteps(sigmas=[0.6])
    t, told = float(scheduler.sigmas[0]), scheduler.timesteps[0]
    sigma = t / (1 - t)
    x = torch.rand(2, 1, 8, 8) + sigma / 2 * torch.randn(2, 1, 8, 8)
    z = (1 - t) * (2 * x - 1)
    expected = scheduler.step(network(z, told).sample, told, z).prev_sample
    x_hat = load_diffusion(tmp_path)(x, sigma / 2)
    torch.testing.assert_close(x_hat, (expected + 1) / 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("scheduler", "kind"),
    [
        (EDMEulerScheduler(sigma_data=0.4), EDM),
        (FlowMatchEulerDiscreteScheduler(), Flow),
        (DDPMScheduler(beta_schedule="squaredcos_cap_v2"), DDPM),
        (DDPMScheduler(rescale_betas_zero_snr=True), DDPM),
    ],
)
def test_preconditionings_of_schedulers(tmp_path, scheduler, kind):
    save(tmp_path, unet(), scheduler)
    model = load_diffusion(tmp_path)
    assert type(model.preconditioning) is kind
    assert torch.isfinite(model(torch.rand(2, 1, 8, 8), 0.25)).all()
    if kind is EDM:
        assert model.preconditioning.sigma_data == 0.4


def test_classes_are_counted(tmp_path):
    save(tmp_path, unet(num_class_embeds=11), DDPMScheduler())
    model = load_diffusion(tmp_path, classes=10)
    assert (model.classes, model.null_class) == (10, 10)
    assert load_diffusion(tmp_path, classes=11).null_class is None
    x = torch.rand(2, 1, 8, 8)
    a, b = (model(x, 0.5, torch.tensor([c, c])) for c in (1, 2))
    assert not torch.equal(a, b)
    for classes in (None, 9):
        with pytest.raises(InputError, match="embeds 11"):
            load_diffusion(tmp_path, classes=classes)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (CMStochasticIterativeScheduler(), "consistency model"),
        (VQDiffusionScheduler(num_vec_classes=8), "VQDiffusionScheduler, which is not supported"),
        (EDMEulerScheduler(prediction_type="v_prediction"), "prediction_type is 'v_prediction'"),
        (DDPMScheduler(prediction_type="epsilon"), None),
    ],
)
def test_what_is_refused(tmp_path, scheduler, message):
    save(tmp_path, unet(out_channels=2), scheduler)
    with pytest.raises(InputError, match=message or "1 channels to 2"):
        load_diffusion(tmp_path)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(InputError, match=r"no scheduler_config\.json"):
        load_diffusion(tmp_path)
    save(tmp_path, unet(), DDPMScheduler())
    (tmp_path / "diffusion_pytorch_model.safetensors").rename(tmp_path / "model.bin")
    with pytest.raises(InputError, match="safetensors"):
        load_diffusion(tmp_path)
    (tmp_path / "scheduler_config.json").write_text("[1]")
    with pytest.raises(InputError, match="damaged"):
        load_diffusion(tmp_path)
    (tmp_path / "scheduler_config.json").write_text(json.dumps({"_class_name": "Mine"}))
    with pytest.raises(InputError, match="Mine"):
        load_diffusion(tmp_path)


@pytest.fixture(scope="module")
def data():
    pairs = [digits(train=False)[i] for i in range(50)]
    return torch.stack([x for x, _ in pairs]), torch.tensor([y for _, y in pairs])


def test_a_model_that_is_understood(data):
    rows = self_test(digits_diffusion(), *data)
    assert [row.sigma for row in rows] == [0.05, 0.1, 0.25, 0.5]
    assert all(row.error < 0.9 for row in rows)
    assert sum(row.conditional_error for row in rows) < sum(row.error for row in rows)
    assert all(row.class_effect < row.error for row in rows)
    unconditional = self_test(digits_diffusion(), data[0])
    assert [row.error for row in unconditional] == [row.error for row in rows]


class Off(nn.Module):
    """Is off a grey image by a share of the noise, and by another if it is told the class."""

    def __init__(self, free, told):
        super().__init__()
        self.free, self.told = free, told

    def forward(self, x, sigma, y):
        share = torch.where(y == 10, self.free, self.told)
        return 0.5 + (share * sigma).reshape(-1, 1, 1, 1).expand_as(x)


def off(free: float, told: float) -> DiffusionModel:
    options = {"classes": 10, "null_class": 10, "image_range": (0.0, 1.0)}
    return DiffusionModel(Off(free, told), Native(), **options)


@pytest.mark.parametrize("shares", [(0.6, 1.1), (1.1, 0.6)])
def test_both_answers_must_denoise(shares):
    with pytest.raises(InputError, match=r"leaves 1\.2 times the noise"):
        self_test(off(*shares), torch.full((3, 1, 4, 4), 0.5), [3, 4, 5])


def test_errors_are_in_units_of_the_variance_of_the_noise():
    model, x = off(0.6, 0.3), torch.full((3, 1, 4, 4), 0.5)
    for row in self_test(model, x, [3, 4, 5]):  # labels are taken as a list, too
        assert row[1:] == pytest.approx((0.36, 0.09, 0.09), rel=1e-5)
    model.null_class = None  # without one the answer for the class is the only one
    assert self_test(model, x, [3, 4, 5])[0][1:] == pytest.approx((0.09, 0.09, 0.0), rel=1e-5)
    with pytest.raises(InputError, match="label 10 is out of range"):
        self_test(model, x, torch.tensor([3, 4, 10]))


def outcome(model, x, y) -> float | None:
    """What is left of the noise, over all levels; None where the model is refused."""
    try:
        return sum(row.error for row in self_test(model, x, y))
    except InputError:
        return None


@pytest.mark.parametrize(
    "wrong",
    [
        lambda net: DiffusionModel(net, DDPM(ABAR), classes=10, null_class=10),
        lambda net: DiffusionModel(net, EDM(), classes=10, null_class=10, image_range=(0, 1)),
        lambda net: DiffusionModel(net, Native(), classes=10, null_class=10),
    ],
    ids=["family", "range", "preconditioning"],
)
def test_models_that_are_wired_up_wrongly(data, wrong):
    model = wrong(digits_diffusion().network)
    found = outcome(model, *data)
    # Refused, or it still denoises, but visibly worse.
    assert found is None or found > 1.1 * outcome(digits_diffusion(), *data)


class Nan(nn.Module):
    def forward(self, x, c_noise, y):
        return x * float("nan")


def test_what_cannot_be_tested(data):
    with pytest.raises(InputError, match="times the noise"):
        self_test(DiffusionModel(Nan(), Native()), data[0])
    with pytest.raises(InputError, match=r"^the diffusion model has no null class"):
        self_test(DiffusionModel(digits_diffusion().network, EDM(), classes=10), data[0])
    with pytest.raises(InputError, match="only noise"):
        self_test(DiffusionModel(Nan(), Native(sigma_min=50, sigma_max=60)), data[0])
    with pytest.raises(InputError, match=r"failed on an image of shape \(3, 8, 8\)"):
        self_test(digits_diffusion(), data[0].expand(-1, 3, -1, -1))


def test_images_of_another_dtype_are_cast(data):
    rows, doubles = (
        self_test(digits_diffusion(), data[0]),
        self_test(digits_diffusion(), data[0].double()),
    )
    assert [row.error for row in doubles] == pytest.approx([row.error for row in rows], rel=1e-4)


class Trained(nn.Module):
    """The network that a DDPM training would end in, made of the digits' model: eps, v or x0."""

    def __init__(self, prediction: str) -> None:
        super().__init__()
        self.model, self.prediction = digits_diffusion(), prediction
        abar = torch.tensor(ABAR, dtype=torch.float64)
        self.sigmas = ((1 - abar) / abar).sqrt().float()

    def forward(self, z, step, y):
        sigma = self.sigmas[step].reshape(-1, 1, 1, 1)
        x_noisy = z * (1 + sigma**2).sqrt()
        x = 2 * self.model((x_noisy + 1) / 2, sigma.flatten() / 2, y) - 1
        eps = (x_noisy - x) / sigma
        c = (1 + sigma**2).rsqrt()
        return {"epsilon": eps, "sample": x, "v_prediction": c * eps - sigma * c * x}[
            self.prediction
        ]


@pytest.mark.parametrize("declared", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("true", ["epsilon", "v_prediction", "sample"])
def test_the_reading_that_fits_is_named(data, true, declared):
    ddpm = DDPM(ABAR, declared)
    model = DiffusionModel(Trained(true), ddpm, classes=10, null_class=10)
    if true == declared:
        assert all(row.error < 0.9 for row in self_test(model, *data))
    else:
        with pytest.raises(InputError, match=f"read with prediction '{true}'"):
            self_test(model, *data)


class Narrow(nn.Module):
    """The perfect network for independent normal pixels in [0, 1]: eps or v."""

    def __init__(self, prediction: str, x) -> None:
        super().__init__()
        self.prediction, self.mean, self.variance = prediction, x.mean(0), x.var(0)
        self.abar = torch.tensor(ABAR)

    def forward(self, z, step, y=None):
        abar = self.abar[step].reshape(-1, 1, 1, 1)
        share = abar * self.variance / (abar * self.variance + 1 - abar)
        x = self.mean + share * (z / abar.sqrt() - self.mean)
        eps = (z - abar.sqrt() * x) / (1 - abar).sqrt()
        v = abar.sqrt() * eps - (1 - abar).sqrt() * x
        return {"epsilon": eps, "v_prediction": v}[self.prediction]


@pytest.mark.parametrize("behind", [lambda model: model, lambda model: NoisedDiffusion(model, 0.1)])
@pytest.mark.parametrize("true", ["epsilon", "v_prediction"])
def test_eps_and_v_are_told_apart_where_pixels_go_from_0_to_1(data, true, behind):
    """There both readings agree on little noise."""
    for declared in ("epsilon", "v_prediction"):
        network = Narrow(true, data[0])
        model = behind(DiffusionModel(network, DDPM(ABAR, declared), image_range=(0.0, 1.0)))
        if true == declared:
            assert all(row.error < 0.9 for row in self_test(model, data[0]))
        else:
            with pytest.raises(InputError, match=f"read with prediction '{true}'"):
                self_test(model, data[0])


def test_the_strongest_noise_of_the_training_tells_readings_apart(data):
    """It is 1, to the last bit."""
    abar = [1 - 0.5 * (step + 1) / 200 for step in range(200)]

    class Short(Narrow):
        def __init__(self, prediction, x):
            super().__init__(prediction, x)
            self.abar = torch.tensor(abar)

    network = Short("epsilon", data[0])
    declared = DiffusionModel(network, DDPM(abar, "v_prediction"), image_range=(0.0, 1.0))
    assert declared.sigma_max == 1.0
    with pytest.raises(InputError, match="read with prediction 'epsilon'"):
        self_test(declared, data[0])


def test_a_wrong_range_is_named(data):
    network = digits_diffusion().network
    model = DiffusionModel(network, EDM(), classes=10, null_class=10, image_range=(0, 1))
    with pytest.raises(InputError, match=r"read with image_range \(-1\.0, 1\.0\)"):
        self_test(model, *data)


def test_a_model_that_leaves_more_than_the_noise_is_refused(data):
    """Its error is 1 + 0.5^2 times the variance of the noise at every level."""

    class Shifted(nn.Module):
        def forward(self, x, sigma, y):
            return x + 0.5 * sigma.reshape(-1, 1, 1, 1)

    with pytest.raises(InputError, match=r"leaves 1\.\d+ times the noise"):
        self_test(DiffusionModel(Shifted(), Native(), image_range=(0.0, 1.0)), data[0])


@pytest.mark.parametrize(("endpoint", "lowest"), [(True, 1e-4), (False, 1e-3)])
def test_the_lowest_frequency_of_a_time_is_as_it_says(endpoint, lowest):
    cosines, sines = sinusoids(torch.tensor([1.0, 2.0]), 8, endpoint=endpoint).chunk(2, dim=1)
    assert sines[:, 0].tolist() == pytest.approx([math.sin(1), math.sin(2)])
    assert sines[:, -1].tolist() == pytest.approx([lowest, 2 * lowest], rel=1e-4)
    assert cosines[:, -1].tolist() == pytest.approx([1, 1], abs=1e-5)


def test_a_model_is_asked_without_a_class_only_if_it_can_answer():
    able, also, unable = (small(classes) for classes in (None, 10, 10))
    unable.null_class = None
    for model in (able, also):
        assert checked_unconditional(model) is model
    with pytest.raises(InputError, match="null class"):
        checked_unconditional(unable)
    with pytest.raises(InputError, match=r"noise 0\.5"):
        checked_unconditional(NoisedDiffusion(able, 0.5))
    with pytest.raises(InputError, match="Linear"):
        checked_unconditional(nn.Linear(1, 1))


def small(classes):
    return unet_diffusion(1, 8, classes=classes, widths=(8, 16)).eval()
