"""Certify and Predict on real base classifiers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from art_denoised.smoothing.sampling import Gaussian, Stream, StreamKey
from scipy import stats
from torch import nn

from art_denoised import certify, certify_anytime, vote
from art_denoised.checks import InputError
from art_denoised.demo import digits_classifier, digits_denoiser
from art_denoised.smoothing.modules import DenoisedClassifier
from art_denoised.smoothing.procedures import Stage

SIGMA = 0.25


class HalfSpace(nn.Module):
    """Class 0 where the mean pixel exceeds 0.5: at x its distance in l2 is exactly known."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        margin = x.mean((1, 2, 3)) - 0.5
        return torch.stack([margin, -margin], dim=1)


def cohen(base, x, n0, n, alpha, seed, index):
    """Certify as Cohen et al. write it: one sample at a time, no cleverness."""

    def sample_under_noise(stage, count):
        votes = np.zeros(10, int)
        stream = Stream(Gaussian(SIGMA), StreamKey(seed, index, stage), x.shape)
        for noise in stream.take(count):
            with torch.no_grad():
                votes[int(base((x + SIGMA * noise)[None]).argmax())] += 1
        return votes

    top = int(sample_under_noise(Stage.SELECTION, n0).argmax())
    k = int(sample_under_noise(Stage.ESTIMATION, n)[top])
    p_lower = float(stats.beta.ppf(alpha, k, n - k + 1)) if k else 0.0
    return (top, SIGMA * stats.norm.ppf(p_lower)) if p_lower > 0.5 else (-1, 0.0)


def test_agrees_with_a_literal_loop(digits):
    base = DenoisedClassifier(digits_classifier(), digits_denoiser(), sigma=SIGMA)
    for index in range(8):
        x = digits[0][index]
        label, radius = cohen(base, x, 50, 250, 0.001, 7, index)
        ours = certify(base, x, sigma=SIGMA, n0=50, n=250, alpha=0.001, seed=7, index=index)
        assert ours.label == label
        assert radius - 1e-6 <= ours.radius <= radius


def test_radius_is_at_most_the_true_distance_and_tends_to_it():
    """For a half-space Theorem 1 is tight: the true radius is the distance to the plane."""
    x = torch.full((1, 8, 8), 0.53)
    distance = 0.03 * 8  # ||1||_2 = 8 and the mean divides by 64
    radii = [certify(HalfSpace(), x, sigma=SIGMA, n=n, seed=1).radius for n in (100, 1000, 20_000)]
    assert max(radii) <= distance  # fails by chance with probability 0.003
    assert radii[-1] > 0.93 * distance


def test_selection_and_estimation_see_different_noise():
    seen: list[torch.Tensor] = []

    class Recorder(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.extend(x)
            return torch.eye(2)[torch.zeros(len(x), dtype=torch.long)]

    certify(Recorder(), torch.zeros(1, 4, 4), sigma=1.0, n0=50, n=120)
    noisy = seen[2:]  # two clean images come first, to see which memory order the network takes
    assert len(noisy) == 170
    assert len({tuple(x.flatten().tolist()) for x in noisy}) == 170


def test_certificate_carries_everything(digits):
    c = certify(digits_classifier(), digits[0][0], sigma=SIGMA, n0=30, n=200, alpha=0.01, seed=9)
    assert (c.n0, c.n, c.alpha, c.sigma, c.seed, c.dtype) == (30, 200, 0.01, SIGMA, 9, "float32")
    assert sum(c.counts.values()) == 200
    half = digits_classifier().bfloat16()
    assert certify(half, digits[0][0], sigma=SIGMA, n=100).dtype == "bfloat16"


def test_vote_abstains_where_it_cannot_tell():
    even = vote(HalfSpace(), torch.full((1, 8, 8), 0.5), sigma=SIGMA, n=200)
    assert even.label == -1
    assert vote(HalfSpace(), torch.full((1, 8, 8), 0.6), sigma=SIGMA, n=200).label == 0


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"sigma": 0}, "sigma is 0"),
        ({"sigma": float("inf")}, "sigma is inf"),
        ({"sigma": "loud"}, "loud"),
        ({"alpha": 0.5}, "alpha is 0.5"),
        ({"n0": 0}, "n0 is 0"),
        ({"n": 9}, "fewer than 10"),
        ({"n": 10.5}, "n is 10.5"),
        ({"seed": -1}, "seed is -1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"sigma": 64}, "image units"),
        ({"x": torch.full((1, 8, 8), 255.0)}, "divide by 255"),
        ({"x": torch.full((1, 8, 8), 255.0), "clip_values": (0, 2)}, "255"),
        ({"x": torch.zeros(2, 1, 8, 8)}, "shape"),
        ({"x": torch.zeros(1, 8, 8) / 0}, "NaN"),
        ({"base": nn.Dropout()}, "training mode"),
    ],
)
def test_bad_values(changes, word):
    options = {"base": HalfSpace(), "x": torch.zeros(1, 8, 8), "sigma": 0.25, "n": 100, **changes}
    with pytest.raises(InputError, match=word):
        certify(**options)


def test_the_smallest_n_that_can_certify_does():
    x = torch.full((1, 8, 8), 1.0)
    assert certify(HalfSpace(), x, sigma=SIGMA, n=10).radius > 0


def test_radii_stop_sampling_and_labels_skip(digits):
    base, x = digits_classifier(), digits[0][0]
    options = {"sigma": SIGMA, "n": 10_000, "radii": [0.1]}
    c = certify(base, x, **options)
    assert c.proves(0.1)
    assert c.drawn < 2000
    skipped = certify(base, x, **options, label=(c.label + 1) % 10)
    assert (skipped.label, skipped.n) == (-1, 0)
    whole = certify(base, x, sigma=SIGMA, n=1000, label=(c.label + 1) % 10)
    assert whole.n == 1000  # without radii the full radius is asked for


def test_anytime_certificates_are_tightened_and_stop_in_time(digits):
    base, x = digits_classifier(), digits[0][0]
    first = certify_anytime(base, x, sigma=SIGMA, n=150, n0=50)
    second = certify_anytime(base, x, sigma=SIGMA, n=2000, n0=50, earlier=first)
    assert second == certify_anytime(base, x, sigma=SIGMA, n=2000, n0=50, batch_size=7)
    assert certify_anytime(base, x, sigma=SIGMA, n=100, n0=50, earlier=second) == second
    for other in ({"sigma": 0.5}, {"seed": 1}, {"alpha": 0.01}):
        with pytest.raises(InputError, match=next(iter(other))):
            certify_anytime(base, x, **{"sigma": SIGMA, "earlier": first, **other})
    fixed = certify(base, x, sigma=SIGMA, n=150)
    with pytest.raises(InputError, match="bound"):
        certify_anytime(base, x, sigma=SIGMA, earlier=fixed)
    quick = certify_anytime(base, x, sigma=SIGMA, n=10**9, seconds=0.3)
    assert 0 < quick.n < 10**9
    assert certify_anytime(base, x, sigma=SIGMA, n0=50, seconds=1e-9, earlier=first) == first
    with pytest.raises(InputError, match="no time to select"):
        certify_anytime(base, x, sigma=SIGMA, n0=10**9, seconds=0.05)
