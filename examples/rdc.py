"""Classify with a diffusion model: what it costs, what it answers, and what an attack leaves.

    python examples/rdc.py

No classifier is trained. The attack is given the exact gradient and, as a second column, BPDA.
Budgets are small (20 images, 8 noise levels, 5 steps), too small to tell the two apart: the
notebook attack_a_diffusion_classifier and docs/rdc.md do.
"""

from __future__ import annotations

import torch

from art_denoised import PGD, RobustDiffusionClassifier, evaluate
from art_denoised.data import load_data
from art_denoised.demo import digits_diffusion
from art_denoised.diffusion import noise_levels
from art_denoised.rdc import predict_anytime

IMAGES = 20


def main() -> None:
    data = load_data("digits")
    images, labels = zip(*data, strict=True)
    x, y = torch.stack(images), torch.tensor(labels)
    rdc = RobustDiffusionClassifier(
        digits_diffusion(), input_shape=(1, 8, 8), eta=0.15, levels=noise_levels(8), seed=0
    )
    maximization, classifier = rdc.model
    print(f"network evaluations (NFE) for one prediction: {rdc.nfe}")

    # On images that are not attacked, and before the attack: it decides how strong that looks.
    print(f"temperature: {classifier.fit_temperature(x[200:], y[200:]):.2f}")

    likelier = maximization(x[:IMAGES])
    found = predict_anytime(classifier, likelier)
    print(f"NFE of the classifier: {found.full_nfe}; with unlikely classes dropped: {found.nfe}")

    log = evaluate(
        rdc.model, data, [PGD(0.15, steps=5)], indices=range(IMAGES), masking_checks=False
    )
    for (attack, gradient, _), rows in log.columns.items():
        right = sum(all(row.fresh) for row in rows)
        print(f"{attack}, gradient {gradient}: {right} of {len(rows)} right")


if __name__ == "__main__":
    main()
