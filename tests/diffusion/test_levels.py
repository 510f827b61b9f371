"""Noise levels and weights of a diffusion loss, against formulas by hand."""

from __future__ import annotations

import itertools
import math
import weakref
from statistics import NormalDist

import numpy as np
import pytest
import torch

from art_denoised.checks import InputError
from art_denoised.diffusion import (
    DDPM,
    EDM,
    LevelNoise,
    Levels,
    noise_levels,
    training_levels,
)

MEAN, STD = -0.4, 0.7  # of ln(sigma)


def density(sigma: float) -> float:
    return NormalDist(MEAN, STD).pdf(math.log(sigma)) / sigma


@pytest.mark.parametrize("spacing", ["lognormal", "linear"])
@pytest.mark.parametrize(
    ("weighting", "function"),
    [
        ("edm", lambda s: (s**2 + 0.25) / (0.5 * s) ** 2 * density(s)),
        ("vp_uniform", lambda s: density(s) / s**2),
        ("elbo", lambda s: 1 / s**3),
    ],
)
def test_a_weight_is_its_function_times_the_length_of_the_interval(weighting, function, spacing):
    count = 5
    if spacing == "lognormal":
        quantiles = [NormalDist(MEAN, STD).inv_cdf((i + 0.5) / count) for i in range(count)]
        sigmas = [math.exp(quantile) for quantile in quantiles]
        lengths = [1 / count / density(sigma) for sigma in sigmas]
    else:
        lengths = [(3 - 1e-4) / count] * count
        sigmas = [1e-4 + i * lengths[0] for i in range(count)]
    levels = noise_levels(count, weighting, spacing, p_mean=MEAN, p_std=STD)
    assert levels.sigmas == pytest.approx(sigmas, rel=1e-9)
    expected = [function(s) * length for s, length in zip(sigmas, lengths, strict=True)]
    assert levels.weights == pytest.approx(expected, rel=1e-9)


def test_levels():
    with pytest.raises(InputError, match="2 noise levels and 1 weights"):
        Levels((0.1, 0.2), (1.0,))
    for bad in ({"weighting": "ddpm"}, {"spacing": "cosine"}, {"weighting": "rdc_legacy"}):
        with pytest.raises(InputError):
            noise_levels(4, **bad)
    # Stratified levels integrate what the linear grid does: here, of sigma^2, with weight edm.
    fine = noise_levels(20_000, spacing="linear")
    few = noise_levels(200)

    def integral(levels: Levels, cut: float = 2.9) -> float:
        pairs = zip(levels.sigmas, levels.weights, strict=True)
        return sum(w * s**2 for s, w in pairs if s < cut)

    assert integral(few) == pytest.approx(integral(fine), rel=0.02)


def test_legacy_weights_are_those_of_the_reference_code():
    """A literal evaluation of its formula, slip included."""
    levels = noise_levels(125, "rdc_legacy", "linear")
    sigma = np.linspace(1e-4, 3, 126)
    sigma, width = sigma[:-1], np.diff(sigma)
    p = 1 / (sigma * 1.2 * np.sqrt(2 * np.pi)) * np.exp(-((np.log(sigma) + 1.2) ** 2) / 2 * 1.2**2)
    expected = (sigma**2 + 0.25) / (0.5 * sigma) ** 2 * p * width
    np.testing.assert_allclose(levels.sigmas, sigma)
    np.testing.assert_allclose(levels.weights, expected, rtol=1e-9)


def test_all_levels_of_a_ddpm_are_its_evidence_bound():
    abar = np.linspace(0.99, 0.05, 6)
    sigma = np.sqrt((1 - abar) / abar)
    bound = training_levels(DDPM(tuple(abar.tolist())))
    assert bound.sigmas == pytest.approx(sigma[1:])
    # Signal-to-noise ratios abar / (1 - abar): the weights are halves of their steps.
    ratio = abar / (1 - abar)
    assert bound.weights == pytest.approx([(a - b) / 2 for a, b in itertools.pairwise(ratio)])
    simple = training_levels(DDPM(tuple(abar.tolist())), "vp_uniform")
    assert simple.sigmas == pytest.approx(sigma)
    assert simple.weights == pytest.approx(ratio / 6)
    with pytest.raises(InputError, match="weighting is 'edm'"):
        training_levels(DDPM(tuple(abar.tolist())), "edm")
    with pytest.raises(InputError, match="the preconditioning is EDM, which has no steps"):
        training_levels(EDM())


def test_levels_above():
    levels = Levels((0.1, 0.5, 1.0), (3.0, 2.0, 1.0))
    assert levels.above(0.5) == Levels((0.5, 1.0), (2.0, 1.0))
    assert levels.above(0.0) == levels
    assert levels.above(0.6).sigmas == (1.0,)
    assert levels.within(0.1, 0.5).sigmas == (0.1, 0.5)  # both ends belong to it


def test_noise_is_that_of_its_seed_stream_and_level():
    """Spelled out: what a seed gives must outlive a version."""
    state = np.random.SeedSequence(5, spawn_key=(2, 0, 7)).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(state[0]) >> 1)
    expected = torch.randn(1, 8, 8, generator=generator, dtype=torch.float64)
    assert torch.equal(
        LevelNoise(5, stream=(2,))(torch.rand(3, 1, 8, 8, dtype=torch.float64), [2], [7])[0],
        expected,
    )


def test_copies_of_an_image_see_their_own_fresh_noise():
    x, noise = torch.rand(2, 1, 8, 8), LevelNoise(None)
    first, second = noise(x, [0, 1], [3, 3])
    assert not torch.equal(first, second)
    assert torch.equal(noise(x, [1], [3])[0], second)


def test_fresh_noise_is_drawn_once_and_kept_for_the_last_image_alone(monkeypatch):
    """Three images, two levels and two classes, whose rows follow each other, in threes."""
    drawn, randn = [], torch.randn

    def recorded(*size, **options):
        made = randn(*size, **options)
        drawn.append(weakref.ref(made))
        return made

    monkeypatch.setattr(torch, "randn", recorded)
    x, noise = torch.zeros(3, 1, 2, 2), LevelNoise(None)
    rows = torch.cartesian_prod(torch.arange(3), torch.arange(2), torch.arange(2))
    for part in rows.split(3):
        noise(x, part[:, 0].tolist(), part[:, 1].tolist())
    assert len(drawn) == 3 * 2
    assert [made() is None for made in drawn] == [True, True, True, True, False, False]
