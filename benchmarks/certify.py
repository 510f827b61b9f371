"""Time certification beside ART's, a literal Cohen loop, and the bare forward pass.

    python benchmarks/certify.py [--images 40] [--n 100000] [--threads 2] [--repeats 3]
                                 [--json FILE] [--tiny]

All contestants run in this process, with the same threads, on the same network: a ResNet-20 for
32x32 images, trained here under noise on enlarged handwritten digits. "Folded" is the same network
with its batch norms folded into convolutions (`optimize`).

1. Fixed n = 1,000, four images. The unit is the fastest bare forward pass over equally many images:
   the best of both forms and all batch sizes. Repeats are interleaved; best and worst are given.
2. The table of radii 0, sigma, 2 sigma and 3 sigma at n = 100,000, for two levels of noise, because
   the saving depends on how certain the network is. The peers draw n0 + n samples for every image,
   so their time is that of part 1 for each sample, times the number of samples.
3. Memory of one certificate at n = 100,000, with a linear network that needs almost none itself.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from record import Record, options, rise
from scipy.stats import beta, norm
from torch import nn
from torch.nn import functional as F

from art_denoised import DenoisedSmoothing, load_data
from art_denoised.networks import optimize
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


def folded(network: nn.Module) -> nn.Module:
    return optimize(network, input_shape=(3, 32, 32))


def seconds(task: Callable[[], object]) -> float:
    start = time.perf_counter()
    task()
    return time.perf_counter() - start


def fixed(
    record: Record,
    network: nn.Module,
    repeats: int,
    count: int = 4,
    n: int = 1000,
    batches: Sequence[int] = BATCHES,
) -> None:
    """Time a fixed number of samples."""
    images, sigma = enlarged(train=False)[0][:count], SIGMAS[0]
    forms = {"": network, ", folded": folded(network)}
    _, theirs = ours_and_art(network, sigma)
    total = len(images) * (n + N0)
    tasks: dict[str, Callable[[], object]] = {
        f"forward{form}, batch {batch}": partial(forward, net, total, batch)
        for form, net in forms.items()
        for batch in batches
    }
    for form, net in forms.items():
        ours, _ = ours_and_art(net, sigma)
        tuned = best_batch_size(net, images[0])
        tasks[f"ours{form}, batch {tuned} (tuned)"] = partial(
            ours.certify, images.numpy(), n, tuned
        )
        tasks[f"ours{form}, quantised noise"] = partial(
            ours.certificates, (images * 255).round().numpy() / 255, n, tuned, noise="quantised"
        )
    for batch in (1000, 64):
        tasks[f"Cohen loop, batch {batch}"] = partial(cohen, network, images, sigma, n, batch)
    tasks["ART certify, batch 32"] = partial(theirs.certify, images.numpy(), n)
    forward(network, 256, 64)  # warm up
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(repeats):
        for name, task in tasks.items():
            times[name].append(seconds(task))
    unit = min(min(taken) for name, taken in times.items() if name.startswith("forward"))
    for name, taken in times.items():
        record.add("fixed", name, best_s=min(taken), worst_s=max(taken), ratio=min(taken) / unit)


def table(record: Record, networks: dict[float, nn.Module], count: int, n: int) -> None:
    """Time a table of four radii."""
    images, labels = enlarged(train=False)
    images, labels = images[:count].numpy(), labels[:count].numpy()
    for sigma, network in networks.items():
        network = folded(network)
        ours, _ = ours_and_art(network, sigma)
        batch = best_batch_size(network, torch.from_numpy(images[0]))
        radii = [k * sigma for k in range(4)]
        start = time.perf_counter()
        shares, certificates = ours.certify_table(images, labels, radii, n, batch)
        taken = time.perf_counter() - start
        record.add(
            "table", f"ours, folded, sigma {sigma:g}", time_s=taken,
            samples_an_image=round(sum(c.n0 + c.drawn for c in certificates) / count),
            certified_percent=[round(100 * row.certified_accuracy, 1) for row in shares],
        )  # fmt: skip


def compare(record: Record, count: int, n: int, timed: int = 4, timed_n: int = 1000) -> None:
    """Put beside the tables what the others take for them, by their time for each sample."""
    scale = count * (N0 + n) / (timed * (N0 + timed_n))
    own = {row["name"]: row["time_s"] for row in record.rows if row["section"] == "table"}
    for row in [row for row in record.rows if row["section"] == "fixed"]:
        if row["name"].startswith(("Cohen", "ART")) or row["ratio"] == 1:
            taken = scale * row["best_s"]
            times = {f"x_sigma_{name.split()[-1]}": taken / other for name, other in own.items()}
            record.add("table", f"{row['name']}, by its time a sample", time_s=taken, **times)


def memory(record: Record, n: int) -> None:
    """Measure by how much one certificate raises memory."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10)).eval()
    image = enlarged(train=False)[0][:1]
    ours, theirs = ours_and_art(network, SIGMAS[0])
    tasks: dict[str, Callable[[], object]] = {
        "ours, batch 64": lambda: ours.certify(image.numpy(), n, 64),
        "Cohen loop, batch 1000": lambda: cohen(network, image, SIGMAS[0], n, 1000),
        "ART certify, batch 32": lambda: theirs.certify(image.numpy(), n),
    }
    for name, task in tasks.items():
        record.add("memory", name, rise_MiB=rise(task))


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--n", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1 if arguments.tiny else arguments.threads)
    record = Record("certify", arguments.json, "adversarial-robustness-toolbox")
    if arguments.tiny:
        networks = {sigma: trained(sigma, depth=8, steps=1) for sigma in SIGMAS}
        fixed(record, networks[SIGMAS[0]], 1, 1, 20, BATCHES[:1])
        table(record, networks, 2, 20)
        compare(record, 2, 20, 1, 20)
        memory(record, 200)
    else:
        networks = {sigma: trained(sigma) for sigma in SIGMAS}
        fixed(record, networks[SIGMAS[0]], arguments.repeats)
        table(record, networks, arguments.images, arguments.n)
        compare(record, arguments.images, arguments.n)
        memory(record, arguments.n)


if __name__ == "__main__":
    main()
