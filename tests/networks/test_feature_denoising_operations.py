"""Each operation against a literal loop over its equation, in float64; gradients; other modes."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from art_denoised.networks import (
    bilateral_dot_product,
    bilateral_gaussian,
    local_mean,
    local_median,
    non_local_dot_product,
    non_local_gaussian,
)

aten = torch.ops.aten
PAIRWISE = {
    "non_local_gaussian": (non_local_gaussian, True, False),
    "non_local_dot_product": (non_local_dot_product, False, False),
    "bilateral_gaussian": (bilateral_gaussian, True, True),
    "bilateral_dot_product": (bilateral_dot_product, False, True),
}
LOCAL = {"local_mean": local_mean, "local_median": local_median}
EVERY = {**{name: row[0] for name, row in PAIRWISE.items()}, **LOCAL}


def loop_pairwise(x, theta, phi, *, softmax: bool, window: int | None) -> np.ndarray:
    """y_i = 1 / C(x) sum over j of f(x_i, x_j) x_j, one position at a time (eq. 1-3).

    Softmax: f = exp(theta_i . phi_j / sqrt d), C the sum of f. Otherwise f = theta_i . phi_j, C the
    number of positions j. These are all, or those of the window that lie in the image.
    """
    n, _, h, w = x.shape
    y = np.zeros_like(x)
    for b in range(n):
        for r in range(h):
            for c in range(w):
                total, norm = 0.0, 0.0
                for r2, c2 in neighbours(r, c, h, w, window):
                    f = float(theta[b, :, r, c] @ phi[b, :, r2, c2])
                    f = np.exp(f / np.sqrt(theta.shape[1])) if softmax else f
                    norm += f if softmax else 1
                    total = total + f * x[b, :, r2, c2]
                y[b, :, r, c] = total / norm
    return y


def loop_local(x, statistic, window: int, *, repeat: bool) -> np.ndarray:
    """The statistic over each window: cut off at the border, or with border pixels repeated."""
    h, w = x.shape[2:]
    y, half = np.zeros_like(x), window // 2
    for r in range(h):
        for c in range(w):
            if repeat:
                rows = np.clip(np.arange(r - half, r + half + 1), 0, h - 1)
                columns = np.clip(np.arange(c - half, c + half + 1), 0, w - 1)
                values = x[:, :, rows][:, :, :, columns].reshape(*x.shape[:2], -1)
            else:
                places = neighbours(r, c, h, w, window)
                values = np.stack([x[:, :, r2, c2] for r2, c2 in places], -1)
            y[:, :, r, c] = statistic(values, -1)
    return y


def neighbours(r: int, c: int, h: int, w: int, window: int | None) -> list[tuple[int, int]]:
    half = max(h, w) if window is None else window // 2
    return [
        (i, j)
        for i in range(max(0, r - half), min(h, r + half + 1))
        for j in range(max(0, c - half), min(w, c + half + 1))
    ]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SHAPES = {
    "batch": st.integers(1, 3),
    "channels": st.integers(1, 24),  # with 1 to 25 positions: N < C and N > C
    "embedded": st.integers(1, 24),
    "height": st.integers(1, 5),
    "width": st.integers(1, 5),
    "seed": st.integers(0, 2**31),
}


@pytest.mark.parametrize("name", PAIRWISE)
@settings(max_examples=25)
@given(window=st.sampled_from([1, 3, 5]), **SHAPES)
def test_weighted_means_are_the_loop(name, window, batch, channels, embedded, height, width, seed):
    function, softmax, windowed = PAIRWISE[name]
    x = draw(batch, channels, height, width, seed=seed)
    theta = draw(batch, embedded, height, width, seed=seed + 1)
    phi = draw(batch, embedded, height, width, seed=seed + 2)
    options = {"kernel_size": window} if windowed else {}
    expected = loop_pairwise(
        *(t.numpy() for t in (x, theta, phi)), softmax=softmax, window=window if windowed else None
    )
    assert np.allclose(function(x, theta, phi, **options), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", LOCAL)
@settings(max_examples=25)
@given(window=st.sampled_from([1, 3, 5]), layout=st.booleans(), **SHAPES)
def test_local_operations_are_the_loop(
    name, window, layout, batch, channels, embedded, height, width, seed
):
    x = draw(batch, channels, height, width, seed=seed)
    if layout:
        x = x.contiguous(memory_format=torch.channels_last)
    median = name == "local_median"
    statistic = np.median if median else np.mean
    expected = loop_local(x.numpy(), statistic, window, repeat=median)
    assert np.allclose(LOCAL[name](x, window), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("positions", "channels", "embedded"),
    [((2, 3), 16, 16), ((7, 9), 4, 4), ((1, 7), 64, 4), ((1, 7), 4, 64)],
)
def test_the_dot_product_takes_the_cheaper_order(positions, channels, embedded):
    """N^2 (D + C) or 2 N D C MACs for each image; both orders are tested above."""
    x, theta, n = draw(2, channels, *positions), draw(2, embedded, *positions), math.prod(positions)
    with FlopCounterMode(display=False) as counter:
        non_local_dot_product(x, theta, theta)
    macs = min(n * n * (embedded + channels), 2 * n * embedded * channels)
    assert counter.get_total_flops() == 2 * len(x) * macs


def arguments(name: str, shape=(2, 2, 3, 4)) -> list[torch.Tensor]:
    tensors = [draw(*shape)]
    if name in PAIRWISE:
        tensors += [draw(shape[0], 2, *shape[2:], seed=s) for s in (1, 2)]
    return [t.requires_grad_() for t in tensors]


@pytest.mark.parametrize("name", EVERY)
def test_first_and_second_derivatives(name):
    inputs = arguments(name)
    assert torch.autograd.gradcheck(EVERY[name], inputs)
    assert torch.autograd.gradgradcheck(EVERY[name], inputs, fast_mode=True)


@pytest.mark.parametrize("name", ["non_local_dot_product", "non_local_gaussian"])
def test_derivatives_where_channels_outnumber_positions(name):
    assert torch.autograd.gradcheck(EVERY[name], arguments(name, (1, 9, 2, 2)))


def test_a_median_s_gradient_goes_to_one_value_also_among_equal_ones():
    """Rectified features are full of equal values: zeros."""
    x = draw(2, 3, 6, 7).clamp_min(0).requires_grad_()
    weights = draw(2, 3, 6, 7, seed=1)
    y = local_median(x)
    whole, positive = (
        torch.autograd.grad((y * weights * chosen).sum(), x, retain_graph=True)[0]
        for chosen in (torch.ones_like(y), y.detach() > 0)
    )
    assert (x == 0).sum() > 100
    assert torch.allclose(whole.sum(), weights.sum())
    assert torch.allclose(positive.sum(), weights[y > 0].sum())
    assert (positive[x == 0] == 0).all()


@pytest.mark.parametrize("records", [True, False])
def test_medians_of_many_chunks(monkeypatch, records):
    x = draw(3, 5, 6, 7)
    whole = local_median(x)
    monkeypatch.setattr("art_denoised.networks.feature_denoising.CACHE_ELEMENTS", 100)
    assert torch.equal(local_median(x.requires_grad_(records)), whole)


class Calls(TorchDispatchMode):
    """Counts the calls of each operation."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "shape", "operation", "steps"),
    [
        ("non_local_gaussian", (10, 1, 16, 16), aten._softmax, 3),  # 256^2 weights an image
        ("bilateral_gaussian", (5, 32, 64, 64), aten._softmax, 3),
        ("local_median", (2, 3, 256, 256), aten.replication_pad2d, 2),  # four planes, then two
        ("local_mean", (2, 3, 8, 8), aten.convolution, 1),
    ],
)
def test_a_step_takes_what_fits_in_the_cache_of_a_cpu(name, shape, operation, steps):
    """2^18 elements; and neither sorting nor pooling, which are slow."""
    inputs = [torch.zeros(shape)] * (3 if name in PAIRWISE else 1)
    with Calls() as calls:
        EVERY[name](*inputs)
    assert calls.counts[operation] == steps
    assert not {aten.median, aten.avg_pool2d} & calls.counts.keys()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace")
