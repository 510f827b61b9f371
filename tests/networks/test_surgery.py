"""Denoising blocks put where they are asked for, and nowhere else."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torchvision
from torch import nn

from art_denoised import (
    FeatureDenoising,
    InputError,
    SmoothReLU,
    add_feature_denoising,
    smooth_activations,
)
from art_denoised.networks import added_cost, change_network, count_rectifiers
from tests.networks.nets import CifarResNet

BASIC, BOTTLENECK = (64, 128, 256, 512), (256, 512, 1024, 2048)
DEPTHS = {  # blocks in each stage, and their channels
    "resnet18": ((2, 2, 2, 2), BASIC),
    "resnet34": ((3, 4, 6, 3), BASIC),
    "resnet50": ((3, 4, 6, 3), BOTTLENECK),
    "resnet101": ((3, 4, 23, 3), BOTTLENECK),
    "resnet152": ((3, 8, 36, 3), BOTTLENECK),
    "resnext50_32x4d": ((3, 4, 6, 3), BOTTLENECK),
    "wide_resnet50_2": ((3, 4, 6, 3), BOTTLENECK),
}


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return torchvision.models.get_model(name)


def blocks(model: nn.Module) -> list[str]:
    return [n.removesuffix(".denoise") for n, m in model.named_modules() if of_ours(m)]


def of_ours(module: nn.Module) -> bool:
    return isinstance(module, FeatureDenoising)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def gaussian(channels: int) -> int:
    """Parameters of a block: theta and phi to C / 2 channels, the 1x1, the batch norm."""
    return 2 * channels * channels // 2 + channels * channels + 2 * channels


def woken(model: nn.Module) -> nn.Module:
    """Blocks that do something."""
    for module in model.modules():
        if of_ours(module):
            nn.init.constant_(module.bn.weight, 0.5)
    return model


@pytest.mark.parametrize("name", DEPTHS)
def test_resnets_of_torchvision_of_every_kind_and_depth(name):
    depths, channels = DEPTHS[name]
    model = on_meta(name).eval()
    changed = add_feature_denoising(model, input_shape=(3, 32, 32))
    last = [f"layer{stage + 1}.{depth - 1}" for stage, depth in enumerate(depths)]
    assert blocks(changed) == last
    assert [m.channels for m in changed.modules() if of_ours(m)] == list(channels)
    assert parameters(changed) - parameters(model) == sum(map(gaussian, channels))
    kept = [key.replace(".block.", ".") for key in changed.state_dict() if ".denoise." not in key]
    assert kept == list(model.state_dict())
    assert blocks(model) == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", ["layer1.1", "layer2.1", "layer3.1", "layer4.1"]),
        ("resnet26d", ["layer1.1", "layer2.1", "layer3.1", "layer4.1"]),
        ("resnext50_32x4d", ["layer1.2", "layer2.3", "layer3.5", "layer4.2"]),
        ("wide_resnet50_2", ["layer1.2", "layer2.3", "layer3.5", "layer4.2"]),
        ("resnetv2_50", [f"stages.{i}.blocks.{j}" for i, j in enumerate((2, 3, 5, 2))]),
    ],
)
def test_resnets_of_timm(name, expected):
    with torch.device("meta"):
        model = timm.create_model(name)
    changed = add_feature_denoising(model, operation="mean")
    assert blocks(changed) == expected
    assert changed.training
    assert changed(torch.zeros(2, 3, 64, 64, device="meta")).shape == (2, 1000)


def test_dilated_stages_are_told_by_their_channels():
    model = torchvision.models.resnet50(replace_stride_with_dilation=[False, True, True])
    assert blocks(add_feature_denoising(model)) == ["layer1.2", "layer2.3", "layer3.5", "layer4.2"]


@pytest.mark.parametrize("operation", ["gaussian", "dot_product", "bilateral_gaussian", "median"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_blocks_leave_the_function_exactly(operation, dtype):
    torch.manual_seed(0)
    model = CifarResNet(side=16).to(dtype).eval()
    for where in ("stages", "all"):
        changed = add_feature_denoising(model, where, operation, input_shape=(3, 16, 16))
        for x in (torch.rand(2, 3, 16, 16), torch.rand(3, 3, 16, 16) * 5 - 2):
            assert torch.equal(changed(x.to(dtype)), model(x.to(dtype)))
        x = torch.rand(4, 3, 16, 16).to(dtype)
        assert torch.equal(changed.train()(x), copy.deepcopy(model).train()(x))
        assert not torch.equal(woken(changed).eval()(x), model(x))
    assert not any(module.training for module in model.modules())


def test_places():
    model = CifarResNet()

    def places(where) -> list[str]:
        return blocks(add_feature_denoising(model, where, "mean", input_shape=(3, 32, 32)))

    assert places("stages") == ["blocks.1", "blocks.3", "blocks.5"]
    assert places("all") == [f"blocks.{i}" for i in range(6)]
    assert places("blocks.[24]") == ["blocks.2", "blocks.4"]
    assert places("blocks.*") == places("all")
    assert places("blocks.*.conv1") == [f"blocks.{i}.conv1" for i in range(6)]
    assert places(["stem", "blocks.0"]) == ["stem", "blocks.0"]
    nested = add_feature_denoising(model, ["blocks", "blocks.0"], "mean", input_shape=(3, 32, 32))
    assert blocks(nested) == ["blocks.block.0", "blocks"]
    assert nested(torch.rand(1, 3, 32, 32)).shape == (1, 10)


@pytest.mark.parametrize(
    ("where", "activation", "expected"),
    [
        (None, None, ["blocks.1", "blocks.3"]),
        ("all", None, [f"blocks.{i}" for i in range(4)]),
        ("blocks.0,blocks.2", "silu", ["blocks.0", "blocks.2"]),
    ],
)
def test_changes_are_those_that_a_file_notes(where, activation, expected):
    model, shape = CifarResNet((4, 6), side=8), (3, 8, 8)
    note = {"feature_denoising": "mean", "where": where, "input_shape": shape}
    changed = change_network(model, {**note, "activation": activation})
    assert blocks(changed) == expected
    assert bool(count_rectifiers(changed, shape)) == (activation is None)


@pytest.mark.parametrize(
    ("change", "images"),
    [
        (lambda model: added_cost(model, model), 1),
        (lambda model: add_feature_denoising(model, "conv", "mean"), 1),
    ],
)
def test_images_have_three_channels_of_64_pixels_by_default(change, images):
    seen: list[tuple[int, ...]] = []

    class Sees(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            seen.append(tuple(x.shape))
            return self.conv(x)

    change(Sees())
    assert set(seen) == {(images, 3, 64, 64)}


def test_a_module_under_two_names_is_wrapped_under_both():
    model = CifarResNet()
    model.last = model.blocks[5]
    changed = add_feature_denoising(model, "blocks.5", "mean", input_shape=(3, 32, 32))
    assert changed.last is changed.blocks[5]
    assert of_ours(changed.last.denoise)


def test_smooth_activations_and_blocks_in_either_order():
    torch.manual_seed(0)
    model, x = CifarResNet().eval(), torch.rand(2, 3, 32, 32)

    def blocked(m: nn.Module) -> nn.Module:
        return add_feature_denoising(m, operation="dot_product", input_shape=(3, 32, 32))

    def smooth(m: nn.Module) -> nn.Module:
        return smooth_activations(m, SmoothReLU(), input_shape=(3, 32, 32))

    one, other = blocked(smooth(model)), blocked(model)
    other = woken(smooth(other)).eval()
    one.load_state_dict(other.state_dict(), strict=True)
    assert torch.equal(one(x), other(x))


def test_it_compiles_exports_and_takes_channels_last_and_replicas():
    torch.manual_seed(0)
    model = CifarResNet((4, 6), side=16).eval()
    model = add_feature_denoising(model, input_shape=(3, 16, 16))
    model = woken(smooth_activations(model, SmoothReLU(), input_shape=(3, 16, 16)))
    x = torch.rand(2, 3, 16, 16)
    y = model(x)
    assert torch.allclose(torch.compile(model, backend="eager", fullgraph=True)(x), y, atol=1e-5)
    assert torch.allclose(torch.export.export(model, (x,)).module()(x), y, atol=1e-5)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    assert torch.allclose(last(x.contiguous(memory_format=torch.channels_last)), y, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(model(x).float(), y, atol=0.1)
    replica = replicate(model)
    assert torch.equal(replica(x), y)
    with torch.no_grad():
        model.fc.weight.zero_()
        model.stem.weight.zero_()
    assert torch.equal(replica(x), y)  # its forward reads its own weights


def replicate(model: nn.Module) -> nn.Module:
    """As DataParallel does it, from the CPU to the CPU."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in copies.items():
        for name, child in module._modules.items():
            replica._modules[name] = copies[child]
        for name, p in module._parameters.items():
            replica._parameters[name] = None
            if p is not None:
                setattr(replica, name, nn.Parameter(p.detach().clone()))
    return copies[model]


