"""The choice of a batch size, by a clock that the networks of these tests move."""

from __future__ import annotations

import time

import pytest
import torch

from art_denoised import InputError
from art_denoised.smoothing import best_batch_size

IMAGE = torch.zeros(1, 2, 2)


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        (lambda n: 0.02 * n, 16),  # of equals the smallest
        (lambda n: 0.02 * n**2, 16),
        (lambda n: 0.2 + 0.001 * n, 1024),  # each size is faster by more than 2%
        (lambda n: 0.2 if n <= 128 else 0.1 * n, 128),
        (lambda n: 2.0 + 0.001 * n, 32),  # the time for trials is over
    ],
)
def test_the_batch_size_with_the_most_images_a_second(monkeypatch, seconds, best):
    now = [0.0]

    def network(batch):
        now[0] += seconds(len(batch))
        return batch.flatten(1)

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    assert best_batch_size(network, IMAGE) == best


def test_a_batch_that_does_not_fit_ends_the_trials():
    def network(batch, most=64):
        if len(batch) > most:
            raise torch.OutOfMemoryError
        return batch.flatten(1)

    assert best_batch_size(network, IMAGE) <= 64
    with pytest.raises(InputError, match="batch of 16"):
        best_batch_size(lambda batch: network(batch, most=8), IMAGE)
