"""Certify a defence and attack it: certified accuracy is at most robust accuracy.

    python examples/certified_and_attacked.py

Both are of the same smoothed classifier at the same l2 radius. Robust accuracy below certified
accuracy, beyond what alpha allows, would mean that the certificates are wrong.
"""

from __future__ import annotations

import numpy as np
import torch
from art.attacks.evasion import ProjectedGradientDescent

from art_denoised import DenoisedSmoothing, load_data
from art_denoised.demo import digits_classifier, digits_denoiser

RADIUS, IMAGES = 0.3, 12


def main() -> None:
    data = load_data("digits")
    x = torch.stack([data[i][0] for i in range(IMAGES)]).numpy()
    y = np.array([data[i][1] for i in range(IMAGES)])
    smoothed = DenoisedSmoothing(
        digits_classifier(),
        digits_denoiser(),
        sigma=0.25,
        samples=16,  # an attack of a real run takes hundreds
        input_shape=(1, 8, 8),
        nb_classes=10,
        seed=0,
    )
    labels, radii = smoothed.certify(x, n=300)
    certified = np.mean((labels == y) & (radii >= RADIUS))

    attack = ProjectedGradientDescent(
        smoothed, norm=2, eps=RADIUS, eps_step=0.1, max_iter=10, verbose=False
    )
    x_adv = attack.generate(x, y)
    attacked = np.mean(smoothed.vote(x_adv, n=300) == y)

    print(f"clean accuracy     {np.mean(smoothed.vote(x, n=300) == y):.0%}")
    print(f"under PGD at {RADIUS}   {attacked:.0%}")
    print(f"certified at {RADIUS}   {certified:.0%}")
    assert certified <= attacked


if __name__ == "__main__":
    main()
