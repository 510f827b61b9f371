"""Time the diffusion classifier beside a literal loop of the reference and the bare network.

    python benchmarks/rdc.py [--images 4] [--levels 16] [--threads 2] [--repeats 3] [--tiny]

One small U-Net (random weights, 28x28) and ten classes. The unit is the bare network on equally
many inputs at its best batch size. The literal loop takes one image and one class at a time and 64
levels at once, as the public code of Chen et al. does. Gradients are of cross-entropy.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from art_denoised import DiffusionClassifier, DiffusionModel, noise_levels
from art_denoised.diffusion import Levels, unet_diffusion

CLASSES, BATCHES = 10, (16, 32, 64, 128)


def model() -> DiffusionModel:
    torch.manual_seed(0)
    return unet_diffusion(1, 28, classes=CLASSES, widths=(16, 32)).eval().requires_grad_(False)


def bare(network: DiffusionModel, count: int, batch: int) -> None:
    x, sigma = torch.rand(batch, 1, 28, 28), torch.full((batch,), 0.25)
    y = torch.zeros(batch, dtype=torch.long)
    with torch.inference_mode():
        for _ in range(-(-count // batch)):
            network(x, sigma, y)


def literal(network: DiffusionModel, x: torch.Tensor, levels: Levels, *, gradient: bool) -> None:
    for image in x:
        leaf = image[None].clone().requires_grad_(gradient)
        logits, gradients = [], []
        for label in range(CLASSES):
            loss = torch.zeros(())
            for sigmas, weights in zip(
                torch.tensor(levels.sigmas).split(64),
                torch.tensor(levels.weights).split(64),
                strict=True,
            ):
                copies = leaf.repeat(len(sigmas), 1, 1, 1)
                noisy = copies + sigmas.reshape(-1, 1, 1, 1) / 2 * torch.randn_like(copies)
                x_hat = network(noisy, sigmas / 2, torch.full((len(sigmas),), label))
                loss = loss + (weights * (x_hat - copies).square().mean((1, 2, 3))).sum()
            if gradient:
                gradients.append(torch.autograd.grad(loss, leaf)[0])
            logits.append(float(loss.detach()))


def ours(dc: DiffusionClassifier, x: torch.Tensor, *, gradient: bool) -> None:
    if not gradient:
        with torch.no_grad():
            dc(x)
        return
    leaf = x.clone().requires_grad_()
    F.cross_entropy(dc(leaf), torch.zeros(len(x), dtype=torch.long)).backward()


def memory(levels: int, classes: int) -> int:
    """Return the peak memory in MiB of a process that takes one gradient."""
    script = f"""
import resource, torch
from torch.nn import functional as F
from art_denoised import DiffusionClassifier, noise_levels
from art_denoised.diffusion import unet_diffusion
torch.set_num_threads(1)
model = unet_diffusion(1, 28, classes={classes}, widths=(16, 32)).eval().requires_grad_(False)
levels = noise_levels({levels})
dc = DiffusionClassifier(model, levels=levels, seed=0, temperature=1e4, max_batch=32)
x = torch.rand(2, 1, 28, 28, requires_grad=True)
F.cross_entropy(dc(x), torch.tensor([0, 1])).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""
    return int(
        subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--levels", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="smallest size, to try the script")
    arguments = parser.parse_args()
    batches, ours_batches, sizes = BATCHES, (32, 64), ((8, 10), (64, 10), (8, 80))
    if arguments.tiny:
        arguments.images, arguments.levels, arguments.repeats, arguments.threads = 1, 1, 1, 1
        batches, ours_batches, sizes = (16,), (32,), ((1, 2),)
    torch.set_num_threads(arguments.threads)
    network, levels = model(), noise_levels(arguments.levels)
    x = torch.rand(arguments.images, 1, 28, 28)
    count = arguments.images * arguments.levels * CLASSES
    tasks: dict[str, Callable[[], object]] = {
        f"bare network, batch {batch}": lambda batch=batch: bare(network, count, batch)
        for batch in batches
    }
    for batch in ours_batches:
        dc = DiffusionClassifier(network, levels=levels, seed=0, max_batch=batch, temperature=1e4)
        tasks[f"ours, batch {batch}"] = lambda dc=dc: ours(dc, x, gradient=False)
        tasks[f"with gradient, recomputed, {batch}"] = lambda dc=dc: ours(dc, x, gradient=True)
        along = DiffusionClassifier(
            network, levels=levels, seed=0, max_batch=batch, temperature=1e4, recompute=False
        )
        tasks[f"with gradient, along, {batch}"] = lambda dc=along: ours(dc, x, gradient=True)
    tasks["literal loop"] = lambda: literal(network, x, levels, gradient=False)
    tasks["literal loop with gradient"] = lambda: literal(network, x, levels, gradient=True)
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for task in () if arguments.tiny else tasks.values():
        task()  # warm up
    for _ in range(arguments.repeats):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            times[name].append(time.perf_counter() - start)
    unit = min(min(taken) for name, taken in times.items() if name.startswith("bare"))
    print(
        f"{arguments.images} images, {arguments.levels} levels, {CLASSES} classes, "
        f"{arguments.threads} threads, {platform.machine()}, torch {torch.__version__}\n"
    )
    print(f"{'':32}{'best (s)':>10}{'worst (s)':>11}{'x bare':>9}")
    for name, taken in times.items():
        print(f"{name:32}{min(taken):10.2f}{max(taken):11.2f}{min(taken) / unit:9.2f}")
    print("\npeak memory of one gradient (MiB), by levels and classes")
    for size in sizes:
        print(f"{size[0]:5} levels {size[1]:4} classes {memory(*size):6}")


if __name__ == "__main__":
    main()
