"""Networks that are made faster compute the same, and are served as they were certified."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn
from torchvision.models import densenet121, resnet18

from art_denoised import DenoisedClassifier, FixedN, InputError, Smoother
from art_denoised.demo import digits_classifier, digits_denoiser
from art_denoised.networks import Optimization, load_trained, optimize, save_optimized
from art_denoised.runs import identity
from art_denoised.runs.workers import SentNetwork


def calibrated(network: nn.Module) -> nn.Module:
    """Give batch norms statistics and weights that are not those of a new network."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return network.eval()


class Block(nn.Module):
    """Two convolutions, of which the second is used twice, and one whose output is seen."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.a, self.b, self.c = (nn.BatchNorm2d(3) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(self.first(x)).relu()
        x = self.b(self.second(self.b(self.second(x))))
        seen = self.third(x)
        return (self.c(seen) + seen).mean((2, 3))


@torch.no_grad()
def test_networks_compute_the_same_up_to_rounding():
    x = torch.rand(2, 3, 64, 64)
    network = calibrated(resnet18(num_classes=10))
    fast = optimize(network)
    assert len(fast.optimized.folded) == 20
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fast.modules())
    assert torch.allclose(fast(x), network(x), rtol=1e-4, atol=1e-4)
    assert fast.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert any(isinstance(m, nn.BatchNorm2d) for m in network.modules())  # which is left as it was


def test_one_and_eight_images_of_three_channels_of_64_pixels_are_tried_by_default():
    """Code may do something else with one image."""
    seen: list[tuple[int, ...]] = []

    class Sees(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(tuple(x.shape) if isinstance(x, torch.Tensor) else ())
            return super().forward(x)

    optimize(calibrated(Sees()))
    assert set(seen) - {()} == {(1, 3, 64, 64), (8, 3, 64, 64)}


def test_what_cannot_be_folded_is_left():
    """A layer that runs twice, one whose output goes elsewhere, and norms before convolutions."""
    assert optimize(calibrated(Block())).optimized.folded == (("first", "a"),)
    hooked = calibrated(Block())
    hooked.first.register_forward_hook(lambda module, x, y: 2 * y)
    assert optimize(hooked).optimized.folded == ()
    network = calibrated(densenet121(num_classes=10))
    left = sum(isinstance(m, nn.BatchNorm2d) for m in optimize(network).modules())
    assert 0 < left < sum(isinstance(m, nn.BatchNorm2d) for m in network.modules())


class Outer(nn.Module):
    """Calls a block, and then may reach into it: the way is given by its class."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()


class UsesWeight(Outer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x) + torch.conv2d(x, self.block.first.weight).mean((2, 3))


