"""Smooth activations put wherever ReLU is called, and nothing else changed."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import fx, nn
from torch.nn import functional as F

from art_denoised import (
    InputError,
    ParametricSoftplus,
    SmoothReLU,
    SplitReLU,
    add_feature_denoising,
)
from art_denoised import smooth_activations as smooth_activations_of
from art_denoised.networks import count_rectifiers
from tests.networks.nets import Awkward, Basic, CifarResNet, Deciding, Tree, WithAuxiliary

SHAPE = (3, 32, 32)
smooth_activations = partial(smooth_activations_of, input_shape=SHAPE)


def on_meta(make: Callable[..., nn.Module], **options) -> nn.Module:
    with torch.device("meta"):
        return make(**options).eval()


def number(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


def functional(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Rectifiers that run, and not in a module of their own."""
    counts = count_rectifiers(model, shape).items()
    return sum(n for name, n in counts if not isinstance(model.get_submodule(name), nn.ReLU))


@pytest.mark.parametrize(
    ("name", "options", "calls", "functions", "modules"),
    [
        ("resnet50", {}, 49, 0, 49),
        ("densenet121", {}, 121, 1, 121),
        ("inception_v3", {"init_weights": False}, 94, 94, 96),  # two in the auxiliary head
        ("googlenet", {"init_weights": False, "aux_logits": False}, 57, 57, 57),
    ],
)
def test_coverage_of_torchvision_s_models(name, options, calls, functions, modules):
    model = on_meta(torchvision.models.get_model, name=name, **options)
    shape = (3, 299, 299) if name == "inception_v3" else (3, 64, 64)
    assert sum(count_rectifiers(model, shape).values()) == calls
    assert functional(model, shape) == functions
    changed = smooth_activations(model, "silu", input_shape=shape)
    assert number(changed, nn.SiLU) == modules
    assert count_rectifiers(changed, shape) == count_rectifiers(changed.train(), shape) == {}
    assert sum(count_rectifiers(model, shape).values()) == calls


@pytest.mark.parametrize(
    ("name", "shape", "modules"),
    [
        ("mobilenetv2_100", (3, 32, 32), 35),  # ReLU6
        ("dla34", (3, 32, 32), 33),
        ("res2net50_26w_4s", (3, 32, 32), 81),
        ("skresnet18", (3, 32, 32), 33),
        ("hrnet_w18_small", (3, 64, 64), 72),  # calls one module often, and cannot be traced,
    ],
)
def test_networks_of_timm(name, shape, modules):
    model = on_meta(timm.create_model, model_name=name)
    changed = smooth_activations(model, "silu", input_shape=shape)
    assert number(changed, nn.SiLU) == modules
    assert count_rectifiers(changed, shape) == {}


@pytest.mark.parametrize("change", [count_rectifiers, lambda m: smooth_activations_of(m, "silu")])
def test_two_images_of_three_channels_of_64_pixels_are_tried_by_default(change):
    seen: list[tuple[int, ...]] = []

    class Sees(nn.ReLU):
        def __call__(self, x):
            seen.append(tuple(x.shape))
            return super().__call__(x)

    change(nn.Sequential(Sees(), nn.ReLU()))
    assert set(seen) == {(2, 3, 64, 64)}


def test_a_module_that_calls_rectifiers_once_keeps_its_class_and_forward():
    class Once(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu = nn.Conv2d(3, 4, 3), nn.ReLU()

        def forward(self, x):
            return self.relu(self.conv(x))

    changed = smooth_activations(nn.Sequential(Once(), nn.Conv2d(4, 3, 3), Plain()), "silu")
    assert type(changed[0]) is Once
    assert type(changed[2]).__name__ == "SmoothedPlain"


def test_relu6_is_counted_and_other_clamps_are_not():
    model = nn.Sequential(nn.ReLU6(), nn.Hardtanh(), nn.Hardtanh(1, 6), nn.Hardtanh(0, 6, True))
    assert count_rectifiers(model, SHAPE) == {"0": 1, "3": 1}


@pytest.mark.parametrize("make", [Awkward, CifarResNet], ids=lambda make: make.__name__)
@pytest.mark.parametrize("training", [False, True])
def test_relu_in_place_of_relu_is_the_same_function(make, training):
    """The surgery alone changes nothing: not the values, the gradients, the mode or the dropout."""
    torch.manual_seed(0)
    model = make().train(training)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    draws = torch.get_rng_state()
    changed = smooth_activations(model, nn.ReLU())
    assert torch.equal(torch.get_rng_state(), draws)
    for network in (model, changed):
        assert all(module.training == training for module in network.modules())
        assert all(torch.equal(network.state_dict()[name], state[name]) for name in state)
    for mode in (training, not training):
        results = []
        for network in (model.train(mode), changed.train(mode)):
            torch.manual_seed(1)
            x = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(2))
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
    called.clear()  # hooks run in the trial runs as well
    changed(torch.rand(1, 3, 4, 4))
    assert called == [1]
    assert number(changed, nn.GELU) == 2
    assert number(changed, nn.Hardswish) == 1


