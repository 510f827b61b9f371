"""The self-test finds models that are wired up wrongly."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from art_denoised.checks import InputError
from art_denoised.data import digits
from art_denoised.demo import digits_diffusion
from art_denoised.diffusion import DDPM, EDM, Native
from art_denoised.diffusion import DiffusionModel
from art_denoised.diffusion import self_test
from tests.diffusion.test_families import ABAR


@pytest.fixture(scope="module")
def data():
    pairs = [digits(train=False)[i] for i in range(50)]
    return torch.stack([x for x, _ in pairs]), torch.tensor([y for _, y in pairs])


def test_a_model_that_is_understood(data):
    rows = self_test(digits_diffusion(), *data)
    assert [row.sigma for row in rows] == [0.05, 0.1, 0.25, 0.5]
    assert all(row.left < 0.9 for row in rows)
    assert sum(row.conditional for row in rows) < sum(row.left for row in rows)
    assert all(row.apart < row.left for row in rows)
    unconditional = self_test(digits_diffusion(), data[0])
    assert [row.left for row in unconditional] == [row.left for row in rows]


def outcome(model, x, y) -> float | None:
    """What is left of the noise, over all levels; None where the model is refused."""
    try:
        return sum(row.left for row in self_test(model, x, y))
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
    three_channels, doubles = data[0].expand(-1, 3, -1, -1), data[0].double()
    for images, named in ((three_channels, r"\(3, 8, 8\), torch\.float32"), (doubles, "float64")):
        with pytest.raises(InputError, match=rf"failed on an image of shape .*{named}"):
            self_test(digits_diffusion(), images)
