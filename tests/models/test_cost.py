"""Operations and memory of a pass: known for layers that can be counted by hand."""

from __future__ import annotations

import torch
from torch import nn

from art_denoised.models.cost import forward_cost, gradient_cost, weights

X = torch.zeros(3, 4, 8, 8)
IMAGE, LAYER = 4 * 8 * 8 * 4, 16 * 8 * 8 * 4  # bytes


def convolution(channels: int = 4) -> nn.Module:
    return nn.Conv2d(channels, 16, 3, padding=1, bias=False)


def test_operations_are_two_for_a_multiplication_and_addition():
    flop = 2 * 4 * 16 * 9 * 64
    assert forward_cost(convolution(), X).flop == flop
    assert gradient_cost(convolution(), X).flop == 2 * flop


def test_memory_is_that_of_what_is_alive_at_once():
    """Of many layers in a row two are alive: input and output. Views need none of their own."""
    deep = nn.Sequential(convolution(), *(convolution(16) for _ in range(6)), nn.Flatten())
    cost = forward_cost(deep, X)
    assert cost.held == IMAGE + 2 * LAYER
    assert cost.weights == weights(deep) == 4 * 16 * 9 * (4 + 6 * 16)
    assert cost.memory(10) == cost.weights + 10 * cost.held


def test_a_gradient_holds_every_layer():
    deep = nn.Sequential(convolution(), *(nn.Sigmoid() for _ in range(6)))
    assert gradient_cost(deep, X).held >= 6 * LAYER
    assert forward_cost(deep, X).held < 4 * LAYER


def test_functions_have_no_weights():
    assert forward_cost(lambda x: x.flatten(1), X).weights == 0
