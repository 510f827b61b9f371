"""The diffusion classifier and RDC of MNIST as they are attacked, with settings from tune.py."""

from __future__ import annotations

import json

from networks import HERE, diffusion
from torch import nn

from art_denoised import DiffusionClassifier, LikelihoodMaximization, noise_levels
from art_denoised.rdc import Adam

LEVELS, P_MEAN, P_STD, MAX_BATCH = 8, 0.3, 0.8, 80
STEPS, ETA, LR = 5, 0.2, 0.1
TEMPERATURES = HERE / "temperatures.json"  # by number of levels, fitted by tune.py


def diffusion_classifier(*, seed: int | None = 0, levels: int = LEVELS) -> DiffusionClassifier:
    fitted = json.loads(TEMPERATURES.read_text()) if TEMPERATURES.exists() else {}
    classifier = DiffusionClassifier(
        diffusion(),
        levels=noise_levels(levels, p_mean=P_MEAN, p_std=P_STD),
        temperature=fitted.get(str(levels), 1.0),
        max_batch=MAX_BATCH,
        recompute=False,  # cross-entropy involves all classes
        seed=seed,
    )
    return classifier.eval()


def rdc(
    *,
    gradient: str = "exact",
    seed: int | None = 0,
    steps: int = STEPS,
    eta: float = ETA,
    lr: float = LR,
) -> nn.Module:
    lm = LikelihoodMaximization(
        diffusion(), steps=steps, eta=eta, form=Adam(lr), gradient=gradient, seed=seed
    )
    return nn.Sequential(lm, diffusion_classifier(seed=seed)).eval()
