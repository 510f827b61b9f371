"""The ball, its random points, the losses and the steps of ascent: values by their formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from art_denoised.attacks import LOSSES, ascend, project, random_point


@settings(max_examples=50)
@given(
    seed=st.integers(0, 999),
    eps=st.floats(0, 1),
    norm=st.sampled_from(["linf", "l2"]),
    size=st.floats(0, 3),
)
def test_steps_and_starts_stay_in_the_ball_and_in_the_range(seed, eps, norm, size):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(3, 2, 3, 3, generator=generator).round(decimals=1)
    x_adv = random_point(x, eps, norm, generator)
    for _ in range(3):
        gradient = torch.randn(x.shape, generator=generator) * 10 ** (20.0 * size - 40)
        for point in (x_adv, project(x_adv + gradient, x, eps, norm)):
            offset = (point - x).double()
            assert point.min() >= 0
            assert point.max() <= 1
            if norm == "linf":
                assert offset.abs().max() <= eps + np.spacing(np.float32(1))
            else:
                assert offset.flatten(1).norm(dim=1).max() <= eps * (1 + 1e-6) + 1e-7
        x_adv = ascend(x_adv, gradient, x, eps=eps, step_size=size, norm=norm)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_starts_fill_the_ball(norm):
    """An l2 radius has the distribution r^d; each tolerance is ten standard errors."""
    x = torch.full((4000, 1, 1, 3), 0.5)
    offset = (random_point(x, 0.4, norm, torch.Generator().manual_seed(0)) - x).flatten(1) / 0.4
    size = offset.abs().amax(1) if norm == "linf" else offset.norm(dim=1)
    assert float((size**3).mean()) == pytest.approx(0.5, abs=10 * 0.29 / 4000**0.5)
    assert offset.mean(0).abs().max() < 10 * 0.6 / 4000**0.5


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_starts_are_drawn_by_the_stated_formulas(norm):
    """A uniform cube; a uniform direction times the third root of a uniform number."""
    x, draw = torch.full((4, 1, 1, 3), 0.5), torch.Generator().manual_seed(1)
    if norm == "linf":
        expected = x + 0.4 * (2 * torch.rand(x.shape, generator=draw) - 1)
    else:
        way = torch.randn(x.shape, generator=draw)
        radius = torch.rand((4, 1, 1, 1), generator=draw) ** (1 / 3)
        expected = x + 0.4 * radius * way / way.flatten(1).norm(dim=1).reshape(4, 1, 1, 1)
    found = random_point(x, 0.4, norm, torch.Generator().manual_seed(1))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_gradients_that_are_zero_tiny_or_nan(norm):
    x = torch.full((4, 1, 2, 2), 0.5)
    gradient = torch.zeros_like(x)
    gradient[1] = 1e-42
    gradient[2] = 1e30
    gradient[3, 0, 0, 0] = float("nan")
    moved = ascend(x, gradient, x, eps=0.2, step_size=0.1, norm=norm) - x
    assert torch.equal(moved[[0, 3]], torch.zeros(2, 1, 2, 2))
    length = 0.1 if norm == "linf" else 0.05
    assert torch.allclose(moved[[1, 2]], torch.full((2, 1, 2, 2), length))


@pytest.mark.parametrize("target", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_against_their_formulas(name, target):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, 5, generator=generator, dtype=torch.float64)
    y = torch.arange(20) % 5
    t = (y + 2) % 5 if target else None
    values = LOSSES[name](logits, y, t)
    for row, label, value, aim in zip(logits, y, values, y if t is None else t, strict=True):
        z = sorted(row.tolist(), reverse=True)
        wrong = max(row[i] for i in range(5) if i != label) if t is None else row[aim]
        expected = {
            "ce": (-1 if t is None else 1) * (row[aim] - row.logsumexp(0)),
            "margin": wrong - row[label],
            "dlr": (wrong - row[label]) / (z[0] - (z[2] if t is None else (z[2] + z[3]) / 2)),
        }[name]
        assert float(value) == pytest.approx(float(expected))
