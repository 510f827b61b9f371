"""A chain of steps: its exact gradient."""

from __future__ import annotations

import torch

from art_denoised.diffusion.chain import Chain


def test_what_is_not_used_cannot_spoil_the_gradient_of_the_rest():
    """x^3 has the derivative 12 at 2, whatever that of a root at 0 beside it."""
    chain = Chain("a chain", 2, lambda number, start, state: (state[0] * start, state[1].sqrt()))
    x = torch.tensor([2.0], requires_grad=True)
    cube, root = chain.differentiable(x, x, x - 2)
    assert (cube.tolist(), root.tolist()) == ([8.0], [0.0])
    assert torch.autograd.grad(cube, x)[0].tolist() == [12.0]


def test_a_last_state_that_depends_on_nothing_has_the_gradient_zero():
    chain = Chain("a chain", 2, lambda number, start, state: (state[0].detach(), state[1]))
    x = torch.tensor([2.0], requires_grad=True)
    last, _ = chain.differentiable(x, x, x)
    assert torch.autograd.grad(last, x)[0].tolist() == [0.0]