def test_cost_of_the_paper_s_four_blocks():
    """At 224 px 11.15 M parameters and 5.96 GMAC, for ResNet-152 as for ResNet-50."""
    model = on_meta("resnet50")
    cost = added_cost(model, add_feature_denoising(model), (3, 224, 224))
    assert cost.parameters == sum(map(gaussian, BOTTLENECK)) == 11_148_800
    spots = [(side * side, c) for side, c in zip((56, 28, 14, 7), BOTTLENECK, strict=True)]
    by_hand = sum(2 * n * c * c + n * n * (c // 2) + n * n * c for n, c in spots)
    assert cost.macs == by_hand
    assert "5.96 GMAC" in str(cost)


def test_cost_is_the_same_where_it_is_computed():
    model = CifarResNet()
    changed = add_feature_denoising(model, input_shape=(3, 32, 32))
    here = added_cost(model, changed, (3, 32, 32))
    assert here == added_cost(model.to("meta"), changed.to("meta"), (3, 32, 32))
    assert here.macs > 0


@pytest.mark.filterwarnings("ignore:torch.quantize")
def test_bad_input():
    small = {"input_shape": (3, 32, 32)}
    done = add_feature_denoising(CifarResNet(), **small)
    for model, options, reason in (
        (CifarResNet(), {"where": "layer1", **small}, r"'layer1'; give some of blocks.0, blocks.1"),
        (CifarResNet(), {"where": "blocks.9", **small}, "blocks.5$"),
        (CifarResNet(), {"where": "fc", **small}, r"fc returns shape \(1, 10\)"),
        (CifarResNet(), {"where": [], **small}, "where is empty"),
        (CifarResNet(), {"operation": "mode", **small}, "operation is 'mode'"),
        (CifarResNet(), {}, "give the input_shape that it takes"),
        (CifarResNet((5, 7)), small, "channels is 5"),
        (done, small, "blocks.1 has a denoising block"),
        (nn.Sequential(nn.Conv2d(3, 4, 3)), {}, "no residual blocks"),
        (nn.Sequential(Branching()), {}, "within its parts 0$"),
        (nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh())), {}, "its parts 0.0, 0.1$"),
        (torch.compile(CifarResNet()), small, "compiled; change the model first"),
        (nn.Sequential(torch.ao.nn.quantized.Conv2d(3, 4, 3)), {"where": "0"}, "quantised"),
        (nn.Sequential(nn.LSTM(64, 4)), {"where": "0", "input_shape": (3, 64)}, "returns tuple"),
    ):
        with pytest.raises(InputError, match=reason) as refused:
            add_feature_denoising(model, **options)
        assert "\n" not in str(refused.value)


