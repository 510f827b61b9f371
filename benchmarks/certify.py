"""Time certification beside ART's, a literal Cohen loop, and the bare forward pass.

    python benchmarks/certify.py [--images 40] [--n 100000] [--threads 2] [--repeats 3] [--tiny]

All contestants run in this process, with the same threads, on the same network: a ResNet-20 for
32x32 images, trained here under noise on enlarged handwritten digits.

1. Fixed n = 1,000, four images. The unit is the bare forward pass over equally many images at its
   best batch size. Repeats are interleaved; best and worst are given.
2. The table of radii 0, sigma, 2 sigma and 3 sigma at n = 100,000, for two levels of noise, because
   the saving depends on how certain the network is. The peers spend the same time on every image,
   so they certify two images, timed separately, and the time is scaled to all.
"""

from __future__ import annotations

import argparse
import platform
import resource
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from scipy.stats import beta, norm
from torch import nn
from torch.nn import functional as F

from art_denoised import DenoisedSmoothing, load_data
from art_denoised.smoothing import best_batch_size

# First, because benchmarks/ has a networks.py too.
sys.path.insert(0, str(Path(__file__).parent.parent / "results" / "cifar10"))
from networks import ResNet

ALPHA, N0 = 0.001, 100
SIGMAS = (1.5, 2.0)
BATCHES = (16, 32, 64, 128, 256)


