"""Votes that depend on nothing but the image, its index and the seed, however they are packed."""

from __future__ import annotations

import json
import random
import resource
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from art_denoised.checks import InputError
from art_denoised.smoothing import AtRadii, Draw, Passes, Stage, Task, drive, voters
from art_denoised.smoothing.noise import Gaussian, Stream, StreamKey
from art_denoised.smoothing.voters import NetworkVoter, memory_order
from tests.forked import forked

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


def answers(base, tasks, until=None, *, noise=NOISE, seed=3, batch_size=64):
    def passes(x):
        return Passes.tried(base, x, batch_size)

    voter = NetworkVoter(base, noise=noise, seed=seed, passes=passes, batch_size=batch_size)
    return drive(tasks, voter, until=until)


def class_counts(base, x, n, **options):
    ((_, counts),) = answers(base, [Task(5, x, counting(n))], **options)
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


def test_counts_of_a_network_depend_on_the_batch_size_by_near_ties_alone():
    """In float32 logits differ by about 1e-7 of their size between shapes of batches."""
    net = small_net(torch.float32)
    counts = [class_counts(net, IMAGE, 500, batch_size=size) for size in (1, 7, 64, 250)]
    assert counts[0] == counts[1] == counts[2] == counts[3]
    assert sum(counts[0].values()) == 500
    assert len(counts[0]) > 1


class Rounding(nn.Module):
    """A classifier whose near ties are broken by the place in the batch, as by another kernel."""

    def __init__(self, dtype: torch.dtype, error: float) -> None:
        super().__init__()
        self.weight, self.error = nn.Parameter(torch.ones((), dtype=dtype)), error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        coarse = x.float().mean((1, 2, 3)).round() / 100
        error = self.error * (torch.arange(len(x)) % 2 - 0.5)
        return torch.stack([coarse, coarse + error, coarse - 1], dim=1)


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str
)
def test_near_ties_are_decided_alone_where_the_place_in_a_batch_matters(dtype, error):
    """The arithmetic says what is near: a bfloat16 network may end in float32 logits."""
    base = Rounding(dtype, error)
    assert Passes.tried(base, IMAGE, 7).near_ties == "alone"

    def counts(batch_size: int) -> dict[int, int]:
        return class_counts(base, IMAGE, 300, batch_size=batch_size)

    assert counts(1) == counts(7) == counts(64)
    noise = Stream(NOISE, StreamKey(3, 5, Stage.ESTIMATION), IMAGE.shape).take(300)
    together = base((IMAGE + 0.5 * noise).to(dtype)).argmax(1)
    assert Counter(together.tolist()) != counts(1)  # the batch would have its say


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_pass_has_one_shape_and_none_is_repeated(dtype):
    net, shapes = small_net(dtype), []
    passes = Passes.tried(net, IMAGE, 16)
    assert passes.near_ties == "in_batch"
    net.register_forward_hook(lambda module, x, y: shapes.append(x[0].shape[0]))
    assert sum(class_counts(net, IMAGE, 50, batch_size=16).values()) == 50
    assert shapes == [2, 16, 16] + 4 * [16]  # the memory order, the trial, the samples


def test_a_part_of_a_run_keeps_its_rule():
    """A worker decides as the driver does, or fails."""
    net, rounding = small_net(torch.float32), Rounding(torch.float32, 1e-6)
    assert Passes.tried(net, IMAGE, 8, "alone").near_ties == "alone"
    with pytest.raises(InputError, match="place in a batch"):
        Passes.tried(rounding, IMAGE, 8, "in_batch")


def test_a_batch_that_does_not_fit_is_refused():
    def base(x: torch.Tensor) -> torch.Tensor:
        if len(x) > 4:
            raise torch.OutOfMemoryError
        return x.flatten(1)[:, :3]

    with pytest.raises(InputError, match="batch of 8 images"):
        Passes.tried(base, IMAGE, 8)


def in_place(x: torch.Tensor) -> torch.Tensor:
    coarse = x.sub_(0.5).float().mean((1, 2, 3)).round()  # always near a tie
    return torch.stack([coarse, coarse + 1e-9, coarse - x.float().mean((1, 2, 3))], dim=1)


def test_a_network_may_write_into_its_input():
    def out_of_place(x: torch.Tensor) -> torch.Tensor:
        return in_place(x.clone())

    assert class_counts(in_place, IMAGE, 300) == class_counts(out_of_place, IMAGE, 300)


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


@given(st.integers(1, 130), st.lists(st.integers(1, 90), min_size=1, max_size=4))
@settings(max_examples=15)
def test_packing_changes_no_vote(batch_size, sizes):
    net = small_net(torch.float32)
    alone = {
        i: dict(answers(net, [Task(i, x, counting(sum(sizes)))], batch_size=batch_size))[i]
        for i, x in enumerate(images(5))
    }
    tasks = [Task(i, x, counting(*sizes)) for i, x in enumerate(images(5))]
    assert dict(answers(net, tasks, batch_size=batch_size)) == alone


def test_work_ahead_changes_no_vote(monkeypatch):
    """As on a GPU, where two batches are wanted and one is launched before votes are read."""
    net = small_net(torch.float32)
    alone = class_counts(net, IMAGE, 200, batch_size=16)
    monkeypatch.setattr(voters.checks, "model_device", lambda network: torch.device("cuda"))
    assert class_counts(net, IMAGE, 200, batch_size=16) == alone
    options = {"passes": lambda x: Passes.tried(net, x, 16), "batch_size": 16}
    voter = NetworkVoter(net, NOISE, 3, **options)
    assert (voter.appetite, voter.pending) == (32, 0)
    task = Task(5, IMAGE, counting(20))
    voter.submit(task, Draw(Stage.ESTIMATION, 0, 20))
    assert voter.pending == 20
    assert sum(sum(voter.next()[2].values()) for _ in range(1)) == 20
    assert (voter.appetite, voter.pending) == (32, 0)


