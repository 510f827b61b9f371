"""Attack RDC on handwritten digits with exact gradients and with BPDA.

    python results/digits/rdc.py [--images 100] [--steps 100] > results/digits/rdc.txt

PGD (torchattacks) in l_inf on fixed noise, which the attacker knows. Robust accuracy has 95%
intervals (Clopper-Pearson). The cosine is between the exact gradient and BPDA's, on clean images.
"""

from __future__ import annotations

import argparse
import time
from functools import cache

import torch
import torchattacks
from torch import nn
from torch.nn import functional as F

from art_denoised import DiffusionClassifier, LikelihoodMaximization, noise_levels
from art_denoised.data import digits
from art_denoised.demo import digits_classifier, digits_diffusion
from art_denoised.rdc import disagreement, predict_anytime
from art_denoised.smoothing import proportion_interval

EPS, ETA, LEVELS = 0.15, 0.15, 16


def rdc(steps: int, gradient: str = "exact") -> nn.Module:
    model = digits_diffusion()
    lm = LikelihoodMaximization(model, steps=steps, eta=ETA, gradient=gradient, seed=0)
    return nn.Sequential(lm, diffusion_classifier()).eval()


@cache
def diffusion_classifier() -> nn.Module:
    """Return the classifier, its temperature fitted on held-out images that are not attacked.

    The temperature changes no prediction, but PGD on cross-entropy depends on it. If it is too low,
    the softmax saturates in float32 and the gradient is lost. If it is too high, the attack
    follows all classes at once.
    """
    classifier = DiffusionClassifier(digits_diffusion(), levels=noise_levels(LEVELS), seed=0)
    data = [digits(train=False)[i] for i in range(200, 500)]
    classifier.fit_temperature(
        torch.stack([x for x, _ in data]), torch.tensor([y for _, y in data])
    )
    return classifier.eval()


def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> str:
    with torch.no_grad():
        hits = int((model(x).argmax(1) == y).sum())
    low, high = proportion_interval(hits, len(y))
    return f"{100 * hits / len(y):5.1f}% ({100 * low:.0f}-{100 * high:.0f})"


def cosine(steps: int, x: torch.Tensor, y: torch.Tensor) -> float:
    gradients = []
    for gradient in ("exact", "bpda"):
        leaf = x.clone().requires_grad_()
        logits = rdc(steps, gradient)(leaf)
        F.cross_entropy(logits, y, reduction="sum").backward()
        gradients.append(leaf.grad.flatten(1))
    return float(F.cosine_similarity(*gradients).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = [digits(train=False)[i] for i in range(arguments.images)]
    x, y = torch.stack([x for x, _ in data]), torch.tensor([y for _, y in data])
    print(f"{len(x)} held-out digits, PGD-{arguments.steps}, l_inf {EPS}, {LEVELS} noise levels\n")
    print(f"temperature {diffusion_classifier().temperature:.3g}\n")
    print(f"{'':40}{'clean':>18}{'attacked':>18}{'seconds':>9}")
    defences = {
        "plain CNN": (digits_classifier(),) * 2,
        "diffusion classifier": (diffusion_classifier(),) * 2,
        "RDC, Adam, N = 5, exact": (rdc(5),) * 2,
        "RDC, Adam, N = 5, BPDA": (rdc(5), rdc(5, "bpda")),
        "RDC, Adam, N = 1, exact": (rdc(1),) * 2,
        "RDC, Adam, N = 1, BPDA": (rdc(1), rdc(1, "bpda")),
    }
    for name, (judged, attacked) in defences.items():
        start = time.perf_counter()
        torch.manual_seed(0)
        attack = torchattacks.PGD(attacked, eps=EPS, alpha=EPS / 10, steps=arguments.steps)
        x_adv = attack(x, y)
        seconds = time.perf_counter() - start
        row = f"{accuracy(judged, x, y):>18}{accuracy(judged, x_adv, y):>18}{seconds:9.0f}"
        print(f"{name:40}{row}", flush=True)
    print("\nsteps N   cosine of exact gradient and BPDA")
    for steps in range(1, 6):
        print(f"{steps:7}   {cosine(steps, x, y):.2f}", flush=True)
    everything = DiffusionClassifier(digits_diffusion(), seed=0)
    images = torch.stack([digits(train=False)[i][0] for i in range(300)])
    found = predict_anytime(everything, images)
    saving, other = found.full_nfe / found.nfe, disagreement(everything, images)
    print("\nelimination of classes, 300 images, 32 levels:")
    print(f"{saving:.1f}x fewer network evaluations, another prediction for {other:.1%}")


if __name__ == "__main__":
    main()