def enlarged(*, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the handwritten digits as (images, 3, 32, 32) in [0, 1], and their labels."""
    x, y = zip(*load_data("digits", train=train), strict=True)
    return F.interpolate(torch.stack(x), scale_factor=4).repeat(1, 3, 1, 1), torch.tensor(y)


def trained(sigma: float, depth: int = 20, steps: int = 150) -> nn.Module:
    torch.manual_seed(0)
    images, labels = enlarged(train=True)
    network = ResNet(depth).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(images), (64,))
        x = images[chosen].contiguous(memory_format=torch.channels_last)
        loss = F.cross_entropy(network(x + sigma * torch.randn_like(x)), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def forward(network: nn.Module, count: int, batch: int) -> None:
    x = torch.rand(batch, 32, 32, 3).permute(0, 3, 1, 2)  # channels last, as ours
    with torch.inference_mode():
        for _ in range(-(-count // batch)):
            network(x)


def cohen(network: nn.Module, images: torch.Tensor, sigma: float, n: int, batch: int) -> None:
    """Certify as in the reference code: repeat, add noise, argmax, count on the CPU."""
    for x in images:
        votes = []
        for count in (N0, n):
            counts = np.zeros(10, int)
            with torch.no_grad():
                for _ in range(-(-count // batch)):
                    this = min(batch, count)
                    count -= this
                    copies = x.repeat((this, 1, 1, 1))
                    labels = network(copies + torch.randn_like(copies) * sigma).argmax(1)
                    for label in labels.numpy():
                        counts[label] += 1
            votes.append(counts)
        k = votes[1][votes[0].argmax()]
        norm.ppf(beta.ppf(ALPHA, k, n - k + 1))


def ours_and_art(network: nn.Module, sigma: float) -> tuple[DenoisedSmoothing, object]:
    from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing

    shape = {"input_shape": (3, 32, 32), "nb_classes": 10, "clip_values": (0.0, 1.0)}
    ours = DenoisedSmoothing(network, sigma=sigma, sample_size=N0, alpha=ALPHA, seed=0, **shape)
    theirs = PyTorchRandomizedSmoothing(
        network, nn.CrossEntropyLoss(), scale=sigma, sample_size=N0, alpha=ALPHA,
        device_type="cpu", **shape,
    )  # fmt: skip
    return ours, theirs


def seconds(task: Callable[[], object]) -> float:
    start = time.perf_counter()
    task()
    return time.perf_counter() - start


def fixed(
    network: nn.Module,
    repeats: int,
    count: int = 4,
    n: int = 1000,
    batches: Sequence[int] = BATCHES,
) -> float:
    """Print the first comparison, and return the seconds of a bare forward pass per sample."""
    images, sigma = enlarged(train=False)[0][:count], SIGMAS[0]
    ours, theirs = ours_and_art(network, sigma)
    tuned, total = best_batch_size(network, images[0]), len(images) * (n + N0)
    tasks: dict[str, Callable[[], object]] = {
        f"forward, batch {batch}": lambda batch=batch: forward(network, total, batch)
        for batch in batches
    }
    tasks[f"ours, batch {tuned} (tuned)"] = lambda: ours.certify(images.numpy(), n, tuned)
    tasks["ours, quantised noise"] = lambda: ours.certificates(
        (images * 255).round().numpy() / 255, n, tuned, noise="quantised"
    )
    for batch in (1000, 64):
        name = f"Cohen loop, batch {batch}"
        tasks[name] = lambda batch=batch: cohen(network, images, sigma, n, batch)
    tasks["ART certify, batch 32"] = lambda: theirs.certify(images.numpy(), n)
    forward(network, 256, 64)  # warm up
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(repeats):
        for name, task in tasks.items():
            times[name].append(seconds(task))
    unit = min(min(t) for name, t in times.items() if name.startswith("forward"))
    print(f"Fixed n = {n}, {len(images)} images, {repeats} repeats\n")
    print(f"{'':28}{'best (s)':>10}{'worst (s)':>11}{'x forward':>11}")
    for name, taken in times.items():
        print(f"{name:28}{min(taken):10.2f}{max(taken):11.2f}{min(taken) / unit:11.2f}")
    return unit / total


def table(networks: dict[float, nn.Module], count: int, n: int, per_sample: float) -> None:
    images, labels = enlarged(train=False)
    images, labels = images[:count].numpy(), labels[:count].numpy()
    rows = [("forward, best batch", [per_sample * (n + N0)])]
    sigma, network = next(iter(networks.items()))
    _, theirs = ours_and_art(network, sigma)
    peers = {
        f"Cohen loop, batch {batch}": lambda x, batch=batch: cohen(
            network, torch.from_numpy(x), sigma, n, batch
        )
        for batch in (1000, 64)
    }
    peers["ART certify, batch 32"] = lambda x: theirs.certify(x, n)
    memory = {}
    print(
        f"\nTable of four radii at n = {n}, {count} images (of the peers two, scaled)\n", flush=True
    )
    for sigma, network in networks.items():
        ours, _ = ours_and_art(network, sigma)
        batch = best_batch_size(network, torch.from_numpy(images[0]))
        radii = [k * sigma for k in range(4)]
        start = time.perf_counter()
        shares, certificates = ours.certify_table(images, labels, radii, n, batch)
        rows.append((f"ours, sigma {sigma:g}", [(time.perf_counter() - start) / count]))
        drawn = sum(c.n0 + c.drawn for c in certificates) / count
        print(
            f"sigma {sigma:g}: {drawn:.0f} samples an image, certified accuracy "
            f"{', '.join(f'{100 * row.certified_accuracy:.1f}%' for row in shares)}",
            flush=True,
        )
    memory["ours"] = peak()
    for name, certify in peers.items():
        rows.append((name, [seconds(partial(certify, images[i : i + 1])) for i in (0, 1)]))
        memory[name] = peak()
    ours_times = [taken[0] for name, taken in rows if name.startswith("ours")]
    print(f"\n{'':32}{'best (s)':>10}{'worst (s)':>11}{'x each of ours':>18}")
    for name, taken in rows:
        ratios = "".join(f"{min(taken) / own:9.1f}" for own in ours_times)
        print(f"{name:32}{min(taken) * count:10.1f}{max(taken) * count:11.1f}{ratios}")
    print("peak memory so far (GiB): " + ", ".join(f"{k} {v:.1f}" for k, v in memory.items()))


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--n", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="smallest size, to try the script")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.threads = 1
    torch.set_num_threads(arguments.threads)
    versions = "adversarial-robustness-toolbox"
    print(
        f"{platform.machine()}, {arguments.threads} threads, Python {platform.python_version()}, "
        f"torch {torch.__version__}, {versions} {version(versions)}\n"
    )
    if arguments.tiny:
        networks = {sigma: trained(sigma, depth=8, steps=1) for sigma in SIGMAS}
        table(networks, 2, 20, fixed(networks[SIGMAS[0]], 1, 1, 20, BATCHES[:1]))
    else:
        networks = {sigma: trained(sigma) for sigma in SIGMAS}
        per_sample = fixed(networks[SIGMAS[0]], arguments.repeats)
        table(networks, arguments.images, arguments.n, per_sample)


if __name__ == "__main__":
    main()