def test_a_module_under_two_names_is_unshared():
    relu = nn.ReLU()
    changed = smooth_activations(nn.Sequential(relu, nn.Identity(), relu), SmoothReLU())
    assert changed[0] is not changed[2]
    assert number(changed, SmoothReLU) == 2


def test_traced_graphs_are_changed_too():
    model = torch.fx.symbolic_trace(CifarResNet().eval())
    changed = copy.deepcopy(smooth_activations(model, "silu"))
    assert number(changed, nn.SiLU) == 13
    assert count_rectifiers(changed, SHAPE) == {}
    assert count_rectifiers(model, SHAPE) == {"": 13}


def test_paths_that_depend_on_the_mode():
    """They stay where only modules are called; a functional call among them is refused."""
    model, x = WithAuxiliary(functional=False), torch.rand(1, 3, 5, 5)
    model(x)
    changed = smooth_activations(model.eval(), nn.ReLU(), input_shape=(3, 5, 5))
    assert torch.equal(changed(x), model(x))
    assert torch.equal(changed.train()(x), model.train()(x))
    model = WithAuxiliary(functional=True)
    model(x)
    with pytest.raises(InputError, match=r"the model \(WithAuxiliary\) runs 1 ReLU"):
        smooth_activations(model, "silu", input_shape=(3, 5, 5))


def test_optional_arguments_are_what_callers_make_of_them():
    torch.manual_seed(0)
    model, x = Tree(shared=False), torch.randn(2, 3, 4, 4)
    assert torch.equal(smooth_activations(model, nn.ReLU())(x), model(x))
    with pytest.raises(InputError, match=r"b \(Optional\) runs 2 ReLU .* different arguments"):
        smooth_activations(Tree(shared=True), "silu")


class Typed(Basic):
    def forward(self, x):
        return F.relu(x if isinstance(x, torch.Tensor) else torch.cat(x, 1))


class Making(nn.Module):
    def forward(self, x):
        return F.relu(x + torch.ones(3, 1, 1))


