"""BPDA: the transform's value to the bit, the stand-in's gradient, and an attack sees through."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from art_denoised import BPDA, PGD
from art_denoised.autograd import straight_through
from art_denoised.checks import InputError
from art_denoised.demo import digits_classifier


def quantise(x: torch.Tensor) -> torch.Tensor:
    return (x * 3).round() / 3


def images() -> torch.Tensor:
    return torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_value_to_the_bit_and_gradient_of_the_stand_in():
    x = images().requires_grad_()
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    for backward, expected in ((None, weights), (torch.sin, weights * x.detach().cos())):
        y = BPDA(quantise, backward)(x)
        assert torch.equal(y, quantise(x))
        assert torch.equal(torch.autograd.grad((y * weights).sum(), x)[0], expected)


def test_the_transform_may_live_outside_torch():
    def elsewhere(x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(x.numpy().round())

    x = images().requires_grad_()
    BPDA(elsewhere)(x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    with torch.no_grad():
        assert not BPDA(elsewhere)(x).requires_grad


def test_a_transform_may_write_into_its_input():
    x = images()
    before = x.clone()
    BPDA(lambda x: x.mul_(2))(x)
    assert torch.equal(x, before)


def test_second_derivatives_are_those_of_the_stand_in():
    x = torch.rand(3, dtype=torch.float64, requires_grad=True)
    y = straight_through(x.detach().round(), x**3)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert torch.allclose(second, 6 * x)


def test_an_attack_sees_through_it(digits):
    """Quantisation shatters gradients: plain PGD finds nothing more than its random starts do."""
    x, y = digits[0][:60], digits[1][:60]
    classifier = digits_classifier()
    attack = PGD(0.25, steps=10)

    def accuracy(front: nn.Module) -> float:
        model = nn.Sequential(front, classifier)
        with torch.no_grad():
            return float((model(attack(model, x, y)).argmax(1) == y).float().mean())

    class Quantise(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return quantise(x)

    assert accuracy(Quantise()) > 0.8
    assert accuracy(BPDA(quantise)) < 0.4


def test_a_transform_that_changes_the_shape_needs_a_stand_in():
    def shrink(x: torch.Tensor) -> torch.Tensor:
        return x[:, :, ::2, ::2].round()

    x = images().requires_grad_()
    with pytest.raises(InputError, match="give a backward of the transform's shape"):
        BPDA(shrink)(x)
    y = BPDA(shrink, nn.AvgPool2d(2))(x)
    y.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 0.25))


def test_the_stand_in_runs_only_where_a_gradient_is_taken():
    calls = []

    def stand_in(x):
        calls.append(len(x))
        return x

    transform = BPDA(quantise, stand_in)
    transform(images())
    with torch.no_grad():
        transform(images().requires_grad_())
    assert calls == []
    transform(images().requires_grad_())
    assert calls == [4]
