"""Noise streams: fixed by their key, whatever the batches, and entered anywhere."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from art_denoised.smoothing import Stage
from art_denoised.smoothing.noise import Gaussian, Stream, StreamKey

KEY = {"seed": 3, "index": 5, "stage": Stage.ESTIMATION}


def draw(n: int = 100, start: int = 0, **changes: object) -> torch.Tensor:
    key = StreamKey(**{**KEY, **changes})  # type: ignore[arg-type]
    return Stream(Gaussian(1.0), key, (3, 8, 8), start=start).take(n)


def test_streams_are_fixed_by_their_key_alone():
    assert torch.equal(draw(), draw())
    assert torch.equal(draw()[:7], draw(7))
    others = [
        draw(seed=4),
        draw(index=6),
        draw(stage=Stage.SELECTION),
        draw(start=100),
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


@given(st.lists(st.integers(0, 150), min_size=1, max_size=6), st.integers(0, 250))
@settings(max_examples=30)
def test_a_stream_may_be_cut_and_entered_anywhere(sizes, start):
    stream = Stream(Gaussian(1.0), StreamKey(**KEY), (3, 8, 8), start=start)  # type: ignore[arg-type]
    taken = torch.cat([stream.take(size) for size in sizes])
    assert stream.position == start + sum(sizes)
    assert torch.equal(taken, draw(start + sum(sizes))[start:])
