"""MemNet beyond what a checkpoint shows: its wiring, blindness, bad arguments."""

from __future__ import annotations

import pytest
import torch

from art_denoised import InputError, MemNet

X = torch.linspace(0, 1, 2 * 64).reshape(2, 1, 8, 8)


def test_gates_see_short_term_then_long_term_memory():
    """The forward pass written out, as in section 3 of the paper."""
    net = MemNet(1, width=4, memory_blocks=3, residual_blocks=2).eval()
    x = net.feature_extractor(X)
    long_term = [x]
    for block in net.dense_memory:
        first = block.recursive_unit[0].relu_conv2(block.recursive_unit[0].relu_conv1(x)) + x
        unit = block.recursive_unit[1]
        second = unit.relu_conv2(unit.relu_conv1(first)) + first
        x = block.gate_unit(torch.cat([first, second, *long_term], dim=1))
        long_term.append(x)
    assert torch.equal(net(X, 0.25), X + net.reconstructor(x))


def test_layers_are_norm_relu_convolution_without_bias():
    gate = MemNet(1, width=4).dense_memory[0].gate_unit
    assert [name for name, _ in gate.named_children()] == ["bn", "relu", "conv"]
    assert gate.conv.kernel_size == (1, 1)
    assert gate.conv.bias is None


def test_output_does_not_depend_on_sigma():
    net = MemNet(1, width=4, memory_blocks=1, residual_blocks=1).eval()
    assert torch.equal(net(X, 0.1), net(X))
    assert torch.equal(net(X, torch.tensor([0.25, 1.0])), net(X))


@pytest.mark.parametrize("name", ["image_channels", "width", "memory_blocks", "residual_blocks"])
def test_bad_arguments_are_named(name):
    with pytest.raises(InputError, match=f"{name} is 0; give a whole number"):
        MemNet(**{name: 0})
