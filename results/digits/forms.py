"""Compare the three forms of likelihood maximization on handwritten digits.

    python results/digits/forms.py [--images 40] [--steps 20] > results/digits/forms.txt

PGD in l_inf on fixed noise, which the attacker knows. "moved" is the mean over images of the
largest change of a pixel. Intervals are 95% (Clopper-Pearson). "differ" counts the images whose
outcome is another than with "adam", under the attack with exact gradients and under that with BPDA:
equal accuracies need not be those of the same images.
"""

from __future__ import annotations

import argparse

import torch
from rdc import EPS, ETA, LEVELS, accuracy, diffusion_classifier

from art_denoised import PGD, LikelihoodMaximization, load_data, noise_levels
from art_denoised.demo import digits_diffusion
from art_denoised.rdc import RDC, Momentum


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = load_data("digits")
    pairs = [data[i] for i in range(arguments.images)]
    x, y = torch.stack([x for x, _ in pairs]), torch.tensor([y for _, y in pairs])
    print(f"{len(x)} validation digits, PGD-{arguments.steps}, l_inf {EPS}, eta {ETA}, N = 5\n")
    print(f"{'form':16}{'moved':>7}{'clean':>18}{'exact':>18}{'BPDA':>18}{'differ':>12}")
    first: list[torch.Tensor] = []  # the images that each attack on "adam" leaves right
    forms = {
        "adam": "adam",
        "adam_reference": "adam_reference",
        "momentum": Momentum(noise_levels(LEVELS)),
    }
    for name, form in forms.items():
        maximization = LikelihoodMaximization(digits_diffusion(), eta=ETA, form=form, seed=0)
        rdc = RDC(maximization, diffusion_classifier())
        moved = float((rdc.purify(x) - x).abs().flatten(1).amax(1).mean())
        row = f"{name:16}{moved:7.3f}{accuracy(rdc, x, y):>18}"
        left = []
        for gradient in rdc.gradients:
            rdc.gradient = gradient
            x_adv = PGD(EPS, steps=arguments.steps)(rdc, x, y)
            row += f"{accuracy(rdc, x_adv, y):>18}"
            with torch.no_grad():
                left.append(rdc(x_adv).argmax(1) == y)
        first = first or left
        differ = [int((a != b).sum()) for a, b in zip(left, first, strict=True)]
        print(f"{row}{differ[0]:>6} /{differ[1]:>4}", flush=True)


if __name__ == "__main__":
    main()
