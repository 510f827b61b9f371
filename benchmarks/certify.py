"""Time certification beside ART's, a literal Cohen loop, and the bare forward pass.

    python benchmarks/certify.py [--images 40] [--n 100000] [--threads 2] [--repeats 3]
                                 [--json FILE] [--tiny]

All contestants run in this process, with the same threads, on the same network: a ResNet-20 for
32x32 images, trained here under noise on enlarged handwritten digits. "Folded" is the same network
with its batch norms folded into convolutions, and "compiled" and "bfloat16" are that one compiled
or converted (`optimize`).

1. Fixed n = 10,000, one image. "Ratio" is to the fastest bare forward pass over equally many
   images, of all forms and batch sizes; "of its form" to the fastest of the same form. Repeats are
   interleaved; best and worst are given.
2. The same for one image of 224x224, a ResNet-18 with random weights, and n = 100.
3. The compiled networks of 1 and 2 with as many samples as a certificate takes, n = 100,000 and
   n = 1,000, beside the bare pass at the batch size that was its best: in 1 and 2 the passes that
   try a network before it is sampled count for several percent.
4. The table of radii 0, sigma, 2 sigma and 3 sigma at n = 100,000 with the compiled network, for
   two levels of noise, because the saving depends on how certain the network is. The peers draw
   n0 + n samples for every image, so their time is that of part 1 for each sample, times the number
   of samples.
5. Memory of one certificate at n = 100,000, with a linear network that needs almost none itself.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from record import Record, options, rise, turns
from scipy.stats import beta, norm
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18

from art_denoised import DenoisedSmoothing, load_data
from art_denoised.networks import optimize
from art_denoised.smoothing import best_batch_size

# First, because benchmarks/ has a networks.py too.
sys.path.insert(0, str(Path(__file__).parent.parent / "results" / "cifar10"))
from networks import ResNet

ALPHA, N0 = 0.001, 100
SIGMAS = (1.5, 2.0)
BATCHES = (32, 64, 128, 256)


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


def forward(network: nn.Module, shape: Sequence[int], count: int, batch: int) -> None:
    channels, height, width = shape
    dtype = next(network.parameters()).dtype
    x = torch.rand(batch, height, width, channels, dtype=dtype).permute(0, 3, 1, 2)  # as ours
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


def ours_and_art(
    network: nn.Module, sigma: float, shape: Sequence[int] = (3, 32, 32)
) -> tuple[DenoisedSmoothing, object]:
    from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing

    options = {"input_shape": tuple(shape), "nb_classes": 10, "clip_values": (0.0, 1.0)}
    ours = DenoisedSmoothing(network, sigma=sigma, sample_size=N0, alpha=ALPHA, seed=0, **options)
    theirs = PyTorchRandomizedSmoothing(
        network, nn.CrossEntropyLoss(), scale=sigma, sample_size=N0, alpha=ALPHA,
        device_type="cpu", **options,
    )  # fmt: skip
    return ours, theirs


def forms(
    network: nn.Module, shape: Sequence[int], *, compiled: bool, half: bool = False
) -> dict[str, nn.Module]:
    """Return the forms of a network, by what their names end with."""
    made = {"": network, ", folded": optimize(network, input_shape=shape)}
    if half:
        made[", bfloat16"] = optimize(network, dtype=torch.bfloat16, input_shape=shape)
    if compiled:
        made[", compiled"] = optimize(network, compile=True, input_shape=shape)
    return made


def fixed(
    record: Record,
    section: str,
    networks: dict[str, nn.Module],
    images: torch.Tensor,
    n: int,
    repeats: int,
    batches: Sequence[int] = BATCHES,
    batch: int | None = None,
) -> None:
    """Time a fixed number of samples; without a batch size ours is measured (`best_batch_size`)."""
    shape, total = images.shape[1:], len(images) * (n + N0)
    _, theirs = ours_and_art(networks[""], SIGMAS[0], shape)
    bare = {
        form: {f"forward{form}, batch {b}": partial(forward, net, shape, total, b) for b in batches}
        for form, net in networks.items()
    }
    own: dict[str, dict[str, Callable[[], object]]] = {}
    pixels = (images * 255).round().numpy() / 255
    for form, net in networks.items():
        ours, _ = ours_and_art(net, SIGMAS[0], shape)
        for b in () if batch else (16, *batches):  # compiled before sizes are compared
            with torch.no_grad():
                net(images[:1].expand(b, *shape).contiguous(memory_format=torch.channels_last))
        size = batch or best_batch_size(net, images[0])
        own[form] = {
            f"ours{form}, batch {size}": partial(ours.certify, pixels, n, size),
            f"ours{form}, quantised noise": partial(
                ours.certificates, pixels, n, size, noise="quantised"
            ),
        }
    peers: dict[str, Callable[[], object]] = {
        f"Cohen loop, batch {batch}": partial(cohen, networks[""], images, SIGMAS[0], n, batch)
        for batch in (1000, 64)
    }
    peers["ART certify, batch 32"] = partial(theirs.certify, pixels, n)
    kinds = {name: form for form in networks for name in (*bare[form], *own[form])}
    tasks: dict[str, Callable[[], object]] = {}
    for group in (*bare.values(), *own.values(), peers):
        tasks |= group
    times = turns(tasks, repeats)
    best = {name: min(taken) for name, taken in times.items()}
    units = {form: min(best[name] for name in bare[form]) for form in networks}
    for name, taken in times.items():
        record.add(
            section, name, best_s=best[name], worst_s=max(taken),
            ratio=best[name] / min(units.values()),
            of_its_form=best[name] / units[kinds[name]] if name in kinds else None,
        )  # fmt: skip


def long(
    record: Record, name: str, network: nn.Module, image: torch.Tensor, n: int, repeats: int
) -> None:
    """Time many samples of one image, beside the bare pass at its best batch size so far."""
    section = "fixed 224" if image.shape[-1] == 224 else "fixed"
    bare = [row for row in record.rows if row["section"] == section]
    bare = [row for row in bare if row["name"].startswith("forward") and row["of_its_form"] == 1]
    size = int(bare[-1]["name"].split()[-1])  # of the last form, the compiled one
    ours, _ = ours_and_art(network, SIGMAS[0], image.shape[1:])
    pixels = (image * 255).round().numpy() / 255
    times = turns(
        {
            f"{name}, forward": partial(forward, network, image.shape[1:], N0 + n, size),
            f"{name}, ours": partial(ours.certify, pixels, n, size),
            f"{name}, ours, quantised noise": partial(
                ours.certificates, pixels, n, size, noise="quantised"
            ),
        },
        repeats,
    )
    unit = min(times[f"{name}, forward"])
    for row, taken in times.items():
        record.add(
            "long", row, batch=size, best_s=min(taken), worst_s=max(taken), ratio=min(taken) / unit
        )


def table(record: Record, networks: dict[float, dict[str, nn.Module]], count: int, n: int) -> None:
    """Time a table of four radii."""
    images, labels = enlarged(train=False)
    images, labels = images[:count].numpy(), labels[:count].numpy()
    for sigma, made in networks.items():
        form, network = list(made.items())[-1]  # compiled, but in a trial of the script
        ours, _ = ours_and_art(network, sigma)
        batch = best_batch_size(network, torch.from_numpy(images[0]))
        radii = [k * sigma for k in range(4)]
        start = time.perf_counter()
        shares, certificates = ours.certify_table(images, labels, radii, n, batch)
        taken = time.perf_counter() - start
        record.add(
            "table", f"ours{form}, sigma {sigma:g}", time_s=taken,
            samples_an_image=round(sum(c.n0 + c.drawn for c in certificates) / count),
            certified_percent=[round(100 * row.certified_accuracy, 1) for row in shares],
        )  # fmt: skip


def compare(record: Record, count: int, n: int, timed_n: int = 10_000) -> None:
    """Put beside the tables what the others take for them, by their time for each sample."""
    scale = count * (N0 + n) / (N0 + timed_n)
    own: dict[str, float] = {}
    for row in record.rows:
        if row["section"] == "table":
            sigma = row["name"].split()[-1]
            own[sigma] = min(own.get(sigma, math.inf), row["time_s"])
    for row in [row for row in record.rows if row["section"] == "fixed"]:
        if row["name"].startswith(("Cohen", "ART")) or row["ratio"] == 1:
            taken = scale * row["best_s"]
            times = {f"x_sigma_{sigma}": taken / other for sigma, other in own.items()}
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
    tiny = arguments.tiny
    shape, repeats = (3, 32, 32), 1 if tiny else arguments.repeats
    kinds = {
        sigma: forms(trained(sigma, *((8, 1) if tiny else ())), shape, compiled=not tiny)
        for sigma in SIGMAS
    }
    images = enlarged(train=False)[0]
    if tiny:
        fixed(record, "fixed", kinds[SIGMAS[0]], images[:1], 20, repeats, BATCHES[:1], batch=32)
        long(record, "ResNet-8", kinds[SIGMAS[0]][", folded"], images[:1], 40, repeats)
        table(record, kinds, 2, 20)
        compare(record, 2, 20, 20)
        memory(record, 200)
    else:
        fixed(record, "fixed", kinds[SIGMAS[0]], images[:1], 10_000, repeats)
        torch.manual_seed(0)
        photograph = torch.rand(1, 3, 224, 224)
        network = resnet18(num_classes=10).eval()
        large = forms(network, photograph.shape[1:], compiled=True, half=True)
        # A batch size that divides n0 and n: with so few samples, padding would count.
        fixed(record, "fixed 224", large, photograph, 100, repeats, (4, 10, 20, 50), batch=4)
        long(record, "ResNet-20", kinds[SIGMAS[0]][", compiled"], images[:1], 100_000, repeats)
        long(record, "ResNet-18 at 224", large[", compiled"], photograph, 1_000, repeats)
        table(record, kinds, arguments.images, arguments.n)
        compare(record, arguments.images, arguments.n)
        memory(record, arguments.n)


if __name__ == "__main__":
    main()
