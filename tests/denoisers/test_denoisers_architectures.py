"""DnCNN beyond what a checkpoint shows: blindness, sizes, bad arguments."""

from __future__ import annotations

import pytest
import torch

from art_denoised import DnCNN, InputError

X = torch.linspace(0, 1, 2 * 3 * 64).reshape(2, 3, 8, 8)


def test_output_does_not_depend_on_sigma():
    denoiser = DnCNN(depth=3, width=4).eval()
    blind = denoiser(X)
    for sigma in (0.1, 1.0, torch.tensor([0.25, 0.5])):
        assert torch.equal(denoiser(X, sigma), blind)


def test_output_is_the_input_less_the_noise():
    denoiser = DnCNN(depth=3, width=4).eval()
    assert torch.equal(denoiser(X, 0.25), X - denoiser.dncnn(X))


def test_the_wide_form_has_128_channels():
    assert DnCNN(width=128).dncnn[45].num_features == 128


@pytest.mark.parametrize("name", ["image_channels", "depth", "width"])
def test_bad_arguments_are_named(name):
    with pytest.raises(InputError, match=f"{name} is 0; give a whole number"):
        DnCNN(**{name: 0})
