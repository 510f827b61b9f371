"""Votes that depend on nothing but the image, its index and the seed, however they are packed."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from art_denoised.smoothing.packing import Task, run_packed
from art_denoised.smoothing.sampling import Gaussian, Stream, StreamKey
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from art_denoised.checks import InputError
from art_denoised.smoothing import packing
from art_denoised.smoothing.bounds import Looks
from art_denoised.smoothing.procedures import Draw, Stage, certifying

ROOT = Path(__file__).parent.parent.parent
NOISE = Gaussian(0.5)


def counting(*sizes: int):
    """A procedure that asks for votes in these portions and returns them all."""
    total: dict[int, int] = {}
    start = 0
    for size in sizes:
        votes = yield Draw(Stage.ESTIMATION, start, start + size)
        start += size
        total = {c: total.get(c, 0) + votes.get(c, 0) for c in sorted({*total, *votes})}
    return total


def class_counts(base, x, n, **options):
    ((_, counts),) = run_packed(base, [Task(5, x, counting(n))], noise=NOISE, seed=3, **options)
    return counts


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
    counts = [class_counts(net, IMAGE, 500, batch_size=size) for size in (1, 7, 64, 250)]
    assert counts[0] == counts[1] == counts[2] == counts[3]
    assert sum(counts[0].values()) == 500
    assert len(counts[0]) > 1


class Rounding(nn.Module):
    """A classifier whose near ties are broken by the batch it is in, as by another kernel."""

    def __init__(self, dtype: torch.dtype, error: float) -> None:
        super().__init__()
        self.weight, self.error = nn.Parameter(torch.ones((), dtype=dtype)), error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        coarse = x.float().mean((1, 2, 3)).round() / 100
        error = self.error * (len(x) % 2 - 0.5)
        return torch.stack([coarse, coarse + error, coarse - 1], dim=1)


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str
)
def test_near_ties_are_decided_by_a_pass_of_their_own(monkeypatch, dtype, error):
    """The arithmetic says what is near: a bfloat16 network may end in float32 logits."""

    def counts(batch_size: int) -> dict[int, int]:
        return class_counts(Rounding(dtype, error), IMAGE, 300, batch_size=batch_size)

    assert counts(1) == counts(7) == counts(64)
    monkeypatch.setattr(packing, "_decide", lambda base, noisy, logits: logits.argmax(1))
    assert counts(1) != counts(64)


def test_counts_are_those_of_a_literal_loop():
    net = small_net(torch.float32)
    votes: dict[int, int] = {}
    with torch.no_grad():
        for noise in Stream(NOISE, StreamKey(3, 5, Stage.ESTIMATION), IMAGE.shape).take(300):
            label = int(net((IMAGE + 0.5 * noise)[None]).argmax())
            votes[label] = votes.get(label, 0) + 1
    assert class_counts(net, IMAGE, 300) == votes


def images(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(3, 8, 8, generator=generator) for _ in range(count)]


@given(st.integers(1, 130), st.booleans(), st.lists(st.integers(1, 90), min_size=1, max_size=4))
@settings(max_examples=15)
def test_packing_changes_no_vote(batch_size, channels_last, sizes):
    net = small_net(torch.float32)
    alone = {
        i: dict(run_packed(net, [Task(i, x, counting(sum(sizes)))], noise=NOISE, seed=3))[i]
        for i, x in enumerate(images(5))
    }
    tasks = [Task(i, x, counting(*sizes)) for i, x in enumerate(images(5))]
    packed = run_packed(
        net, tasks, noise=NOISE, seed=3, batch_size=batch_size, channels_last=channels_last
    )
    assert dict(packed) == alone


def test_early_stopping_saves_passes_and_batches_are_full():
    sizes = []

    def base(x: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        return torch.eye(4)[torch.zeros(len(x), dtype=torch.long)]

    plan = {"n0": 30, "alpha": 0.001, "sigma": 0.5, "radii": [0.25]}
    tasks = (Task(i, x, certifying(Looks(100, 10_000), **plan)) for i, x in enumerate(images(20)))
    answers = dict(run_packed(base, tasks, noise=NOISE, seed=0, batch_size=64))
    assert all(c.drawn == 100 and c.proves(0.25) for c in answers.values())
    assert sum(sizes) == 20 * 130  # not one sample of those that were not asked for
    assert sizes.count(64) >= len(sizes) - 3  # the last image has no others to share with


def test_no_more_images_are_opened_than_fill_a_batch():
    opened = []

    def tasks():
        for i in range(50):
            opened.append(i)
            yield Task(i, IMAGE, counting(100, 100))

    for finished, _ in enumerate(
        run_packed(small_net(torch.float32), tasks(), noise=NOISE, seed=0)
    ):
        assert len(opened) <= finished + 3


def test_stopping_hands_over_the_votes_so_far():
    passes = []

    def base(x: torch.Tensor) -> torch.Tensor:
        passes.append(len(x))
        return torch.eye(4)[torch.zeros(len(x), dtype=torch.long)]

    answers = run_packed(
        base,
        [Task(0, IMAGE, counting(1000))],
        noise=NOISE,
        seed=0,
        batch_size=64,
        stop=lambda: len(passes) == 3,
    )
    assert list(answers) == [(0, {0: 192})]


@pytest.mark.parametrize("more", ["peak(5000, 1)", "peak(10, 500)", "peak(200, 1, radii=5000)"])
def test_memory_is_flat_in_n_images_and_radii(more):
    """Peak memory of a process that samples 200 and then 5,000 copies (245 MB of noise)."""
    script = f"""
import resource, torch
from art_denoised.smoothing.bounds import Looks
from art_denoised.smoothing.procedures import certifying
from tests.smoothing.test_packing import counting, Task, run_packed, Gaussian
def procedure(n, radii):
    if not radii:
        return counting(n)
    some = [i / 1000 for i in range(radii)]
    return certifying(Looks(100, n), n0=10, alpha=0.001, sigma=1.0, radii=some)
def peak(n, images, radii=0):
    tasks = (Task(i, torch.zeros(3, 64, 64), procedure(n, radii)) for i in range(images))
    base = lambda x: x.flatten(1)[:, :4]
    for _ in run_packed(base, tasks, noise=Gaussian(1.0), seed=0, batch_size=50):
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
few = peak(200, 1)
print({more} - few)
"""
    grown = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, check=True, cwd=ROOT
    )
    assert int(grown.stdout) < 20_000  # kilobytes


def test_global_random_state_is_untouched():
    before = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
    class_counts(small_net(torch.float32), IMAGE, 50)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    assert before[2] == random.getstate()


def test_networks_that_flatten_with_view_get_the_default_order(digits):
    net = nn.Conv2d(1, 4, 3, padding=1)

    def base(x: torch.Tensor) -> torch.Tensor:
        return net(x).view(len(x), -1)[:, ::16]

    colour = torch.rand(3, 8, 8)
    assert not packing.takes_channels_last(lambda x: x.view(len(x), -1), colour)
    assert packing.takes_channels_last(small_net(torch.float32), colour)
    assert sum(class_counts(base, digits[0][0], 10).values()) == 10


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
        class_counts(output, IMAGE, 10)


def test_inner_gradients_are_possible():
    """A base classifier may optimise inside, as likelihood maximization does."""

    def base(x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            y = x.clone().requires_grad_()
            (gradient,) = torch.autograd.grad((y**2).sum(), y)
        return gradient.flatten(1)[:, :3]

    assert sum(class_counts(base, IMAGE, 10).values()) == 10
