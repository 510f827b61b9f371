"""Certified radii of the diffusion classifier, by the certification that there is."""

from __future__ import annotations

import torch

from art_denoised import DiffusionClassifier, OneShotDenoiser, certify
from art_denoised.demo import digits_diffusion
from art_denoised.diffusion.weights import Levels, noise_levels
from art_denoised.evaluation.data import digits
from art_denoised.smoothing.modules import DenoisedClassifier


def test_the_diffusion_classifier_is_certified_behind_its_own_denoiser():
    """APNDC (Chen et al. 2024): denoise once without class, then classify on levels above."""
    sigma, model = 0.25, digits_diffusion()
    levels = noise_levels(16).above(2 * sigma)
    classifier = DiffusionClassifier(model, levels=levels, seed=0)
    base = DenoisedClassifier(classifier, OneShotDenoiser(model), sigma=sigma).eval()
    data = [digits(train=False)[i] for i in range(8)]
    found = [certify(base, x, sigma=sigma, n0=20, n=200, index=i) for i, (x, _) in enumerate(data)]
    right = [c for c, (_, y) in zip(found, data, strict=True) if c.label == y]
    assert len(right) >= 7
    assert sum(c.radius for c in right) / len(data) > 0.2


def test_levels_above():
    levels = Levels((0.1, 0.5, 1.0), (3.0, 2.0, 1.0))
    assert levels.above(0.5) == Levels((0.5, 1.0), (2.0, 1.0))
    assert levels.above(0.0) == levels
    assert torch.tensor(levels.above(0.6).sigmas).tolist() == [1.0]
