"""Attack RDC on handwritten digits with fresh noise in every call: PGD with EOT.

    python results/digits/fresh.py [--images 40] [--steps 30] [--draws 10]

Gradients are exact and averaged over the draws. The attacked image is then classified as many
times. "Average" is the mean over evaluations; "worst" counts an image only if every evaluation is
right. Intervals are 95% (Clopper-Pearson).
"""

from __future__ import annotations

import argparse
import time

import torch
from rdc import EPS, ETA, LEVELS, diffusion_classifier
from torch import nn

from art_denoised import PGD, DiffusionClassifier, LikelihoodMaximization, noise_levels
from art_denoised.data import digits
from art_denoised.demo import digits_diffusion
from art_denoised.diffusion import preview_cost
from art_denoised.smoothing import proportion_interval


def defence(steps: int) -> nn.Module:
    model = digits_diffusion().requires_grad_(False)
    classifier = DiffusionClassifier(
        model,
        levels=noise_levels(LEVELS),
        temperature=diffusion_classifier().temperature,
        recompute=False,
    )
    return nn.Sequential(LikelihoodMaximization(model, steps=steps, eta=ETA), classifier).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--draws", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = [digits(train=False)[i] for i in range(arguments.images)]
    x, y = torch.stack([x for x, _ in data]), torch.tensor([y for _, y in data])
    draws = arguments.draws
    model = defence(5)
    cost = preview_cost(model, (1, 8, 8), images=len(x)).gradient_flop * arguments.steps * draws
    print(
        f"{len(x)} held-out digits, PGD-{arguments.steps} with EOT of {draws}, l_inf {EPS}, "
        f"{LEVELS} noise levels: {cost / 1e12:.1f} TFLOP"
    )
    start = time.perf_counter()
    x_adv = PGD(EPS, steps=arguments.steps, eot=draws)(model, x, y)
    for name, images in (("clean", x), ("attacked", x_adv)):
        with torch.no_grad():
            right = torch.stack([model(images).argmax(1) == y for _ in range(draws)])
        held = int(right.all(0).sum())
        low, high = proportion_interval(held, len(y))
        average, worst = float(right.double().mean()), held / len(y)
        print(f"{name:10}average {average:6.1%}, worst {worst:6.1%} ({low:.0%}-{high:.0%})")
    print(f"{time.perf_counter() - start:.0f} seconds")


if __name__ == "__main__":
    main()
