"""Time and memory of the exact gradient of purification, beside plain autograd.

    python benchmarks/purification.py [--images 4] [--repeats 3] [--json FILE] [--tiny]

A small U-Net with random weights on 28x28 images, and the reverse SDE. One thread; CPU time of the
process, because other programs may share the machine. Memory is what the tensors take at most, and
the rise of the resident set after free memory has been handed back. Plain autograd is the literal
loop over the same steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from record import Record, held, options, ratio, rise, turns

from art_denoised import Purification
from art_denoised.diffusion import LevelNoise, preview_cost, unet_diffusion

STEPS = (5, 20, 50, 100)


def purification(steps: int) -> Purification:
    torch.manual_seed(0)
    model = unet_diffusion(1, 28, widths=(32, 64)).eval().requires_grad_(False)
    return Purification(model, t=0.1, steps=steps, sampler="sde", seed=0)


def forward(purify: Purification, x: torch.Tensor) -> None:
    with torch.no_grad():
        purify(x)


def exact(purify: Purification, x: torch.Tensor) -> None:
    leaf = x.clone().requires_grad_()
    torch.autograd.grad(purify(leaf).sum(), leaf)


def literal(purify: Purification, x: torch.Tensor) -> None:
    """Differentiate the loop over all steps at once."""
    noise, (sigma,) = LevelNoise(0), purify.sigmas
    leaf = x.clone().requires_grad_()
    u = 2 * leaf - 1
    levels = purify.sampler.levels(2 * sigma, purify.steps, 0.002)
    for i, pair in enumerate(pairwise((0.0, *levels))):
        eps = noise(u, range(len(u)), [i] * len(u))
        u = u + pair[1] * eps if i == 0 else purify.sampler.step(denoise(purify), u, pair, [eps], u)
    torch.autograd.grad(u.sum(), leaf)


def denoise(purify: Purification) -> Callable[[torch.Tensor, float], torch.Tensor]:
    return lambda u, sigma: 2 * purify.model((u + 1) / 2, sigma / 2) - 1


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    counts = STEPS
    if arguments.tiny:
        counts, arguments.images, arguments.repeats = (2,), 1, 1
    x = torch.rand(arguments.images, 1, 28, 28)
    exact(purification(2), x)  # warm up
    record = Record("purification", arguments.json)
    for steps in counts:
        purify = purification(steps)
        forms = (("forward", forward), ("exact", exact), ("autograd", literal))
        tasks = {name: partial(form, purify, x) for name, form in forms}
        resident = {name: rise(task) for name, task in tasks.items()}
        taken = turns(tasks, arguments.repeats, time.process_time)
        preview = preview_cost(purify, (1, 28, 28), images=len(x)).memory / 2**20
        record.add(
            "gradient", f"{steps} steps",
            **{f"{name}_s": min(seconds) for name, seconds in taken.items()},
            exact_to_forward=ratio(taken["exact"], taken["forward"])["ratio"],
            autograd_to_forward=ratio(taken["autograd"], taken["forward"])["ratio"],
            exact_MiB=held(tasks["exact"]), exact_resident_MiB=resident["exact"],
            preview_MiB=preview, autograd_MiB=held(tasks["autograd"]),
            autograd_resident_MiB=resident["autograd"],
        )  # fmt: skip


if __name__ == "__main__":
    main()