class Branching(nn.Conv2d):
    """Has no graph, so that nothing is known of what it adds."""

    def __init__(self) -> None:
        super().__init__(3, 4, 3)

    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


class Reading(nn.Module):
    """Uses its parts for more than to call them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.how = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), how

    def forward(self, x):
        y = self.b(self.a(x))
        if self.how == "attribute":
            return y[:, : self.a.out_channels]
        if self.how == "draws":
            return y + torch.rand(1)
        return y + isinstance(self.a, nn.Conv2d)


def test_a_result_that_cannot_run_or_computes_something_else_is_refused():
    for how, reason in (
        ("attribute", "after a does not work .AttributeError: .* no attribute 'out_channels'"),
        ("type", "after a does not work .the model no longer computes the same"),
    ):
        with pytest.raises(InputError, match=reason) as refused:
            add_feature_denoising(Reading(how), ["b", "a"], "mean")
        assert "\n" not in str(refused.value)
        assert blocks(add_feature_denoising(Reading(how), "b", "mean")) == ["b"]
    with pytest.raises(InputError, match="after a does not work"):  # no identity, but it must run
        add_feature_denoising(Reading("attribute"), "a", "mean", conv=False)
    assert blocks(add_feature_denoising(Reading("type"), "a", "mean", conv=False)) == ["a"]


def test_models_that_draw_are_compared_by_the_same_draws():
    model = Reading("draws")
    state = torch.get_rng_state()
    added_cost(model, model)
    assert torch.equal(torch.get_rng_state(), state)
    assert blocks(add_feature_denoising(model, "a", "mean")) == ["a"]


def test_grouped_convolutions_are_no_obstacle():
    model = torchvision.models.resnext50_32x4d().eval()
    changed = add_feature_denoising(model, "layer1.0.conv2", "mean")
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(changed(x), model(x))
