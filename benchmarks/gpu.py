"""Check and time the package on one GPU: correctness first, then speed, in at most eight minutes.

    python benchmarks/gpu.py [--json FILE] [--only SECTION,...] [--compile] [--tiny]

Networks have random weights of a fixed seed. A section that fails says so, and the next one begins;
none begins once the time is up. ``--tiny`` tries the script on any machine in seconds.

- votes: rows are equal however samples are packed and however often they are drawn; which rule for
  near ties holds for each network and type; how many votes depend on the batch size.
- certify: samples a second of ours beside the bare network, as it is, folded and compiled.
- rdc: predictions and gradients of a diffusion classifier beside the bare network, and memory.
- training: an adversarial step beside a plain loop.
- blocks: the operations of denoising blocks, time and memory.
"""

from __future__ import annotations

import copy
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from record import Record, options, ratio, turns
from torch import nn
from torch.nn import functional as F

from art_denoised import (
    DenoisedClassifier,
    DiffusionClassifier,
    FixedN,
    Smoother,
    TrainingConfig,
    noise_levels,
    train_robust,
)
from art_denoised import networks as operations
from art_denoised.denoisers import OneShotDenoiser
from art_denoised.diffusion import unet_diffusion
from art_denoised.networks import optimize
from art_denoised.smoothing import Passes, best_batch_size
from art_denoised.training import RECIPES

sys.path.insert(0, str(Path(__file__).parent.parent / "results" / "cifar10"))
from networks import ResNet

SECONDS = 7 * 60  # after which no section begins
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Subject:
    """A network, the shape of its images, and the number of samples that are timed."""

    network: nn.Module
    shape: tuple[int, int, int]
    samples: int


def calibrated(network: nn.Module, shape: tuple[int, int, int]) -> nn.Module:
    """Give batch norms statistics and one class a lead, so that ties are as rare as in practice."""
    torch.manual_seed(1)
    network = network.to(DEVICE).train()
    with torch.no_grad():
        for _ in range(3):
            network(torch.rand(16, *shape, device=DEVICE))
        logits = network.eval()(0.5 + 0.25 * torch.randn(16, *shape, device=DEVICE))
        last = [m for m in network.modules() if isinstance(m, nn.Linear)][-1]
        last.bias -= logits.mean(0)
        last.bias[0] += 3 * logits.std(0).mean()
    return network.eval()


def subjects(tiny: bool) -> dict[str, Subject]:
    torch.manual_seed(0)
    small = (3, 32, 32)
    if tiny:
        return {"ResNet-8 at 32": Subject(calibrated(ResNet(8), small), small, 128)}
    from torchvision.models import resnet50

    deep, large = calibrated(ResNet(110), small), (3, 224, 224)
    unet = OneShotDenoiser(unet_diffusion(3, 32, widths=(64, 128, 128)).to(DEVICE)).eval()
    behind = DenoisedClassifier(deep, unet, sigma=0.25).eval()
    return {
        "ResNet-110 at 32": Subject(deep, small, 16_384),
        "U-Net and ResNet-110 at 32": Subject(behind, small, 8_192),
        "ResNet-50 at 224": Subject(calibrated(resnet50(), large), large, 4_096),
    }


def types(tiny: bool) -> tuple[str, ...]:
    return ("float32",) if tiny else tuple(TYPES)  # few processors compute in bfloat16