def test_early_stopping_saves_passes_and_batches_are_full():
    sizes = []

    def base(x: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        return torch.eye(4)[torch.zeros(len(x), dtype=torch.long)]

    stop = AtRadii([0.25], n=10_000, n0=30)
    tasks = (Task(i, x, stop.procedure(None, {"sigma": 0.5})) for i, x in enumerate(images(20)))
    certificates = dict(answers(base, tasks, batch_size=64))
    assert all(c.drawn == 40 and c.proves(0.25) for c in certificates.values())
    assert sizes.pop(0) == 2  # to see which memory order the network takes
    assert set(sizes) == {64}
    # Not one sample of those that were not asked for: two passes are the trial, and the last
    # image has no others to share with.
    assert len(sizes) - 2 <= 20 * 70 / 64 + 3


def test_no_more_images_are_opened_than_fill_a_batch():
    opened = []

    def tasks():
        for i in range(50):
            opened.append(i)
            yield Task(i, IMAGE, counting(100, 100))

    for finished, _ in enumerate(answers(small_net(torch.float32), tasks())):
        assert len(opened) <= finished + 3


def test_stopping_hands_over_the_votes_so_far(monkeypatch):
    """The clock is the number of passes; the first three are trials."""
    passes = []
    monkeypatch.setattr(voters.time, "monotonic", lambda: len(passes))

    def base(x: torch.Tensor) -> torch.Tensor:
        passes.append(len(x))
        return torch.eye(4)[torch.zeros(len(x), dtype=torch.long)]

    found = answers(base, [Task(0, IMAGE, counting(1000))], until=6, batch_size=64)
    assert list(found) == [(0, {0: 192})]


class OutOfOrder:
    """A voter that answers draws sample by sample, the last one first."""

    appetite = 1

    def __init__(self) -> None:
        self.samples: list[tuple[Task, Draw]] = []

    @property
    def pending(self) -> int:
        return len(self.samples)

    def submit(self, task: Task, draw: Draw) -> None:
        for sample in range(draw.start, draw.stop):
            self.samples.append((task, Draw(draw.stage, sample, sample + 1)))

    def next(self) -> tuple[Task, Draw, dict[int, int]]:
        task, draw = self.samples.pop()
        return task, draw, {draw.start % 3: 1}

    def close(self) -> None:
        self.samples.clear()


def test_parts_may_come_in_any_order():
    found = drive([Task(0, IMAGE, counting(10, 20))], OutOfOrder())
    assert list(found) == [(0, {0: 10, 1: 10, 2: 10})]


def test_a_later_run_goes_on_where_all_samples_before_have_come(monkeypatch):
    """Nine of ten votes are there when the time is up, but not the first one."""
    voter = OutOfOrder()
    monkeypatch.setattr(voters.time, "monotonic", lambda: -len(voter.samples))
    assert list(drive([Task(0, IMAGE, counting(10))], voter, until=-1)) == []


def test_a_procedure_may_have_nothing_to_ask():
    def done():
        return "earlier"
        yield

    assert list(answers(small_net(torch.float32), [Task(4, IMAGE, done())])) == [(4, "earlier")]


def test_memory_is_flat_in_n_images_and_radii(tmp_path):
    """Peak memory of a process that samples 200 and then 1,500 copies (74 MB of noise)."""
    process = forked(write_growth, tmp_path / "growth.json")
    process.join()
    grown = json.loads((tmp_path / "growth.json").read_text())
    assert len(grown) == 3
    assert all(kilobytes < 20_000 for kilobytes in grown)


def write_growth(file: Path) -> None:
    """Write by how many kB the peak of this process rises with samples, images and radii."""

    def peak(n: int, images: int, radii: int = 0) -> int:
        def procedure():
            if not radii:
                return counting(n)
            some = [i / 1000 for i in range(radii)]
            return AtRadii(some, n=n, n0=10).procedure(None, {"sigma": 1.0})

        tasks = (Task(i, torch.zeros(3, 64, 64), procedure()) for i in range(images))
        base = lambda x: x.flatten(1)[:, :4]  # noqa: E731
        for _ in answers(base, tasks, noise=Gaussian(1.0), seed=0, batch_size=50):
            pass
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    peak(200, 1), peak(10, 2)
    few = peak(200, 1, radii=2)
    rises = [more - few for more in (peak(1500, 1), peak(3, 500), peak(200, 1, radii=5000))]
    file.write_text(json.dumps(rises))


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
    orders = [
        memory_order(f, colour) for f in (lambda x: x.view(len(x), -1), small_net(torch.float32))
    ]
    assert orders == [torch.contiguous_format, torch.channels_last]
    assert sum(class_counts(base, digits[0][0], 10).values()) == 10


@pytest.mark.parametrize(
    ("output", "word"),
    [
        (lambda x: torch.full((len(x), 3), float("nan")), "NaN"),
        (lambda x: x, "shape"),
        (lambda x: torch.zeros(1, 3), "shape"),
        (lambda x: torch.zeros(len(x), 1), "shape"),
        (lambda x: [1, 2], "list"),
        (lambda x: (x, 1), r"tuple; .*model\(x\)\[0\]"),
        (lambda x: {"scores": x}, r"dict; .*model\(x\)\['scores'\]"),
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
