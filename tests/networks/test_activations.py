"""Smooth activations: the formulas, their derivatives, and which pass they are used in."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from art_denoised import InputError, ParametricSoftplus, SmoothReLU, SplitReLU, attacking

EDGES = torch.tensor([0.0, 1e-30, 1e-3, 1.0, 40.0, 1e4, 1e30, 3e38])
SMOOTH = [ParametricSoftplus(10.0), ParametricSoftplus(1.0), SmoothReLU(), SmoothReLU(2.0)]


def slope(activation: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(activation(x).sum(), x)[0]


def points() -> torch.Tensor:
    x = torch.linspace(-3, 3, 40, dtype=torch.float64)
    return torch.cat([x, x / 100])


def test_they_are_the_formulas():
    x = points()
    assert torch.allclose(ParametricSoftplus(10.0)(x), (1 + (10 * x).exp()).log() / 10, atol=1e-15)
    formula = torch.where(x >= 0, x - (400 * x.clamp_min(0) + 1).log() / 400, 0.0)
    assert torch.allclose(SmoothReLU().double()(x), formula, atol=1e-15)


@pytest.mark.parametrize("activation", SMOOTH, ids=str)
def test_first_and_second_derivatives_agree_with_finite_differences(activation):
    activation = copy.deepcopy(activation).double()
    x = points()[points().abs() > 1e-3].requires_grad_()  # SmoothReLU bends at 0 (C1, not C2)
    assert torch.autograd.gradcheck(activation, x)
    assert torch.autograd.gradgradcheck(activation, x)


def test_defaults_are_those_of_the_paper():
    """alpha 10 in section 4.1 and in the study of section 3; a root of 20 in the release."""
    assert ParametricSoftplus().alpha == SplitReLU().smooth.alpha == 10
    assert SmoothReLU().root.item() == 20
    assert SplitReLU().smooth_in == "both"


def test_the_root_has_the_gradient_it_should():
    learnt = SmoothReLU(alpha=9.0).double()
    assert torch.autograd.gradcheck(
        lambda root: torch.func.functional_call(learnt, {"root": root}, (points(),)),
        learnt.root.detach().requires_grad_(),
    )
    assert not list(SmoothReLU(learnable=False).parameters())
    nn.init.ones_(learnt.root)
    learnt.reset_parameters()  # what ART's clones call
    assert learnt.root.item() == 3


@pytest.mark.parametrize("activation", SMOOTH, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_they_are_finite_and_become_relu_at_large_values(activation, dtype):
    x = EDGES.double().clamp_max(torch.finfo(dtype).max).to(dtype)
    x = torch.cat([-x, x])
    y, g = activation(x), slope(activation, x)
    assert y.dtype == g.dtype == dtype
    assert y.isfinite().all()
    assert ((g >= 0) & (g <= 1)).all()
    far = x.abs() >= 1e4
    assert torch.allclose(y[far], F.relu(x)[far], rtol=1e-2 if dtype == torch.bfloat16 else 1e-3)
    assert torch.allclose(g[far], (x[far] > 0).to(dtype), atol=1e-2)


@given(st.floats(-100, 100), st.floats(0.1, 1000))
def test_they_enclose_relu(x, alpha):
    """Softplus is above by log(2) / alpha at most, SmoothReLU below by log(1 + alpha x) / alpha."""
    t = torch.tensor(x, dtype=torch.float64)
    above = float(ParametricSoftplus(alpha)(t) - F.relu(t))
    assert -1e-12 <= above <= 0.6931472 / alpha + 1e-12
    below = float(F.relu(t) - SmoothReLU(alpha, learnable=False).double()(t))
    assert -1e-12 <= below <= float(torch.log1p(alpha * F.relu(t)) / alpha) * (1 + 1e-6) + 1e-12


def test_half_precision_is_float32_rounded_at_the_end():
    x = points().to(torch.bfloat16)
    for activation in SMOOTH:
        assert torch.equal(activation(x), activation(x.float()).to(torch.bfloat16))


@pytest.mark.parametrize("smooth_in", ["attacker", "optimiser", "both"])
@pytest.mark.parametrize(
    "smooth", [ParametricSoftplus(10.0), nn.SiLU(), SmoothReLU(learnable=False)]
)
def test_split_is_relu_forward_and_smooth_backward_in_its_steps_only(smooth, smooth_in):
    split, x = SplitReLU(smooth, smooth_in=smooth_in), points().float()
    assert torch.equal(split(x), F.relu(x))
    assert torch.equal(split(EDGES), F.relu(EDGES))
    assert torch.equal(split(x.requires_grad_()), F.relu(x))
    expected = {True: slope(smooth, x), False: slope(nn.ReLU(), x)}
    assert torch.equal(slope(split, x), expected[smooth_in != "attacker"])
    with attacking(split):
        assert torch.equal(split(x), F.relu(x))
        assert torch.equal(slope(split, x), expected[smooth_in != "optimiser"])
    assert torch.equal(slope(split, x), expected[smooth_in != "attacker"])


@pytest.mark.parametrize("smooth_in", ["attacker", "optimiser", "both"])
def test_a_judge_takes_the_gradient_of_relu_and_the_attack_of_training_its_own(smooth_in):
    split, x = SplitReLU(smooth_in=smooth_in).eval(), points().float()
    relu, smooth = slope(nn.ReLU(), x), slope(ParametricSoftplus(), x)
    assert torch.equal(slope(split, x), relu)
    with attacking(split):  # adversarial training attacks in eval mode
        assert torch.equal(slope(split, x), relu if smooth_in == "optimiser" else smooth)


def test_copies_made_while_attacking_are_not():
    model = nn.Sequential(SplitReLU(smooth_in="attacker"))
    with attacking(model):
        copies = copy.deepcopy(model), nn.Sequential(copy.copy(model[0]))
        assert model[0].attacking
    assert not any(made[0].attacking for made in copies)


def test_repr_tells_them_apart_and_stays_in_training():
    made = (ParametricSoftplus(1.0), ParametricSoftplus(1.0000001), SmoothReLU(), SmoothReLU(2.0))
    made += (SmoothReLU(learnable=False), SplitReLU(), SplitReLU(smooth_in="attacker"))
    made += (SplitReLU(ParametricSoftplus(3.0)),)
    assert len({repr(module) for module in made}) == len(made)
    learnt = SmoothReLU()
    nn.init.constant_(learnt.root, 3.0)
    assert repr(learnt) == repr(SmoothReLU()) == "SmoothReLU(alpha=400.0, learnable=True)"


def test_split_has_the_second_derivative_of_the_smooth_function():
    x = points().requires_grad_()
    second = [
        torch.autograd.grad(torch.autograd.grad(f(x).sum(), x, create_graph=True)[0].sum(), x)[0]
        for f in (SplitReLU(nn.SiLU()), nn.SiLU())
    ]
    assert torch.equal(*second)


def test_attacking_is_put_back_after_errors_and_when_nested_and_stays_in_its_model():
    model = nn.Sequential(SplitReLU(smooth_in="attacker"), nn.Sequential(SplitReLU()))
    other = copy.deepcopy(model)
    splits = [model[0], model[1][0]]
    with attacking(model):
        with attacking(model):
            pass
        assert all(split.attacking for split in splits)
        assert not other[0].attacking
    with pytest.raises(KeyError), attacking(model):
        raise KeyError
    assert not any(split.attacking for split in splits)


def test_a_compiled_split_follows_the_step():
    split, x = SplitReLU(smooth_in="attacker"), points().float()
    compiled = torch.compile(split, backend="eager")
    plain = slope(compiled, x)
    with attacking(compiled):
        smooth = slope(compiled, x)
    assert torch.equal(plain, slope(nn.ReLU(), x))
    assert torch.allclose(smooth, slope(ParametricSoftplus(), x))


def test_bad_input():
    for make in (ParametricSoftplus, SmoothReLU):
        for alpha in (0, -1, float("nan"), "ten"):
            with pytest.raises(InputError, match="alpha"):
                make(alpha)
    with pytest.raises(InputError, match="did you mean attacker"):
        SplitReLU(smooth_in="attack")
    with pytest.raises(InputError, match="SmoothReLU learns"):
        SplitReLU(SmoothReLU())
