"""Smooth activations put wherever ReLU is called, and nothing else changed."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from art_denoised import InputError, ParametricSoftplus, SmoothReLU, SplitReLU, smooth_activations
from art_denoised.networks.coverage import activation_report
from tests.networks.nets import Awkward, Basic, CifarResNet, Deciding, Tree, WithAuxiliary


def on_meta(name: str, **options) -> nn.Module:
    with torch.device("meta"):
        return torchvision.models.get_model(name, **options)


def counts(model: nn.Module, kind: str = "ReLU") -> tuple[int, int, int]:
    count = activation_report(model)[kind]
    return count.modules, count.calls, count.functional


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("resnet50", {}, (17, 49, 0)),
        ("densenet121", {}, (120, 120, 1)),
        ("inception_v3", {"init_weights": False}, (0, 0, 96)),  # 94 without the auxiliary head
        ("googlenet", {"init_weights": False, "aux_logits": False}, (0, 0, 57)),
    ],
)
def test_coverage_of_torchvision_s_models(name, options, expected):
    model = on_meta(name, **options)
    assert counts(model) == expected
    if name == "resnet50":
        changed = smooth_activations(model, "silu")
        assert counts(changed, "SiLU") == (49, 49, 0)
        assert counts(changed) == (0, 0, 0)
        assert counts(model) == expected


@pytest.mark.parametrize("make", [Awkward, CifarResNet], ids=lambda make: make.__name__)
@pytest.mark.parametrize("training", [False, True])
def test_relu_in_place_of_relu_is_the_same_function(make, training):
    """The surgery alone changes nothing: not the values, the gradients, the mode or the dropout."""
    torch.manual_seed(0)
    model = make().train(training)
    changed = smooth_activations(model, nn.ReLU())
    assert all(module.training == training for module in changed.modules())
    for mode in (training, not training):
        results = []
        for network in (model.train(mode), changed.train(mode)):
            torch.manual_seed(1)
            x = torch.rand(3, 3, 8 * 4, 8 * 4, generator=torch.Generator().manual_seed(2))
            y = network(x.requires_grad_())
            results.append((y.detach(), *torch.autograd.grad(y.square().sum(), x)))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])
    torch.manual_seed(2)
    assert not torch.equal(changed.train()(x), changed(x)) or make is not Awkward  # dropout lives


def test_every_call_gets_its_own_and_weights_keep_their_keys():
    model = Awkward()
    changed = smooth_activations(model, SmoothReLU())
    roots = [name for name, _ in changed.named_parameters() if name.endswith(".root")]
    assert len(roots) == 9  # two of relu, in_place, four functional, acts[0] and acts[1]
    assert counts(changed, "SmoothReLU") == (9, 9, 0)
    assert [k for k in changed.state_dict() if not k.endswith(".root")] == list(model.state_dict())
    missing, unexpected = changed.load_state_dict(model.state_dict(), strict=False)
    assert (sorted(missing), unexpected) == (sorted(roots), [])
    smooth_activations(model, "silu").load_state_dict(model.state_dict(), strict=True)
    changed(torch.rand(2, 3, 8, 8)).sum().backward()
    assert all(changed.get_parameter(root).grad is not None for root in roots)


def test_the_result_is_what_smooth_calls_by_hand_give():
    torch.manual_seed(0)
    model, x = Basic(3, 4).eval(), torch.rand(2, 3, 8, 8)
    changed = smooth_activations(model, "silu")
    y = F.silu(model.bn1(model.conv1(x)))
    assert torch.equal(changed(x), F.silu(model.bn2(model.conv2(y)) + model.shortcut(x)))


def test_classes_hooks_and_other_activations_stay():
    model = nn.Sequential(Basic(3, 3), nn.Hardswish())
    called = []
    model[0].register_forward_hook(lambda *_: called.append(1))
    changed = smooth_activations(model, "gelu")
    assert isinstance(changed[0], Basic)
    assert type(changed[0]).__name__ == "SmoothedBasic"
    assert type(smooth_activations(smooth_activations(model, nn.ReLU()), "gelu")[0]).__name__ == (
        "SmoothedBasic"
    )
    changed(torch.rand(1, 3, 4, 4))
    assert called == [1]
    assert str(activation_report(changed)).splitlines()[1:] == [
        "GELU                        2              2                 0",
        "Hardswish                   1              1                 0",
    ]


def test_a_module_under_two_names_is_unshared():
    relu = nn.ReLU()
    changed = smooth_activations(nn.Sequential(relu, nn.Identity(), relu), SmoothReLU())
    assert changed[0] is not changed[2]
    assert counts(changed, "SmoothReLU") == (2, 2, 0)


def test_traced_graphs_are_changed_too():
    model = torch.fx.symbolic_trace(CifarResNet().eval())
    changed = copy.deepcopy(smooth_activations(model, "silu"))
    assert counts(changed, "SiLU") == (13, 13, 0)
    assert counts(model) == (0, 0, 13)


def test_paths_that_depend_on_the_mode():
    """They stay where only modules are called; a functional call among them is refused."""
    model, x = WithAuxiliary(functional=False), torch.rand(1, 3, 5, 5)
    model(x)
    changed = smooth_activations(model.eval(), nn.ReLU())
    assert torch.equal(changed(x), model(x))
    assert torch.equal(changed.train()(x), model.train()(x))
    model = WithAuxiliary(functional=True)
    model(x)
    with pytest.raises(InputError, match=r"the model \(WithAuxiliary\) takes different paths"):
        smooth_activations(model, "silu")


def test_optional_arguments_are_what_callers_make_of_them():
    torch.manual_seed(0)
    model, x = Tree(shared=False), torch.randn(2, 3, 4, 4)
    assert torch.equal(smooth_activations(model, nn.ReLU())(x), model(x))
    with pytest.raises(InputError, match=r"b \(Optional\) cannot be traced \(it is called with"):
        smooth_activations(Tree(shared=True), "silu")


class Typed(Basic):
    def forward(self, x):
        return F.relu(x if isinstance(x, torch.Tensor) else torch.cat(x, 1))


class Noisy(nn.Module):
    def forward(self, x):
        return F.relu(x + torch.randn(3, 1, 1))


class Fixed(nn.Module):
    """Nothing in it can be traced, and nothing in it calls ReLU."""

    def forward(self, x):
        return x if x.sum() > 0 else -x


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_what_cannot_be_read_is_refused_in_one_line():
    for model, reason in (
        (Deciding(), r"the model \(Deciding\) cannot be traced \(symbolically traced"),
        (nn.Sequential(Typed(3, 3)), r"0 \(Typed\) asks for the type of its input"),
        (Noisy(), r"Noisy\) cannot be traced \(it makes a tensor"),
        (nn.TransformerEncoderLayer(8, 1), "is torch's own and has ReLU inside"),
        (torch.jit.freeze(torch.jit.trace(Basic(3, 3).eval(), torch.rand(1, 3, 4, 4))), "scripted"),
        (torch.ao.nn.intrinsic.ConvReLU2d(nn.Conv2d(3, 3, 1), nn.ReLU()), "quantised or fused"),
        (torch.compile(Basic(3, 3)), "compiled; change the model first"),
        (nn.Sequential(nn.Linear(2, 2), nn.Tanh()), "calls no ReLU .* it calls Tanh"),
    ):
        with pytest.raises(InputError, match=reason) as refused:
            smooth_activations(model, "silu")
        assert "\n" not in str(refused.value)
    model = nn.Sequential(Fixed(), nn.ReLU())
    assert activation_report(smooth_activations(model, "silu")).untraced == ("0",)


def test_bad_activations():
    for activation, reason in (
        ("relu", "silu, gelu, elu, celu"),
        (nn.SiLU, "not a module"),
        (nn.ELU(0.5), r"give nn.CELU\(0.5\)"),
    ):
        with pytest.raises(InputError, match=reason):
            smooth_activations(CifarResNet(), activation)


@pytest.mark.parametrize("activation", [ParametricSoftplus(10.0), SplitReLU(), "celu"], ids=str)
def test_copies_are_independent(activation):
    model = CifarResNet().eval()
    changed = smooth_activations(model, activation)
    again = copy.deepcopy(changed)
    with torch.no_grad():
        changed.fc.weight.zero_()
    x = torch.rand(1, 3, 32, 32)
    assert not torch.equal(changed(x), again(x))
    if isinstance(activation, SplitReLU):
        assert torch.equal(again(x), model(x))
