"""The choice of a batch size, by a clock that the networks of these tests move."""

from __future__ import annotations

import time

import pytest
import torch

from art_denoised import InputError
from art_denoised.smoothing import Passes, best_batch_size

IMAGE = torch.zeros(1, 2, 2)


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        (lambda n: 0.02 * n, 16),  # of equals the smallest
        (lambda n: 0.02 * n**2, 16),
        (lambda n: 0.2 + 0.001 * n, 1024),  # each size is faster by more than 2%
        (lambda n: 0.2 if n <= 128 else 0.1 * n, 128),
        (lambda n: 2.0 + 0.001 * n, 32),  # the time for trials is over
        (lambda n: (0.02 if n <= 32 else 0.01) * n, 64),  # the second is as fast as the first
        *((lambda n, most=size: 0.1 if n <= most else n, size) for size in (32, 64, 128, 256, 512)),
    ],
)
def test_the_batch_size_with_the_most_images_a_second(monkeypatch, seconds, best):
    now = [100.0]

    def network(batch):
        now[0] += seconds(len(batch))
        return batch.flatten(1)

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    assert best_batch_size(network, IMAGE) == best


def test_sizes_beyond_one_that_is_slower_are_not_tried(monkeypatch):
    now, tried = [100.0], set()

    def network(batch):
        tried.add(len(batch))
        now[0] += 0.0001 * len(batch) * (1 if len(batch) <= 32 else 1.3)  # .77 as many a second
        return batch.flatten(1)

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    assert best_batch_size(network, IMAGE) == 16
    assert max(tried) == 64


def test_passes_that_other_programs_disturb_do_not_choose(monkeypatch):
    """The first passes of the fastest size take longer than later ones."""
    now, passes = [100.0], []

    def network(batch):
        passes.append(len(batch))
        if len(batch) > 64:
            raise torch.OutOfMemoryError
        each = 0.0011 if len(batch) != 64 else 0.0013 if passes.count(64) <= 4 else 0.001
        now[0] += each * len(batch)
        return batch.flatten(1)

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    assert best_batch_size(network, IMAGE) == 64


def test_only_near_ties_are_decided_alone():
    """Of a tie, a clear case, a sample without an answer, and a tie: two are passed again."""
    shapes = []

    def network(batch):
        shapes.append(len(batch))
        first = batch.flatten(1)[:, 0]
        return torch.stack([first, 0 * first + (0.5 if len(batch) > 1 else 0.0)], 1)

    passes = Passes(4, torch.contiguous_format, "alone")
    x = (
        torch.tensor([0.5 - 1e-7, 0.9, torch.nan, 0.5 - 1e-7])
        .reshape(4, 1, 1, 1)
        .expand(4, 1, 2, 2)
    )
    labels, classes = passes(network, x)
    assert (labels.tolist(), classes) == ([0, 0, 2, 0], 2)
    assert shapes == [4, 1, 1]


@pytest.mark.parametrize("n", [1, 3, 4])
def test_a_batch_is_filled_with_black_images(n):
    seen = []

    def network(batch):
        seen.append(batch.clone())
        return batch.flatten(1)[:, :2]

    x = torch.rand(n, 1, 2, 3, generator=torch.Generator().manual_seed(0))
    labels, _ = Passes(4, torch.contiguous_format, "in_batch")(network, x)
    assert torch.equal(labels, x.flatten(1)[:, :2].argmax(1))
    assert torch.equal(seen[0], torch.cat([x, torch.zeros(4 - n, 1, 2, 3)]))


@pytest.mark.parametrize("place", [0, 3])
def test_a_place_that_answers_otherwise_is_found(place):
    """One of eight; the first five are tried with other images."""

    def network(batch):
        odd = torch.arange(len(batch)) == place
        return batch.flatten(1)[:, :2] + 1e-6 * (odd & (len(batch) == 8))[:, None]

    assert Passes.tried(network, torch.rand(1, 2, 2), 8).near_ties == "alone"


def test_a_batch_that_does_not_fit_ends_the_trials():
    def network(batch, most=64):
        if len(batch) > most:
            raise torch.OutOfMemoryError
        return batch.flatten(1)

    assert best_batch_size(network, IMAGE) <= 64
    with pytest.raises(InputError, match="batch of 16"):
        best_batch_size(lambda batch: network(batch, most=8), IMAGE)
