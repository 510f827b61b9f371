"""Noise streams: fixed by their key, whatever the batches, and entered anywhere."""

from __future__ import annotations

import secrets

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from art_denoised.smoothing import Stage
from art_denoised.smoothing.noise import PART, Gaussian, Stream, StreamKey, drawn_whole, fresh_seed

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


def test_noise_is_that_of_numpys_generator_for_the_key():
    """Seed 3; image 5, stage 1 and part 2 are the spawn key."""
    sequence = np.random.SeedSequence(3, spawn_key=(5, 1, 2))
    normal = np.random.Generator(np.random.SFC64(sequence)).standard_normal((4, 8, 8, 3), "f4")
    assert np.array_equal(draw(4, start=200).permute(0, 2, 3, 1), normal)


def test_a_device_draws_a_part_whole_and_hands_it_out_in_order():
    """From its own generator, seeded by 64 bits of the key; here the device is a CPU."""
    sequence, cpu = StreamKey(**KEY).sequence(2), torch.device("cpu")  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0]))
    whole = torch.randn((PART, 4, 5, 3), generator=generator)
    part = drawn_whole(lambda g: torch.randn((PART, 4, 5, 3), generator=g), sequence, cpu)
    taken = [part(n) for n in (7, 60, 33)]
    assert [tuple(piece.shape) for piece in taken] == [(n, 3, 4, 5) for n in (7, 60, 33)]
    assert torch.equal(torch.cat(taken), whole.permute(0, 3, 1, 2))


def test_seeds_have_63_bits(monkeypatch):
    monkeypatch.setattr(secrets, "randbits", lambda bits: 2**bits - 1)
    assert fresh_seed() == 2**63 - 1


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