def votes(record: Record, tiny: bool, _compile: bool) -> None:
    n = 16 if tiny else 2000
    for name, subject in subjects(tiny).items():
        x = torch.rand(2, *subject.shape)
        for kind in types(tiny):
            network = copy.deepcopy(subject.network).to(TYPES[kind])
            batch = 16 if tiny else 256

            def certify(x: torch.Tensor, size: int, first: int = 0, network=network) -> list:
                smoother = Smoother(network, sigma=0.25, batch_size=size)
                return smoother.certify(x, FixedN(n, n0=16), first_index=first)

            together, again = certify(x, batch), certify(x, batch)
            alone = [certify(x[i : i + 1], batch, i)[0] for i in range(len(x))]
            half = certify(x, batch // 2)
            moved = sum(
                sum(abs(a.counts.get(c, 0) - b.counts.get(c, 0)) for c in {*a.counts, *b.counts})
                for a, b in zip(together, half, strict=True)
            )
            rule = Passes.tried(network, x[0].to(DEVICE), batch).near_ties
            record.add(
                "votes", f"{name}, {kind}", near_ties=rule, repeatable=together == again,
                same_alone=together == alone, moved_by_batch_size=moved / (2 * n * len(x)),
            )  # fmt: skip


def certify(record: Record, tiny: bool, compiled: bool) -> None:
    for name, subject in subjects(tiny).items():
        for kind in types(tiny):
            half = None if kind == "float32" else kind
            build = partial(
                optimize, copy.deepcopy(subject.network), dtype=half, input_shape=subject.shape
            )
            forms = {"as it is": build(fold=False), "folded": build()}
            if compiled:
                forms["compiled"] = build(compile=True)
            time_forms(record, f"{name}, {kind}", forms, subject, tiny)


def time_forms(
    record: Record, name: str, forms: dict[str, nn.Module], subject: Subject, tiny: bool
) -> None:
    x = torch.rand(1, *subject.shape)
    batch = 16 if tiny else best_batch_size(forms["folded"], x[0].to(DEVICE))
    passes = -(-subject.samples // batch)
    n = passes * batch - 100  # n0 and n fill whole passes

    def bare(network: nn.Module) -> None:
        dtype = next(network.parameters()).dtype
        images = torch.rand(batch, *subject.shape, device=DEVICE, dtype=dtype)
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            for _ in range(passes):
                network(images)

    tasks: dict[str, Callable[[], object]] = {
        f"bare, {form}": partial(bare, network) for form, network in forms.items()
    }
    for noise in ("gaussian", "quantised"):
        smoother = Smoother(forms["folded"], sigma=0.25, noise=noise, batch_size=batch)
        images = (x * 255).round() / 255
        tasks[f"ours, folded, {noise}"] = partial(smoother.certify, images, FixedN(n))
    taken = turns(tasks, 1 if tiny else 3)
    unit = min((t for form, t in taken.items() if form.startswith("bare")), key=min)
    for form, seconds in taken.items():
        record.add(
            "certify", f"{name}: {form}", batch_size=batch,
            samples_a_second=passes * batch / min(seconds), memory_MiB=memory(tasks[form]),
            **ratio(seconds, unit),
        )  # fmt: skip


def memory(task: Callable[[], object]) -> float | None:
    """Return the peak of a task in MiB beyond what is held; None without a GPU."""
    if DEVICE.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    task()
    return (torch.cuda.max_memory_allocated() - held) / 2**20


def rdc(record: Record, tiny: bool, _compile: bool) -> None:
    torch.manual_seed(0)
    widths, levels, batch, images = (128, 256, 256, 256), 16, 256, 4
    if tiny:
        widths, levels, batch, images = (8, 16), 2, 16, 1
    model = unet_diffusion(3, 32, classes=10, widths=widths).eval().requires_grad_(False).to(DEVICE)
    x, y = torch.rand(images, 3, 32, 32, device=DEVICE), torch.zeros(images, dtype=torch.long)
    evaluations = images * levels * 10
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    for bf16 in (False,) if tiny else (False, True):

        def classifier(recompute: bool, bf16=bf16) -> DiffusionClassifier:
            return DiffusionClassifier(
                model, levels=noise_levels(levels), seed=0, max_batch=batch, temperature=1e4,
                bf16=bf16, recompute=recompute,
            )  # fmt: skip

        def bare(bf16=bf16) -> None:
            images = torch.rand(batch, 3, 32, 32, device=DEVICE)
            sigma = torch.full((batch,), 0.25, device=DEVICE)
            label = torch.zeros(batch, dtype=torch.long)
            with torch.inference_mode(), torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
                for _ in range(-(-evaluations // batch)):
                    model(images, sigma, label)

        def gradient(recompute: bool) -> None:
            leaf = x.clone().requires_grad_()
            F.cross_entropy(classifier(recompute)(leaf), y.to(DEVICE)).backward()

        tasks = {
            "bare": bare,
            "prediction": lambda: classifier(True)(x),
            "gradient, recomputed": lambda: gradient(True),
            "gradient, along": lambda: gradient(False),
        }
        taken = turns(tasks, 1 if tiny else 3)
        for name, seconds in taken.items():
            record.add(
                "rdc", f"{'bfloat16' if bf16 else 'float32'} {name}", parameters_M=millions,
                evaluations_a_second=evaluations / min(seconds), memory_MiB=memory(tasks[name]),
                **ratio(seconds, taken["bare"]),
            )  # fmt: skip
        with torch.no_grad():
            a, b = classifier(True)(x), classifier(True)(x)
        record.add("rdc", f"repeatable, bf16 {bf16}", ok=torch.equal(a, b))


def training(record: Record, tiny: bool, _compile: bool) -> None:
    eps, batch, steps, count = 8 / 255, 256, 7, 1536
    if tiny:
        batch, steps, count = 16, 1, 32
    data = torch.utils.data.TensorDataset(torch.rand(count, 3, 32, 32), torch.arange(count) % 10)

    def network() -> nn.Module:
        torch.manual_seed(0)
        return ResNet(8 if tiny else 56).to(DEVICE).to(memory_format=torch.channels_last)

    def plain(bf16: bool) -> None:
        net = network()
        sgd = torch.optim.SGD(net.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
        for first in range(0, count, batch):
            x, y = (t[first : first + batch].to(DEVICE) for t in data.tensors)
            x_adv = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
                net.eval()
                for _ in range(steps):
                    x_adv.requires_grad_()
                    loss = F.cross_entropy(net(x_adv), y)
                    (gradient,) = torch.autograd.grad(loss, x_adv)
                    x_adv = x_adv.detach() + eps / 4 * gradient.sign()
                    x_adv = torch.min(torch.max(x_adv, x - eps), x + eps).clamp(0, 1)
                loss = F.cross_entropy(net.train()(x_adv), y)
            sgd.zero_grad()
            loss.backward()
            sgd.step()

    def ours(bf16: bool, average: float) -> None:
        config = TrainingConfig(
            epochs=1, batch_size=batch, optimizer="sgd", lr=0.1, weight_decay=5e-4, clip=0.0,
            schedule="constant", average=average, augment="none", bf16=bf16,
        )  # fmt: skip
        recipe = replace(RECIPES["pgd"], eps=eps, steps=steps, relative_step_size=0.25)
        train_robust(network(), data, recipe, config, progress=False)

    for bf16 in (False,) if tiny else (False, True):
        tasks = {
            "plain loop": lambda bf16=bf16: plain(bf16),
            "ours": lambda bf16=bf16: ours(bf16, 0.0),
            "ours, averaged weights": lambda bf16=bf16: ours(bf16, 0.995),
        }
        taken = turns(tasks, 1 if tiny else 3)
        for name, seconds in taken.items():
            record.add(
                "training", f"{name}, bf16 {bf16}", images_a_second=count / min(seconds),
                **ratio(seconds, taken["plain loop"]),
            )  # fmt: skip


def blocks(record: Record, tiny: bool, _compile: bool) -> None:
    forms = ("non_local_gaussian", "non_local_dot_product", "local_mean", "local_median")
    for n, c, side in ((2, 16, 8),) if tiny else ((32, 256, 56), (32, 512, 28), (32, 1024, 14)):
        shapes = [(n, c, side, side), *2 * [(n, c // 2, side, side)]]
        for kind, dtype in TYPES.items():
            inputs = [torch.randn(shape, device=DEVICE, dtype=dtype) for shape in shapes]

            def both(form: str, inputs=inputs) -> None:
                leaves = [t.detach().requires_grad_() for t in inputs]
                used = leaves if form.startswith("non_local") else leaves[:1]
                y = getattr(operations, form)(*used)
                torch.autograd.grad(y, used, torch.ones_like(y))

            for form in forms:
                (taken,) = turns({form: partial(both, form)}, 1 if tiny else 3).values()
                record.add(
                    "blocks", f"{form} {(n, c, side)} {kind}", ms=1000 * min(taken),
                    memory_MiB=memory(partial(both, form)),
                )  # fmt: skip


SECTIONS = {
    "votes": votes, "certify": certify, "rdc": rdc, "training": training, "blocks": blocks,
}  # fmt: skip


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections (%(default)s)")
    parser.add_argument("--compile", action="store_true", help="also compiled, minutes more")
    arguments = parser.parse_args()
    if DEVICE.type == "cpu" and not arguments.tiny:
        print("there is no GPU; --tiny tries the script")
        return
    record, begin = Record("gpu", arguments.json), time.monotonic()
    for name in arguments.only.split(","):
        if time.monotonic() - begin > SECONDS:
            record.add(name, "left out: the time is up")
            continue
        start = time.monotonic()
        try:
            SECTIONS[name](record, arguments.tiny, arguments.compile)
        except Exception as error:  # the figures of other sections are worth having
            if arguments.tiny:
                raise
            traceback.print_exc()
            record.add(name, "failed", error=f"{type(error).__name__}: {error}")
        record.add(name, "section", seconds=time.monotonic() - start)
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
