"""Quantised noise: the exact distribution, and certificates that survive floating point."""

from __future__ import annotations

from bisect import bisect_right

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from art_denoised import FixedN, InputError, Smoother
from art_denoised.smoothing import Stage
from art_denoised.smoothing.noise import QuantisedGaussian, Stream, StreamKey, cells, rounded_noise

KEY = StreamKey(seed=3, index=5, stage=Stage.ESTIMATION)


def draw(sigma: float, n: int, shape=(3, 8, 8), start: int = 0) -> torch.Tensor:
    return Stream(QuantisedGaussian(sigma), KEY, shape, start=start).take(n)


@pytest.mark.parametrize("sigma", [0.001, 0.12, 0.25, 1.0])
def test_cells_are_the_rounded_gaussian(sigma):
    """Their distance from the exact distribution is computed in 60 digits, and within `tv`."""
    table = cells(sigma)
    steps = np.diff(np.concatenate([[0], table.thresholds.astype(object), [2**64]]))
    with mpmath.workdps(60):
        scale, distance, outside = mpmath.mpf(sigma) * 255, mpmath.mpf(0), mpmath.mpf(1)
        for j, share in enumerate(steps, start=table.lowest):
            exact = mpmath.ncdf((j + mpmath.mpf(0.5)) / scale) - mpmath.ncdf(
                (j - mpmath.mpf(0.5)) / scale
            )
            outside -= exact
            distance += abs(exact - mpmath.mpf(int(share)) / 2**64)
        assert (distance + outside) / 2 <= QuantisedGaussian(sigma).tv(1)
    assert QuantisedGaussian(sigma).tv(3 * 224 * 224) < 1e-10


def test_16_bits_decide_unless_a_threshold_lies_among_them():
    table = cells(0.25)
    begins = (table.thresholds >> np.uint64(48)).astype(int)
    expected = table.lowest + np.array([(begins < prefix).sum() for prefix in range(2**16)])
    is_open = np.isin(np.arange(2**16), begins)
    assert np.array_equal(table.lookup < table.lowest, is_open)
    assert np.array_equal(table.lookup[~is_open], expected[~is_open])


def test_noise_is_the_cell_of_16_bits_of_one_generator_and_48_of_another():
    """The spawn key is image 5, stage 1, part 2, and 1 or 2; compared as Python integers."""
    table = cells(0.25)
    first, more = (
        np.random.SFC64(np.random.SeedSequence(3, spawn_key=(5, 1, 2, extra))) for extra in (1, 2)
    )
    thresholds = [int(t) for t in table.thresholds]
    begins = {t >> 48 for t in thresholds}
    expected = []
    for _ in range(3):
        prefixes = first.random_raw(12).view(np.uint16)[:45].tolist()  # of 45 values, whole words
        rest = [int(more.random_raw()) >> 16 if p in begins else 0 for p in prefixes]
        bits = [(p << 48) | r for p, r in zip(prefixes, rest, strict=True)]
        expected.append([table.lowest + bisect_right(thresholds, u) for u in bits])
    found = draw(0.25, 3, (3, 5, 3), start=200).permute(0, 2, 3, 1).flatten(1)
    assert found.tolist() == expected


def on_a_device(sigma: float, n: int) -> torch.Tensor:
    """Noise as other devices draw it."""
    return rounded_noise(cells(sigma), (n, 8, 8, 3), torch.Generator().manual_seed(7))


def test_noise_of_a_device_is_the_cell_of_64_bits():
    """Each integer is compared with the thresholds as Python integers."""
    table, found = cells(0.25), on_a_device(0.25, 3).flatten().tolist()
    bits = torch.empty(len(found), dtype=torch.int64)
    bits.random_(-(2**63), None, generator=torch.Generator().manual_seed(7))
    thresholds = [int(t) for t in table.thresholds]
    expected = [table.lowest + sum(t <= u + 2**63 for t in thresholds) for u in bits.tolist()]
    assert found == expected


