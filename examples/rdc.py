"""Classify with a diffusion model, count its cost, and attack it.

    python examples/rdc.py

No classifier is trained. The attack runs with the exact gradient and with BPDA. Budgets are small
(6 images, 8 noise levels, 5 steps), too small to tell the two apart; the notebook
attack_a_diffusion_classifier and docs/tutorials/rdc.md compare them.
"""

from __future__ import annotations

import torch

import art_denoised as ad
from art_denoised.demo import digits_diffusion
from art_denoised.rdc import predict_anytime

IMAGES = 6


def main() -> None:
    data = ad.load_data("digits")
    images, labels = zip(*data, strict=True)
    x, y = torch.stack(images), torch.tensor(labels)
    rdc = ad.RobustDiffusionClassifier(
        digits_diffusion(), input_shape=(1, 8, 8), eta=0.15, levels=ad.noise_levels(8), seed=0
    )
    maximization, classifier = rdc.model
    print(f"network evaluations (NFE) for one prediction: {rdc.nfe}")

    # The temperature decides how strong the attack looks; fit it before, on other images.
    print(f"temperature: {classifier.fit_temperature(x[200:], y[200:]):.2f}")

    found = predict_anytime(classifier, maximization(x[:IMAGES]))
    print(f"NFE of the classifier: {found.full_nfe}; without unlikely classes: {found.nfe}")

    log = ad.evaluate(
        rdc.model, data, [ad.PGD(0.15, steps=5)], indices=range(IMAGES), masking_checks=False
    )
    for (attack, gradient, _), rows in log.columns.items():
        right = sum(all(row.fresh) for row in rows)
        print(f"{attack}, gradient {gradient}: {right} of {len(rows)} right")


if __name__ == "__main__":
    main()