class Plain(nn.Module):
    """What the awkward ones below share; each calls ReLU as a function, so is rewritten."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.generator = torch.Generator().manual_seed(0)
        self.register_buffer("gate", torch.ones(1))

    def forward(self, x):
        return F.relu(self.conv(x))


class Dropped(Plain):
    def forward(self, x):
        return x if self.training and torch.rand(1).item() < 0.5 else F.relu(x)


class DroppedByPython(Plain):
    def forward(self, x):
        return x if random.random() < 0.5 else F.relu(x)


class DroppedByNumpy(Plain):
    def forward(self, x):
        return x if np.random.rand() < 0.5 else F.relu(x)


class DroppedByItsOwn(Plain):
    def forward(self, x):
        return x if torch.rand(1, generator=self.generator).item() < 0.5 else F.relu(x)


class Gated(Plain):
    def forward(self, x):
        return F.relu(x) if self.gate > 0 else x


@pytest.mark.parametrize("make", [Dropped, DroppedByPython, DroppedByNumpy])
def test_nothing_drawn_while_tracing_is_kept_and_no_global_state_moves(make):
    for seed in range(4):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        model = make()
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]
        with pytest.raises(InputError):
            smooth_activations(model, "silu")
        assert torch.equal(before[0], torch.get_rng_state())
        assert before[1] == random.getstate()
        assert (before[2] == np.random.get_state()[1]).all()


@pytest.mark.parametrize("make", [DroppedByItsOwn, Gated])  # a buffer may change
def test_values_that_are_read_while_tracing_are_not_kept(make):
    with pytest.raises(InputError, match=rf"{make.__name__}.* ReLU"):
        smooth_activations(make(), "silu")


class Aliased(Plain):
    """One view made before a call in place, and used after it."""

    def __init__(self, pattern):
        super().__init__()
        self.pattern = pattern
        self.same = nn.Sequential(nn.Identity(), nn.Flatten())
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.pattern(self, self.conv(x))


def view_returned(self, x):
    v = x.flatten(1)
    F.relu_(x)
    return v


def base_returned(self, x):
    F.relu(x[:, :2], inplace=True)
    return x


def base_of_a_module(self, x):
    self.relu(self.same(x))
    return x


def old_name_of_a_sum(self, x):
    y = x
    x += 1
    x.relu_()
    return y.sum() + x


def update_of_a_sum(self, x):
    y = x
    x += 1
    return y.sum() + F.relu(x)


def view_made_later(self, x):
    n = x.shape[0]
    F.relu_(x)
    return x.reshape(n, -1)


def view_used_before(self, x):
    total = x.flatten(1).sum()
    return F.relu_(x) + total


def copy_used_later(self, x):
    y = x * 1
    return self.relu(x) + y


def test_what_a_call_in_place_changes_by_another_name_is_refused():
    torch.manual_seed(0)  # weights by which some features are negative
    for pattern in (
        view_returned,
        base_returned,
        base_of_a_module,
        old_name_of_a_sum,
        update_of_a_sum,
    ):
        with pytest.raises(InputError, match=r"the model \(Aliased\) no longer computes the same"):
            smooth_activations(Aliased(pattern), nn.ReLU())
    x = torch.randn(2, 3, 4, 4)
    for pattern in (view_made_later, view_used_before, copy_used_later):
        model = Aliased(pattern)
        assert torch.equal(smooth_activations(model, nn.ReLU())(x), model(x))


class ByTensor(Plain):
    def forward(self, x):
        return self.run(x)

    def run(self, x):
        return F.relu(self.conv(x if torch.is_tensor(x) else x[0]))


def first(x):
    return x if type(x) is torch.Tensor else x[0]


class ByFunction(Plain):
    def forward(self, x):
        return F.relu(self.conv(first(x)))


class ByAttribute(Plain):
    def forward(self, x):
        return F.relu(self.conv(x.image if hasattr(x, "image") else x))


FACTOR = torch.tensor(2.0)


class ByConstant(Plain):
    def forward(self, x):
        return F.relu(self.conv(x)) * FACTOR


@pytest.mark.parametrize("make", [ByTensor, ByFunction, ByAttribute, ByConstant])
def test_forwards_that_take_another_path_for_a_proxy_are_refused(make):
    with pytest.raises(InputError, match=rf"the model \({make.__name__}\)"):
        smooth_activations(make(), nn.ReLU())


def test_a_forward_set_on_the_instance_is_refused():
    model = nn.Sequential(Plain())
    old = model[0].forward
    model[0].forward = lambda x: old(x) * 1.0
    for change in (
        lambda: smooth_activations(model, "silu"),
        lambda: add_feature_denoising(model, "0.conv", "mean"),
    ):
        with pytest.raises(InputError, match=r"0 \(Plain\) has a forward set on the instance"):
            change()


class Fixed(nn.Module):
    """Nothing in it can be traced, and nothing in it calls ReLU."""

    def forward(self, x):
        return x if x.sum() > 0 else -x


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_what_cannot_be_replaced_is_refused_in_one_line():
    for model, shape, reason in (
        (Deciding(), (3, 4, 4), None),
        (nn.Sequential(Typed(3, 3)), (3, 4, 4), r"0 \(Typed\) cannot be rewritten"),
        (Making(), (3, 4, 4), r"\(Making\) runs 1 ReLU .* calls ones"),
        (nn.Sequential(nn.ReLU(), nn.RNN(8, 8, nonlinearity="relu")), (5, 8), r"1 \(RNN\) runs 2"),
        (torch.jit.freeze(torch.jit.trace(Basic(3, 3).eval(), torch.rand(1, 3, 4, 4))), SHAPE,
         "scripted"),
        (torch.ao.nn.intrinsic.ConvReLU2d(nn.Conv2d(3, 3, 1), nn.ReLU()), SHAPE, "quantised"),
        (torch.compile(Basic(3, 3)), SHAPE, "compiled; change the model first"),
        (nn.Sequential(nn.Linear(2, 2), nn.Tanh()), (2,), "Sequential calls no ReLU"),
        (CifarResNet(), (3, 40, 40), r"CifarResNet failed on an image of shape \(3, 40, 40\)"),
    ):  # fmt: skip
        if reason is None:
            assert count_rectifiers(smooth_activations(model, "silu", input_shape=shape)) == {}
            continue
        with pytest.raises(InputError, match=reason) as refused:
            smooth_activations(model, "silu", input_shape=shape)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "activation", ["relu", torch.relu, nn.ReLU()], ids=["name", "function", "module"]
)
def test_transformers_call_the_new_activation_also_on_their_fast_path(activation):
    model = nn.TransformerEncoderLayer(8, 1, activation=activation, batch_first=True).eval()
    changed = smooth_activations(model, "silu", input_shape=(5, 8))
    expected = nn.TransformerEncoderLayer(8, 1, activation=F.silu, batch_first=True).eval()
    expected.load_state_dict(model.state_dict())
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        assert torch.equal(changed(x), expected(x))


def test_activations_that_learn_are_not_shared_silently():
    model = nn.Sequential(Repeating())
    assert number(smooth_activations(model, "silu"), nn.SiLU) == 1
    with pytest.raises(InputError, match=r"0 \(Repeating\) calls 0.relu more than once"):
        smooth_activations(model, "smoothrelu")


class Repeating(nn.Module):
    """Cannot be traced, because its input decides."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(self.relu(x) - 0.5) if x.sum() > 0 else x


