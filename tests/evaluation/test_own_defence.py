"""A defence that knows nothing of this package is evaluated like one of its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from art_denoised import PGD, InputError, evaluate
from art_denoised.evaluation import CLEAN
from art_denoised.evaluation.target import Target
from tests.conformance.stranger import Stranger

OPTIONS = {"indices": range(12), "repeats": 3, "progress": False, "masking_checks": False}


def attacked(digits, model, **options):
    return evaluate(model, TensorDataset(*digits), [PGD(0.1, steps=3)], **{**OPTIONS, **options})


@pytest.mark.parametrize(
    ("seed", "noise", "expected"),
    [
        (None, None, "fresh"),
        (0, "fresh", "fresh"),
        (0, None, "fixed"),
        (None, "fixed", "fixed"),
    ],
)
def test_its_noise_is_fixed_or_fresh_as_asked(digits, seed, noise, expected):
    model = Stranger(seed).eval()
    log = attacked(digits, model, noise=noise)
    assert log.settings["noise"] == expected
    assert log.settings["randomised"] is (expected == "fresh")
    assert {len(row.fresh) for row in log.rows} == {3 if expected == "fresh" else 1}
    assert model.seed == seed


def test_both_its_gradients_are_taken(digits):
    model = Stranger().eval()
    log = attacked(digits, model)
    exact, bpda = (log.columns["pgd", how, 0.1] for how in ("exact", "bpda"))
    assert [row.distance_l2 for row in exact] != [row.distance_l2 for row in bpda]
    assert model.gradient == "exact"
    assert attacked(digits, model, gradients=["bpda"]).columns["pgd", "bpda", 0.1] == bpda
    assert list(Target(model, digits[0], noise=None, repeats=1, seed=0).gradients()) == [
        *model.gradients
    ]
    with pytest.raises(InputError, match="'smooth'"):
        attacked(digits, model, gradients=["smooth"])


def test_its_pictures_show_what_it_purifies(digits):
    """Of the noisy images that reach the purification, not of the clean ones."""
    model, x = Stranger(sigma=0.2).eval(), digits[0][:1]
    log = attacked(digits, model, pictures=1)
    pictures = {(picture.attack, picture.stage): picture.array / 255 for picture in log.images}
    assert ("pgd", "attacked and denoised") in pictures
    assert Target(model, x, noise=None, repeats=1, seed=0).denoised(x).equal(model.purify(x))
    behind = nn.Sequential(Noise(0.3), model).eval()
    target = Target(behind, x, noise=None, repeats=1, seed=0)
    assert target.denoised(x).equal(model.purify(behind[0](x)))


class Noise(nn.Module):
    """Adds noise to images, and scales them by a layer that has noise of its own."""

    def __init__(self, sigma: float, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.sigma, self.seed, self.inner = sigma, 0, inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator()
        generator.seed() if self.seed is None else generator.manual_seed(self.seed)
        x = x + self.sigma * torch.randn(x.shape[1:], generator=generator).to(x)
        return x if self.inner is None else self.inner(x)


def test_noise_within_noise_is_switched_too(digits):
    """Fixing the outer noise alone would leave the model randomised, and freeing it half fixed."""
    model = nn.Sequential(Noise(0.01, inner=Noise(0.1)), Stranger(sigma=0.01)).eval()
    parts = [model[0], model[0].inner, model[1]]
    x = digits[0][:4]
    free = Target(model, x, noise="fresh", repeats=2, seed=0)
    with free.as_asked():
        assert [part.seed for part in parts] == [None] * 3
    assert [part.seed for part in parts] == [0] * 3
    for part in parts:
        part.seed = None
    fixed = Target(model, x, noise="fixed", repeats=2, seed=5)
    assert not fixed.randomised
    with fixed.as_asked():
        assert [part.seed for part in parts] == [5] * 3
    assert [part.seed for part in parts] == [None] * 3


def test_all_masking_checks_are_made_of_it(digits):
    log = attacked(digits, Stranger().eval(), masking_checks=True, indices=range(20))
    assert log.trusted is not None
    assert {row.attack for row in log.rows} == {CLEAN, "pgd"}


class Odd(nn.Module):
    """Attributes of the protocols' names that mean something else, or are misspelt."""

    gradient: str

    def __init__(self, purified=None, **attributes):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        self.purified = purified
        for name, value in attributes.items():
            setattr(self, name, value)

    @property
    def seed(self):
        return 3

    def purify(self, x):
        return self.purified(x)

    def forward(self, x):
        return self.net(x)


def test_a_seed_that_cannot_be_set_is_no_noise(digits):
    assert attacked(digits, Odd().eval(), pictures=0).settings["noise"] == "none"
    with pytest.raises(InputError, match="'fixed'"):
        attacked(digits, Odd().eval(), noise="fixed")


@pytest.mark.parametrize(
    "purified", [lambda x: x[..., :4], lambda x: x * torch.nan, lambda x: (x,), lambda x: 1 / 0]
)
def test_pictures_that_are_none_are_refused(digits, purified):
    with pytest.raises(InputError, match="Odd.purify"):
        attacked(digits, Odd(purified).eval())


def test_ways_of_gradients_are_a_tuple_of_names(digits):
    with pytest.raises(InputError, match="'exact'"):
        attacked(digits, Odd(gradient="exact", gradients="exact").eval())
    model = Odd(gradient=torch.zeros(1), gradients=None).eval()  # it says nothing to us
    assert [*attacked(digits, model, pictures=0).columns][1:] == [("pgd", "exact", 0.1)]


def test_a_single_attack_and_a_single_way_need_no_list(digits):
    data, model = TensorDataset(*digits), Stranger().eval()
    log = evaluate(model, data, PGD(0.1, steps=3), gradients="bpda", **OPTIONS)
    assert [*log.columns][1:] == [("pgd", "bpda", 0.1)]
