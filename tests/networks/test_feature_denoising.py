"""The denoising block: the identity at the start, its parts, its ablations, where it must run."""

from __future__ import annotations

import copy
from typing import get_args

import pytest
import torch
from torch import nn

from art_denoised import FeatureDenoising, InputError, networks
from art_denoised.networks import Operation

OPERATIONS = get_args(Operation)
PAIRWISE = ("gaussian", "dot_product", "bilateral_gaussian", "bilateral_dot_product")


def features(*shape: int, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape or (2, 8, 6, 5), generator=generator, dtype=dtype).clamp_min(0)


def trained(operation: str, **options) -> FeatureDenoising:
    """A block that is not fresh: every parameter and statistic has some value."""
    generator = torch.Generator().manual_seed(1)
    block = FeatureDenoising(8, operation, **options).eval()
    for name, tensor in block.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(noise.abs() + 0.5 if name.endswith("var") else noise)
    return block


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_fresh_block_is_the_identity_bit_for_bit(operation, train):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = features(dtype=dtype)
        for layout in (torch.contiguous_format, torch.channels_last):
            block = FeatureDenoising(8, operation).to(dtype, memory_format=layout).train(train)
            y = block(x.contiguous(memory_format=layout))
            assert y.dtype == dtype
            assert y.is_contiguous(memory_format=layout)
            assert torch.equal(y, x)
            assert not (torch.signbit(y) ^ torch.signbit(x)).any()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_fresh_block_learns_and_passes_gradients_on(operation):
    block, x = FeatureDenoising(8, operation), features().requires_grad_()
    (block(x).square().sum()).backward()
    assert torch.allclose(x.grad, 2 * x)  # as the identity would
    assert block.bn.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("embedding", [True, False])
@pytest.mark.parametrize("operation", PAIRWISE)
def test_the_equation(operation, embedding):
    """y = x + BN(conv(op(x, theta(x), phi(x)))), from the block's own parameters."""
    block, x = trained(operation, embedding=embedding), features()
    function = getattr(
        networks, operation if operation.startswith("bilateral") else f"non_local_{operation}"
    )
    state = block.state_dict()
    theta, phi = x, x
    if embedding:
        theta, phi = (
            torch.einsum("oi,bihw->bohw", state[f"embeddings.{n}.weight"][:, :, 0, 0], x)
            for n in ("theta", "phi")
        )
    y = torch.einsum("oi,bihw->bohw", state["conv.weight"][:, :, 0, 0], function(x, theta, phi))
    mean, var, gamma, beta = (
        state[f"bn.{n}"][:, None, None] for n in ("running_mean", "running_var", "weight", "bias")
    )
    expected = x + (y - mean) / (var + 1e-5).sqrt() * gamma + beta
    assert torch.allclose(block(x), expected, rtol=1e-4, atol=1e-4)


def test_windows_are_as_large_as_told():
    x = features()
    for operation, function in (
        ("mean", networks.local_mean),
        ("median", networks.local_median),
    ):
        block = FeatureDenoising(8, operation, kernel_size=5, conv=False, residual=False)
        assert torch.equal(block(x), function(x, 5))


def test_the_null_control_is_a_1x1_convolution():
    block, x = trained("none"), features()
    assert torch.equal(block(x), x + block.bn(block.conv(x)))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_parameters_and_names(operation):
    """By hand: C^2 of the 1x1, 2 C of the batch norm, and twice C^2 / 2 of embeddings."""
    for embedding in (True, False):
        block = FeatureDenoising(8, operation, embedding=embedding)
        learnt = 2 * 8 * 4 if embedding and operation in PAIRWISE else 0
        assert sum(p.numel() for p in block.parameters()) == 64 + 16 + learnt
        names = [name for name in block.state_dict() if name.startswith("embeddings")]
        assert names == ["embeddings.theta.weight", "embeddings.phi.weight"] * bool(learnt)


