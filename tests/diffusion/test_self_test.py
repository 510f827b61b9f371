"""The self-test finds models that are wired up wrongly."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from art_denoised.checks import InputError
from art_denoised.data import digits
from art_denoised.demo import digits_diffusion
from art_denoised.diffusion import DDPM, EDM, DiffusionModel, Native, self_test
from tests.diffusion.test_preconditioning import ABAR


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


def test_a_wrong_range_is_named(data):
    network = digits_diffusion().network
    model = DiffusionModel(network, EDM(), classes=10, null_class=10, image_range=(0, 1))
    with pytest.raises(InputError, match=r"read with image_range \(-1\.0, 1\.0\)"):
        self_test(model, *data)
