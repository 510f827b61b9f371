"""Time the diffusion classifier beside a literal loop of the reference and the bare network.

    python benchmarks/rdc.py [--images 2] [--levels 16] [--threads 1] [--repeats 5] [--json FILE]
                             [--tiny]

One small U-Net (random weights, 28x28) and ten classes. The unit is the bare network on equally
many inputs at its best batch size. All take turns, and ratios are of the same round. With one
thread, time is processor time, which other programs disturb less. The literal
loop takes one image and one class at a time and 64 levels at once, as the public code of Chen et
al. does. Gradients are of cross-entropy; "bare gradient" is the network alone, forward and
backward, which no gradient can avoid. "Compiled" is the same network by torch.compile, at batch
size 40. Memory is what tensors take at most, and the rise of the resident set.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from record import Record, held, options, ratio, rise, turns
from torch.nn import functional as F

from art_denoised import DiffusionClassifier, DiffusionModel, noise_levels
from art_denoised.diffusion import Levels, unet_diffusion

CLASSES, BATCHES, COMPILED = 10, (24, 40, 64), 40


def model() -> DiffusionModel:
    torch.manual_seed(0)
    return unet_diffusion(1, 28, classes=CLASSES, widths=(16, 32)).eval().requires_grad_(False)


def compiled() -> DiffusionModel:
    """Return the model with its network compiled, for batches of one size."""
    found = model()
    found.network = torch.compile(found.network, dynamic=False)
    return found


def bare(network: DiffusionModel, count: int, batch: int) -> None:
    x, sigma = torch.rand(batch, 1, 28, 28), torch.full((batch,), 0.25)
    y = torch.zeros(batch, dtype=torch.long)
    with torch.inference_mode():
        for _ in range(-(-count // batch)):
            network(x, sigma, y)


def bare_gradient(network: DiffusionModel, count: int, batch: int) -> None:
    """Evaluate the network forward and backward, as every gradient must."""
    x, sigma = torch.rand(batch, 1, 28, 28, requires_grad=True), torch.full((batch,), 0.25)
    y = torch.zeros(batch, dtype=torch.long)
    for _ in range(-(-count // batch)):
        torch.autograd.grad(network(x, sigma, y).square().sum(), x)


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


def memory(levels: int, classes: int) -> dict[str, float | None]:
    """Return what the tensors of one gradient take at most, and the rise of the resident set."""
    network = unet_diffusion(1, 28, classes=classes, widths=(16, 32)).eval().requires_grad_(False)
    dc = DiffusionClassifier(
        network, levels=noise_levels(levels), seed=0, temperature=1e4, max_batch=32
    )
    x = torch.rand(2, 1, 28, 28)

    def task() -> None:
        ours(dc, x, gradient=True)

    return {"tensors_MiB": held(task), "rise_MiB": rise(task)}


def tasks(
    network: DiffusionModel, x: torch.Tensor, levels: Levels, batch: int, form: str = ""
) -> dict[str, Callable[[], object]]:
    def classifier(*, recompute: bool) -> DiffusionClassifier:
        return DiffusionClassifier(
            network, levels=levels, seed=0, max_batch=batch, temperature=1e4, recompute=recompute
        )

    again, along = classifier(recompute=True), classifier(recompute=False)
    return {
        f"bare network{form}, batch {batch}": lambda: bare(network, again.nfe(len(x)), batch),
        f"prediction{form}, batch {batch}": lambda: ours(again, x, gradient=False),
        f"bare gradient{form}, batch {batch}": lambda: bare_gradient(
            network, again.nfe(len(x)), batch
        ),
        f"gradient, recomputed{form}, batch {batch}": lambda: ours(again, x, gradient=True),
        f"gradient, along{form}, batch {batch}": lambda: ours(along, x, gradient=True),
    }


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--levels", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    batches, sizes = BATCHES, ((8, 10), (64, 10), (8, 80))
    if arguments.tiny:
        arguments.images, arguments.levels, arguments.repeats, arguments.threads = 1, 1, 1, 1
        batches, sizes = (16,), ((1, 2),)
    torch.set_num_threads(arguments.threads)
    network, levels = model(), noise_levels(arguments.levels)
    x = torch.rand(arguments.images, 1, 28, 28)
    compared: dict[str, Callable[[], object]] = {}
    for batch in batches:
        compared |= tasks(network, x, levels, batch)
    if not arguments.tiny:  # compilation takes minutes
        compared |= tasks(compiled(), x, levels, COMPILED, ", compiled")
        for task in compared.values():
            task()
    compared["literal loop"] = lambda: literal(network, x, levels, gradient=False)
    compared["literal loop, gradient"] = lambda: literal(network, x, levels, gradient=True)
    record = Record("rdc", arguments.json)
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    times = turns(compared, arguments.repeats, clock)
    # The best batch of the bare network is its unit; that of the loop has gradients of its own.
    eager = [name for name in times if name.startswith("bare network, batch")]
    unit = min(eager, key=lambda name: min(times[name]))
    for name, taken in times.items():
        loop = ratio(taken, times["literal loop, gradient"]) if "gradient" in name else {}
        record.add(
            "time", name, best_s=min(taken), **ratio(taken, times[unit]),
            of_loop=loop.get("ratio"),
        )  # fmt: skip
    for levels_, classes in sizes:
        name = f"{levels_} levels, {classes} classes"
        record.add("memory", name, **memory(levels_, classes))


if __name__ == "__main__":
    main()