def test_embeddings_start_small_and_without_bias():
    torch.manual_seed(0)
    theta = FeatureDenoising(256).embeddings["theta"]
    assert theta.bias is None
    # That of 32,768 draws is within 2% but for one seed in a million, and the seed is fixed.
    assert float(theta.weight.detach().std()) == pytest.approx(0.01, rel=0.02)


def test_ablations():
    x = features()
    plain = FeatureDenoising(8, "mean", conv=False)
    assert torch.equal(plain(x), x + networks.local_mean(x))
    assert list(plain.parameters()) == []
    alone = FeatureDenoising(8, "mean", residual=False).eval()
    assert torch.allclose(alone(x), alone.bn(alone.conv(networks.local_mean(x))))
    assert torch.equal(alone.bn.weight, torch.ones(8))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_state_dicts_and_copies(operation):
    block, x = trained(operation), features()
    copied, fresh = copy.deepcopy(block), FeatureDenoising(8, operation).eval()
    fresh.load_state_dict(block.state_dict())
    parallel = nn.DataParallel(block)  # on a CPU: the block behind its "module." prefix
    for other in (copied, fresh, parallel):
        assert torch.equal(other(x), block(x))


@pytest.mark.parametrize("operation", ["gaussian", "bilateral_dot_product", "median"])
def test_it_is_captured_whole(operation):
    """By torch.compile, in one graph and with the gradient; by torch.export, for any batch.

    One operation over all positions, one over a window of pairs and the one that sorts: the other
    kinds leave out a part of these.

    The backend "aot_eager" traces forward and backward as "inductor" does, without minutes of C++.
    """
    block, x = trained(operation).double(), features(dtype=torch.float64).requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    a, b = (torch.autograd.grad(f(x).square().sum(), x)[0] for f in (block, compiled))
    # Where values are equal the two forms of the median may choose another one.
    unique = torch.ones_like(x, dtype=torch.bool) if operation != "median" else x > 0
    assert torch.allclose(a[unique], b[unique])
    dynamic = ({0: torch.export.Dim("batch", min=1)},)
    program = torch.export.export(
        block, (features(3, 8, 6, 5, dtype=torch.float64),), dynamic_shapes=dynamic
    )
    with torch.no_grad():
        many = features(5, 8, 6, 5, dtype=torch.float64)
        assert torch.allclose(program.module()(many), block(many))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_it_runs_under_autocast(operation):
    block, x = trained(operation), features().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.isfinite(gradient).all()
    difference = (y.float() - block(x)).norm() / block(x).norm()
    assert float(difference.detach()) < 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 7}, "channels is 7; embeddings halve"),
        ({"channels": 7, "operation": "bilateral_gaussian"}, "give an even number"),
        ({"channels": 0}, "channels is 0"),
        (
            {"channels": 8, "operation": "meen"},
            "operation is 'meen'; did you mean mean",
        ),
        ({"channels": 8, "operation": "mean", "kernel_size": 4}, "kernel_size is 4; give an odd"),
        ({"channels": 8, "kernel_size": 0}, "kernel_size is 0"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(InputError, match=message) as caught:
        FeatureDenoising(**options)
    assert "\n" not in str(caught.value)


def test_odd_channels_are_fine_without_embeddings():
    x = features(2, 7, 4, 4)
    for block in (FeatureDenoising(7, embedding=False), FeatureDenoising(7, "mean")):
        assert torch.equal(block(x), x)


def test_repr_tells_blocks_apart():
    made = [
        FeatureDenoising(8),
        FeatureDenoising(8, embedding=False),
        FeatureDenoising(8, conv=False),
        FeatureDenoising(8, residual=False),
        FeatureDenoising(8, "mean"),
        FeatureDenoising(8, "mean", kernel_size=5),
        FeatureDenoising(8, "bilateral_gaussian"),
        FeatureDenoising(8, "bilateral_gaussian", kernel_size=5),
    ]
    assert len({block.extra_repr() for block in made}) == len(made)
    assert made[5].extra_repr() == "8, 'mean', kernel_size=5, conv=True, residual=True"