@pytest.mark.parametrize("source", [draw, on_a_device])
@pytest.mark.parametrize("sigma", [0.01, 0.25, 1.0])
def test_draws_follow_the_cells(sigma, source):
    """Chi-squared over all cells with 20 expected draws or more; false alarm: 1e-6."""
    values = source(sigma, 2000).flatten().numpy().astype(int)
    edges = np.arange(values.min(), values.max() + 2) - 0.5
    observed, _ = np.histogram(values, edges)
    expected = len(values) * np.diff(stats.norm.cdf(edges / (255 * sigma)))
    often = expected >= 20
    observed, expected = observed[often], expected[often]
    statistic = ((observed - expected) ** 2 / expected).sum()
    assert stats.chi2.sf(statistic, len(expected)) > 1e-6


@given(st.lists(st.integers(1, 120), min_size=1, max_size=5), st.integers(0, 150))
@settings(max_examples=20)
def test_a_stream_may_be_cut_and_entered_anywhere(sizes, start):
    stream = Stream(QuantisedGaussian(0.25), KEY, (3, 5, 7), start=start)
    taken = torch.cat([stream.take(size) for size in sizes])
    assert torch.equal(taken, draw(0.25, start + sum(sizes), (3, 5, 7))[start:])


def test_networks_see_integers_over_255():
    noise, x = QuantisedGaussian(0.25), torch.arange(192).reshape(3, 8, 8) / 255
    noisy = noise.add(noise.centre(x), draw(0.25, 50))
    whole = (noisy.double() * 255).round()
    assert torch.equal(noisy, whole.float() / 255)
    assert float(noisy.min()) < 0
    assert float(noisy.max()) > 1  # nothing is clipped


def smoother(**options: object) -> Smoother:
    return Smoother(nn.Flatten().eval(), **{"sigma": 0.25, "noise": "quantised", **options})


def test_images_of_other_depths_are_refused():
    for level in (0.3 * 255, 100.0015):
        with pytest.raises(InputError, match="1/255"):
            smoother().certify(torch.full((1, 1, 8, 8), level / 255), FixedN(100))
    smoother().certify(torch.full((1, 1, 8, 8), 100.0005 / 255), FixedN(20, 5))  # rounding
    with pytest.raises(InputError, match="'laplace'"):
        smoother(noise="laplace")
    with pytest.raises(InputError, match=r"\(0, 255\)"):
        smoother(sigma=64, clip_values=(0, 255))


def test_certificates_record_their_noise(digits):
    x = (digits[0][:1] * 255).round() / 255
    (c,) = smoother().certify(x, FixedN(200))
    assert c.noise == "quantised"
    assert 0 < c.tv < 1e-13
    assert c.at(c.alpha) == c
    (plain,) = smoother(noise="gaussian").certify(x, FixedN(200))
    assert (plain.noise, plain.tv) == ("gaussian", 0.0)


class LowBits(nn.Module):
    """Reads off the last bits of small values where zero was before noise was added.

    A float32 sum 8/255 + eps that ends near 0 is a multiple of 2^-29, because its summands are;
    float32 noise itself has finer values there. After Voracek and Hein (2023).
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        small = x.abs() < 2.0**-6
        fine = small & ((x.double() * 2.0**29) % 1 != 0)
        margin = fine.flatten(1).any(1).float() - 0.5
        return torch.stack([margin, -margin], dim=1)


def test_floating_point_voids_ordinary_certificates_and_not_quantised_ones():
    """The same classifier: a false certificate of radius 3 in one mode, none in the other."""
    here, there = torch.zeros(1, 1, 32, 32), torch.full((1, 1, 32, 32), 8 / 255)
    distance = float((here - there).norm())
    rounded = Smoother(LowBits().eval(), sigma=1.0)
    (ordinary,) = rounded.certify(here, FixedN(1000))
    assert ordinary.radius > 2 * distance  # a claim about all points so near
    assert rounded.vote(there)[0].label not in (-1, ordinary.label)  # that is false

    exact = Smoother(LowBits().eval(), sigma=1.0, noise="quantised")
    (sound,) = exact.certify(here, FixedN(1000))
    assert sound.radius > distance
    assert exact.vote(there)[0].label == sound.label