@pytest.mark.parametrize("name", EVERY)
def test_a_trace_does_not_keep_the_number_of_images(monkeypatch, name):
    monkeypatch.setattr("art_denoised.networks.feature_denoising.CACHE_ELEMENTS", 1)
    inputs = [t.detach() for t in arguments(name, (3, 4, 5, 6))]
    traced = torch.jit.trace(EVERY[name], [t[:2] for t in inputs], check_trace=False)
    assert torch.allclose(traced(*inputs), EVERY[name](*inputs))


@pytest.mark.parametrize("name", EVERY)
def test_what_does_not_change_the_answer(monkeypatch, name):
    """Chunks, the layout in memory, the batch around an image, and the form used when tracing."""
    inputs = [t.detach() for t in arguments(name, (3, 4, 5, 6))]
    function = EVERY[name]
    y = function(*inputs)
    last = [t.contiguous(memory_format=torch.channels_last) for t in inputs]
    assert torch.allclose(function(*last), y)
    assert torch.allclose(function(*(t[:1] for t in inputs)), y[:1])
    assert function(*(t[:0] for t in inputs)).shape == (0, 4, 5, 6)
    monkeypatch.setattr("art_denoised.networks.feature_denoising.CACHE_ELEMENTS", 1)
    assert torch.allclose(function(*inputs), y)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    live = [t.requires_grad_() for t in inputs]
    assert torch.allclose(function(*live), y)
    traced = torch.autograd.grad(function(*live).square().sum(), live)
    monkeypatch.undo()
    eager = torch.autograd.grad(function(*live).square().sum(), live)
    assert all(torch.allclose(a, b) for a, b in zip(traced, eager, strict=True))


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_stays_close_and_keeps_its_dtype(name, dtype):
    inputs = [t.detach() for t in arguments(name, (2, 4, 6, 6))]
    y = EVERY[name](*(t.to(dtype) for t in inputs))
    assert y.dtype == dtype
    tolerance = 20 * torch.finfo(dtype).eps
    assert torch.allclose(y.double(), EVERY[name](*inputs), rtol=tolerance, atol=tolerance)


def test_float16_dot_products_do_not_overflow_in_the_sum():
    """40 * 40 * 784 is above the largest float16, and the mean over 784 is not."""
    for channels in (1, 800):
        x = torch.full((1, channels, 28, 28), 40.0 / channels**0.5, dtype=torch.float16)
        assert torch.isfinite(non_local_dot_product(x, x, x)).all()