def rectify(x):
    return F.relu(x)


@fx.wrap
def wrapped(x):
    return rectify(x)


MEAN = np.array([0.1, 0.2])  # a name in a forward that is no function


def by_branch(self, x):
    return x - MEAN if x.sum() > 1e9 else rectify(x)


def by_wrapped(self, x):
    return wrapped(x)


def by_operator(self, x):
    return torch.ops.aten.relu(x)


def by_overload(self, x):
    return torch.ops.aten.relu.default(x)


def by_tensor_method(self, x):
    return torch.Tensor.relu(x)


def by_vmap(self, x):
    return torch.vmap(F.relu)(x)


@pytest.mark.parametrize(
    "forward", [by_branch, by_wrapped, by_operator, by_overload, by_tensor_method, by_vmap]
)
def test_relu_inside_what_a_forward_calls_is_refused_not_left(forward):
    inner = type("Inner", (nn.Module,), {"forward": forward})()
    with pytest.raises(InputError, match=r"0 \(Inner\) runs 1 ReLU"):
        smooth_activations(nn.Sequential(inner, nn.ReLU()), "silu")


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_relu_inside_a_scripted_function_is_refused(monkeypatch):
    monkeypatch.setitem(globals(), "compiled", torch.jit.script(rectify))
    with pytest.raises(InputError, match=r"0 \(Scripted\) runs 1 ReLU"):
        smooth_activations(nn.Sequential(Scripted(), nn.ReLU()), "silu")


class Scripted(nn.Module):
    def forward(self, x):
        return compiled(x)  # noqa: F821


class Shifted(nn.ReLU):
    def forward(self, x):
        return super().forward(x) - 0.5


class Choosing(nn.ReLU):
    def forward(self, x):
        return super().forward(x) if x.sum() != 0 else x


class ByAct(Plain):
    """Holds a function, and asks for the mode in an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.act = F.relu

    def forward(self, x):
        return F.relu(self.act(self.conv(x)) - 0.1, inplace=self.training)


def test_functions_that_a_module_holds_become_modules():
    model, x = ByAct(), torch.randn(2, 3, 4, 4)
    assert torch.equal(smooth_activations(model, nn.ReLU())(x), model(x))
    assert number(smooth_activations(model, "silu"), nn.SiLU) == 2


def test_a_subclass_of_relu_that_cannot_be_traced_is_refused():
    with pytest.raises(InputError, match=r"1 \(Choosing\) runs 1 ReLU"):
        smooth_activations(nn.Sequential(nn.ReLU(), Choosing()), "silu")


def test_a_subclass_of_relu_keeps_its_own_forward():
    x = torch.randn(4, 3)
    smooth = smooth_activations(nn.Sequential(Shifted()), "silu")
    torch.testing.assert_close(smooth(x), F.silu(x) - 0.5)


def test_bad_activations():
    for name, kind in (
        ("softplus", ParametricSoftplus),
        ("smoothrelu", SmoothReLU),
        ("mish", nn.Mish),
    ):
        assert number(smooth_activations(CifarResNet(), name), kind) == 13
    for activation, reason in (
        ("relu", "'relu'; give one of silu, gelu"),
        ("Softplus", "'Softplus'; give one of silu"),
        (nn.SiLU, "not a module"),
        (nn.ELU(0.5), r"give nn.CELU\(0.5\)"),
    ):
        with pytest.raises(InputError, match=reason):
            smooth_activations(CifarResNet(), activation)


@pytest.mark.parametrize(
    "activation", [ParametricSoftplus(10.0), SplitReLU(), "celu", "mish"], ids=str
)
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
