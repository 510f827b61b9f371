"""Noise streams, and counts that depend on nothing but their key."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from art_denoised.checks import InputError
from art_denoised.smoothing import sampling
from art_denoised.smoothing.sampling import Stage, class_counts, noise_batches, standard_normal

KEY = {"seed": 3, "index": 5, "stage": Stage.ESTIMATION}
OPTIONS = {**KEY, "sigma": 0.5}


def draw(**changes: object) -> torch.Tensor:
    return standard_normal(100, (3, 8, 8), **{**KEY, "part": 0, **changes})  # type: ignore[arg-type]


def test_streams_are_fixed_by_their_key_alone():
    assert torch.equal(draw(), draw())
    assert torch.equal(draw()[:7], standard_normal(7, (3, 8, 8), **KEY, part=0))
    others = [
        draw(seed=4),
        draw(index=6),
        draw(stage=Stage.SELECTION),
        draw(part=1),
        draw(seed=3 + 2**32),  # torch's own CPU generator would repeat itself here
    ]
    for other in others:
        correlation = np.corrcoef(draw().flatten(), other.flatten())[0, 1]
        assert abs(correlation) < 5 / np.sqrt(19_200)  # chance of a false alarm: 6e-7 each


def test_noise_is_standard_normal():
    values = draw().flatten().double().numpy()
    assert stats.kstest(values, "norm").pvalue > 1e-6


def test_noise_is_in_channels_last_order():
    assert draw().is_contiguous(memory_format=torch.channels_last)


@given(st.integers(1, 350), st.integers(1, 300))
@settings(max_examples=30)
def test_batches_of_any_size_hold_the_same_noise(n, batch_size):
    batches = list(noise_batches(n, (1, 2, 2), **KEY, batch_size=batch_size))
    whole = torch.cat(list(noise_batches(n, (1, 2, 2), **KEY, batch_size=100)))
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert torch.equal(torch.cat(batches), whole)
    assert len(whole) == n


def small_net(dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 16, 10),
        )
    return net.to(dtype).eval()


IMAGE = torch.linspace(0, 1, 192).reshape(3, 8, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_counts_of_a_network_do_not_depend_on_the_batch_size(dtype):
    net = small_net(dtype)
    counts = [class_counts(net, IMAGE, 500, **OPTIONS, batch_size=size) for size in (1, 7, 64, 250)]
    assert counts[0] == counts[1] == counts[2] == counts[3]
    assert sum(counts[0].values()) == 500
    assert len(counts[0]) > 1


class Rounding(nn.Module):
    """A classifier whose near ties are broken by the batch it is in, as by another kernel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        coarse = x.mean((1, 2, 3)).round() / 100
        error = 1e-6 * (len(x) % 2)
        return torch.stack([coarse, coarse + error - 5e-7, coarse - 1], dim=1)


def test_near_ties_are_decided_by_a_pass_of_their_own(monkeypatch):
    def counts(batch_size: int) -> dict[int, int]:
        return class_counts(Rounding(), IMAGE, 300, **OPTIONS, batch_size=batch_size)

    assert counts(1) == counts(7) == counts(64)
    monkeypatch.setattr(sampling, "_decide", lambda base, noisy, logits: logits.argmax(1))
    assert counts(1) != counts(64)


def test_counts_are_those_of_a_literal_loop():
    net = small_net(torch.float32)
    votes: dict[int, int] = {}
    with torch.no_grad():
        for part in range(3):
            for noise in standard_normal(100, IMAGE.shape, **KEY, part=part):
                label = int(net((IMAGE + 0.5 * noise)[None]).argmax())
                votes[label] = votes.get(label, 0) + 1
    assert class_counts(net, IMAGE, 300, **OPTIONS) == votes


def test_memory_does_not_grow_with_n():
    """Peak memory of a process that samples 200 and then 5,000 copies (245 MB of noise)."""
    script = """
import resource, torch
from art_denoised.smoothing.sampling import Stage, class_counts
def peak(n):
    class_counts(lambda x: x.flatten(1)[:, :4], torch.zeros(3, 64, 64), n, sigma=1.0, seed=0,
                 index=0, stage=Stage.ESTIMATION, batch_size=50)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
few, many = peak(200), peak(5000)
print(many - few)
"""
    grown = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert int(grown.stdout) < 20_000  # kilobytes


def test_global_random_state_is_untouched():
    before = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
    class_counts(small_net(torch.float32), IMAGE, 50, **OPTIONS)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    assert before[2] == random.getstate()


@pytest.mark.parametrize(
    ("output", "word"),
    [
        (lambda x: torch.full((len(x), 3), float("nan")), "NaN"),
        (lambda x: x, "shape"),
        (lambda x: torch.zeros(1, 3), "shape"),
        (lambda x: torch.zeros(len(x), 1), "shape"),
        (lambda x: [1, 2], "list"),
    ],
)
def test_what_is_no_logits_is_refused(output, word):
    with pytest.raises(InputError, match=word):
        class_counts(output, IMAGE, 10, **OPTIONS)


def test_inner_gradients_are_possible():
    """A base classifier may optimise inside, as likelihood maximization does."""

    def base(x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            y = x.clone().requires_grad_()
            (gradient,) = torch.autograd.grad((y**2).sum(), y)
        return gradient.flatten(1)[:, :3]

    assert sum(class_counts(base, IMAGE, 10, **OPTIONS).values()) == 10
