"""What a base classifier gets right on the first images, before anything is spent on it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from art_denoised.checks import InputError
from art_denoised.data import load_data
from art_denoised.demo import digits_classifier, digits_denoiser
from art_denoised.evaluation.first_look import FirstLook, first_look
from art_denoised.smoothing.modules import DenoisedClassifier
from art_denoised.smoothing.smoother import Smoother


def look(base: nn.Module, images: int = 100, sigma: float = 0.5) -> FirstLook:
    return first_look(Smoother(base, sigma=sigma), load_data("digits"), range(images))


def test_a_denoiser_shows_on_noisy_images():
    classifier = digits_classifier()
    plain = look(classifier)
    denoised = look(DenoisedClassifier(classifier, digits_denoiser(), sigma=0.5))
    assert (plain.images, denoised.images) == (32, 32)
    assert plain.clean >= 30
    assert denoised.noisy > plain.noisy + 5


def test_a_missing_normalisation_shows_on_clean_images():
    class Unnormalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = digits_classifier()

        def forward(self, x):
            return self.net((x - 0.5).abs() * 3)

    assert look(Unnormalised().eval()).clean < 20


def test_it_says_its_numbers():
    text = str(FirstLook(images=32, clean=30, noisy=17, sigma=0.25))
    for value in ("30", "32", "17", "0.25"):
        assert value in text


def test_it_is_the_same_each_time_and_leaves_random_numbers_alone():
    torch.manual_seed(3)
    classifier = digits_classifier()
    before = torch.get_rng_state()
    assert look(classifier) == look(classifier)
    assert torch.equal(torch.get_rng_state(), before)


def test_other_types_and_few_images():
    assert look(digits_classifier().bfloat16(), images=2).images == 2


@pytest.mark.parametrize("base", [nn.Dropout(), nn.Conv2d(3, 1, 1)])
def test_misfits_are_refused(base):
    with pytest.raises(InputError):
        look(base)