class BranchesOnBatch(Outer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.block(x)
        return y if len(x) <= 10 else y + self.block.first(x).mean((2, 3))


class CallsLayers(Outer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block.a(self.block.first(x)).mean((2, 3))


class CallsBlock(Outer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x)


class Hides(CallsBlock):
    """Gives a block to a part that is not around it, where no trace sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.peek = Peek(self.block)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x) + self.peek(x)


class Peek(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.hidden = [block]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.hidden[0].first.weight
        return torch.conv2d(x, weight).mean((2, 3)) if len(x) > 2 else x.mean((2, 3))


class Shares(CallsBlock):
    """Calls a norm of its block again, from a part where no trace sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.tail = Tail(self.block.a)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tail(self.block(x))


class Tail(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.hidden = [norm]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.hidden[0](x[:, :, None, None]).flatten(1)


def test_layers_that_other_code_may_use_are_left():
    """Whether or not the batches of the trials take that branch."""
    found = {
        kind: optimize(calibrated(kind())).optimized.folded
        for kind in (CallsBlock, UsesWeight, BranchesOnBatch, CallsLayers, Shares)
    }
    assert found == {
        CallsBlock: (("block.first", "block.a"),),
        UsesWeight: (),
        BranchesOnBatch: (),
        CallsLayers: (("block.first", "block.a"),),
        Shares: (),
    }
    network = calibrated(Hides())
    with pytest.raises(InputError, match="fold=False"):
        optimize(network)
    assert optimize(network, fold=False).optimized.folded == ()
    with pytest.raises(InputError, match="training mode"):
        optimize(network.train())


class Residual(Block):
    """Has a shortcut without layers, as those of ResNets for CIFAR have."""

    def __init__(self) -> None:
        super().__init__()
        self.shortcut = nn.Sequential()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.shortcut(x).mean((2, 3))


def test_a_block_with_an_empty_shortcut_is_folded():
    assert optimize(calibrated(Residual())).optimized.folded == (("first", "a"),)


def test_a_layer_with_two_names_is_left():
    network = calibrated(Block())
    network.other = network.first
    assert optimize(network).optimized.folded == ()


def test_a_network_whose_answers_are_zero_is_folded():
    network = nn.Sequential(calibrated(Block()), nn.Linear(3, 2))
    for parameter in network[1].parameters():
        nn.init.zeros_(parameter)
    assert optimize(network.eval()).optimized.folded == (("0.first", "0.a"),)


def test_half_precision_is_rounded_once():
    half = calibrated(Block()).bfloat16()
    exact = optimize(copy.deepcopy(half).double()).first
    folded = optimize(half).first
    assert torch.equal(folded.weight, exact.weight.bfloat16())
    assert torch.equal(folded.bias, exact.bias.bfloat16())


@pytest.mark.parametrize("dtype", ["float8", "float32", torch.float32, torch.int8, 16])
def test_other_types_are_refused(dtype):
    with pytest.raises(InputError, match="dtype"):
        optimize(calibrated(Block()), dtype=dtype)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_networks_that_cannot_be_copied_are_refused(norm):
    network = calibrated(Block())
    norm(network.first)
    network.first(torch.rand(1, 3, 8, 8))
    with pytest.raises(InputError, match="cannot be copied"):
        optimize(network)


def test_the_optimized_network_is_certified_and_served(tmp_path, digits):
    """Behind a denoiser, in bfloat16, saved, and made again of what its code builds."""

    def network() -> nn.Module:
        return DenoisedClassifier(digits_classifier(), digits_denoiser(), sigma=0.25)

    fast = optimize(network(), dtype=torch.bfloat16, input_shape=(1, 8, 8))
    assert fast.optimized.dtype == "bfloat16"
    assert fast.optimized.folded
    save_optimized(fast, tmp_path / "fast.safetensors")
    served = load_trained(network(), tmp_path / "fast.safetensors")
    assert identity(served) == identity(fast) != identity(network())
    x = digits[0][:2]
    (one, two), (plain, _) = (
        Smoother(net, sigma=0.25).certify(x, FixedN(200)) for net in (served, network())
    )
    again = Smoother(fast, sigma=0.25).certify(x, FixedN(200))
    assert [one, two] == again
    assert one.dtype == "bfloat16"
    assert abs(one.counts[one.label] - plain.counts[plain.label]) < 20


def test_files_of_other_networks_are_refused(tmp_path):
    with pytest.raises(InputError, match="not optimized"):
        save_optimized(digits_classifier(), tmp_path / "a.safetensors")
    save_optimized(optimize(calibrated(Block())), tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="no first with a"):
        load_trained(digits_classifier(), tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("base", "options", "words"),
    [
        (None, {"fold": "no"}, "fold is 'no'"),  # which counted as True
        (None, {"compile": 1}, "compile is 1"),
        (None, {"input_shape": 8}, "input_shape is 8"),
        (None, {"input_shape": "1,8,8"}, "input_shape is '1,8,8'"),
        (None, {"input_shape": (1, 8, True)}, "input_shape is True"),
        (None, {"input_shape": iter((1, 8, 8))}, "input_shape is <"),
        (len, {}, "builtin_function"),
        (nn.ReLU, {}, "type"),
    ],
)
def test_what_cannot_be_optimized_is_refused(base, options, words):
    with pytest.raises(InputError, match=words):
        optimize(base or digits_classifier(), **{"input_shape": (1, 8, 8)} | options)


@pytest.mark.parametrize("name", ["fast.pth", "."])
def test_an_optimized_network_is_written_to_what_is_read_again(tmp_path, name):
    fast = optimize(digits_classifier(), dtype="bfloat16", input_shape=(1, 8, 8))
    with pytest.raises(InputError, match=re.escape(str(tmp_path / name))):
        save_optimized(fast, tmp_path / name)


def compiling(monkeypatch, backend="eager"):
    """Let torch compile with another backend, which needs no compiler of C++."""
    real = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **options: real(function, backend=backend, **options)
    )
    torch.compiler.reset()


def test_every_shape_is_compiled_or_refused(monkeypatch):
    """By default torch stops to compile after eight shapes, without an error."""
    shapes = []

    def backend(graph, inputs):
        shapes.append(inputs)
        return graph.forward

    compiling(monkeypatch, backend)
    net = optimize(nn.Flatten().eval(), fold=False, compile=True)
    for images in range(2, 14):
        assert net(torch.rand(images, 3, 2, 2)).shape == (images, 12)
    assert len(shapes) == 12
    further = [torch.rand(images, 3, 2, 2) for images in range(14, 40)]
    with pytest.raises(InputError, match="shapes"):
        [net(x) for x in further]
    torch.compiler.reset()


class Mixed(nn.Module):
    """What a compiler may take for constants: parameters, buffers and tensors that are neither."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten())
        self.factor, self.listed = torch.ones(1), [torch.ones(1)]

    def forward(self, x):
        return self.layers(x) * self.factor * self.listed[0]


@pytest.mark.parametrize(
    "change",
    [
        lambda net: next(net.parameters()).mul_(2),
        lambda net: next(net.parameters()).data.mul_(-1),
        lambda net: next(net.parameters()).detach().numpy().__imul__(2),
        lambda net: next(net.buffers()).add_(1),
        lambda net: net.load_state_dict(
            {k: 2 * v for k, v in net.state_dict().items()}, assign=True
        ),
        lambda net: net.factor.mul_(3),
        lambda net: net.listed[0].mul_(3),
        lambda net: net.layers[0].register_forward_hook(lambda module, x, y: y * 2),
        lambda net: setattr(net.layers, "0", nn.Conv2d(1, 2, 3)),
    ],
)
def test_a_compiled_network_does_not_change_without_a_word(monkeypatch, change):
    """The compiler holds copies of its tensors, which would answer."""
    compiling(monkeypatch)
    net = optimize(Mixed().eval(), fold=False, compile=True, input_shape=(1, 8, 8))
    x = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        before = net(x)
        assert torch.equal(net(x), before)
        change(net)
        with pytest.raises(InputError, match="optimize"):
            net(x)
    net(x)  # with gradients, tensors are read
    torch.compiler.reset()


def test_weights_that_count_no_versions_do_not_change_without_a_word(monkeypatch):
    compiling(monkeypatch)
    with torch.inference_mode():
        net = optimize(Mixed().eval(), fold=False, compile=True, input_shape=(1, 8, 8))
        x = torch.rand(2, 1, 8, 8)
        net(x)
        next(net.parameters()).mul_(2)
        with pytest.raises(InputError, match="optimize"):
            net(x)
    torch.compiler.reset()


def test_a_compiled_network_with_weights_that_are_no_numbers_has_not_changed(monkeypatch):
    compiling(monkeypatch)
    net = optimize(Mixed().eval(), fold=False, compile=True, input_shape=(1, 8, 8))
    with torch.no_grad():
        net.layers[0].weight[0] = torch.nan
        for _ in range(2):
            assert net(torch.rand(2, 1, 8, 8)).isnan().any()
    torch.compiler.reset()


def test_hooks_of_a_compiled_network_come_and_go(monkeypatch):
    """Attacks hang hooks on a network for each batch; each would be compiled."""
    compiling(monkeypatch)
    net = optimize(Mixed().eval(), fold=False, compile=True, input_shape=(1, 8, 8))
    x = torch.rand(2, 1, 8, 8)
    before = net(x)
    for i in range(50):
        hook = net.register_forward_hook(lambda module, inputs, output, i=i: output + i)
        assert torch.equal(net(x), before + i)
        hook.remove()
    assert torch.equal(net(x), before)
    torch.compiler.reset()


def test_a_compiled_network_is_not_sent_to_workers():
    net = nn.Sequential(nn.Flatten())
    assert SentNetwork(net)() is net
    net[0].compile(backend="eager")
    with pytest.raises(InputError, match="compiled"):
        SentNetwork(net)


def test_compiling_is_noted(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda forward, **options: compiled.append(options))
    assert optimize(calibrated(Block()), compile=True).optimized == Optimization(
        (("first", "a"),), None, True
    )
    assert compiled == [{"dynamic": False}]
