"""Time and memory of the exact gradient of purification, beside plain autograd.

    python benchmarks/purification.py [--images 4] [--repeats 3] [--tiny]

A small U-Net with random weights on 28x28 images, and the reverse SDE. One thread; CPU time of the
process, because other programs may share the machine. Memory is the rise of the resident set, after
free memory has been handed back, and of plain autograd the literal loop over the same steps.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import platform
import re
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch

from art_denoised import Purification
from art_denoised.diffusion import LevelNoise, preview_cost, unet_diffusion

STEPS = (5, 20, 50, 100)
Task = Callable[[Purification, torch.Tensor], None]


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


def seconds(task: Task, purify: Purification, x: torch.Tensor, repeats: int) -> float:
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        task(purify, x)
        taken.append(time.process_time() - start)
    return min(taken)


def memory(task: Task, purify: Purification, x: torch.Tensor) -> float:
    """Return by how many MiB the resident set rises; NaN where Linux does not tell."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except OSError:
        return float("nan")
    before = resident("VmRSS")
    task(purify, x)
    return resident("VmHWM") - before


def resident(name: str) -> float:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024 if found else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="smallest size, to try the script")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    counts = STEPS
    if arguments.tiny:
        counts, arguments.images, arguments.repeats = (2,), 1, 1
    x = torch.rand(arguments.images, 1, 28, 28)
    exact(purification(2), x)  # warm up
    print(
        f"{len(x)} images, one thread, {platform.machine()}, torch {torch.__version__}, CPU time\n"
    )
    print(
        f"{'':6}{'forward':>9}{'exact':>9}{'':>7}{'autograd':>9}{'exact':>9}{'preview':>9}", end=""
    )
    print(f"{'autograd':>9}")
    print(f"{'steps':6}{'s':>9}{'s':>9}{'ratio':>7}{'s':>9}{'MiB':>9}{'MiB':>9}{'MiB':>9}")
    for steps in counts:
        purify = purification(steps)
        held = [memory(task, purify, x) for task in (exact, literal)]
        tasks = (forward, exact, literal)
        times = [seconds(task, purify, x, arguments.repeats) for task in tasks]
        preview = preview_cost(purify, (1, 28, 28), images=len(x)).memory / 2**20
        print(
            f"{steps:<6}{times[0]:9.2f}{times[1]:9.2f}{times[1] / times[0]:7.2f}{times[2]:9.2f}"
            f"{held[0]:9.1f}{preview:9.1f}{held[1]:9.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
