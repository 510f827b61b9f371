"""Attack purification on digits and MNIST with every gradient, fixed and fresh noise.

    python run.py [JOB ...]      # all jobs, or some; an interrupted one continues
    python table.py > table.txt

A job is a data set, a defence and a kind of noise, such as digits-diffpure-fixed. Its rows go to
rows/JOB/attack.jsonl. MNIST is read from results/mnist/data (results/mnist/README.md).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from art_denoised import (
    PGD,
    AutoAttack,
    DiffAttack,
    DiffHammer,
    DiffusionClassifier,
    LikelihoodMaximization,
    Purification,
    PurifiedClassifier,
    TrainingConfig,
    evaluate,
    noise_levels,
    train_robust,
)
from art_denoised.data import digits
from art_denoised.demo import digits_classifier, digits_diffusion, digits_network
from art_denoised.evaluation import Probes
from art_denoised.rdc import RDC
from art_denoised.training import RECIPES

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "mnist"))
import defences as mnist_defences  # noqa: E402
import networks as mnist  # noqa: E402

DIGITS_EPS, MNIST_EPS = 0.15, 0.2


@dataclass(frozen=True)
class Job:
    """A defence under attack.

    Attributes:
        build: Returns the defence.
        images: Number of images.
        attacks: Names and attacks, each run with every gradient of the defence.
        noise: "fixed" or "fresh"; None for defences without noise.
        probes: Size of the masking checks; None: they are not made.
    """

    build: Callable[[], nn.Module]
    images: int
    attacks: Sequence[tuple[str, Any]]
    noise: str | None = None
    probes: Probes | None = None


def digits_diffpure() -> nn.Module:
    model = frozen(digits_diffusion())
    purification = Purification(model, t=0.1, steps=10, sampler="sde", seed=0)
    return PurifiedClassifier(purification, frozen(digits_classifier()))


def digits_gdmp() -> nn.Module:
    """Return two passes that are pulled to the input."""
    model = frozen(digits_diffusion())
    purification = Purification(model, t=(0.2, 0.2), steps=10, sampler="gdmp", seed=0)
    return PurifiedClassifier(purification, frozen(digits_classifier()))


def digits_maximized() -> nn.Module:
    maximize = LikelihoodMaximization(frozen(digits_diffusion()), eta=DIGITS_EPS, seed=0)
    return PurifiedClassifier(maximize, frozen(digits_classifier()))


def digits_rdc() -> nn.Module:
    model = frozen(digits_diffusion())
    data = [digits(train=False)[i] for i in range(200, 500)]
    classifier = DiffusionClassifier(model, levels=noise_levels(8), seed=0)
    classifier.fit_temperature(
        torch.stack([x for x, _ in data]), torch.tensor([y for _, y in data])
    )
    return RDC(LikelihoodMaximization(model, eta=DIGITS_EPS, seed=0), classifier)


def digits_adversarial() -> nn.Module:
    """Return the network of results/digits that is trained on PGD images."""
    torch.manual_seed(0)
    model = digits_network()
    config = TrainingConfig(
        epochs=6, batch_size=64, optimizer="sgd", lr=0.2, schedule="one-cycle", average=0.9,
        clip=0.0, augment="none",
    )  # fmt: skip
    recipe = replace(RECIPES["sat"], eps=DIGITS_EPS)
    train_robust(model, digits(train=True), recipe, config, progress=False)
    return frozen(model.eval())


def mnist_diffpure() -> nn.Module:
    purification = Purification(mnist.diffusion(), t=0.3, steps=10, sampler="sde", seed=0)
    return PurifiedClassifier(purification, frozen(mnist.plain()))


def mnist_gdmp() -> nn.Module:
    """Return two passes that are pulled to the input."""
    purification = Purification(mnist.diffusion(), t=(0.3, 0.3), steps=10, sampler="gdmp", seed=0)
    return PurifiedClassifier(purification, frozen(mnist.plain()))


def mnist_maximized() -> nn.Module:
    maximize = LikelihoodMaximization(mnist.diffusion(), eta=MNIST_EPS, seed=0)
    return PurifiedClassifier(maximize, frozen(mnist.plain()))


def frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


def fixed(eps: float, steps: int) -> list[tuple[str, Any]]:
    """Return the attacks on noise that the attacker knows, and on defences without noise."""
    return [
        ("PGD", PGD(eps, steps=steps, loss="margin")),
        ("APGD", AutoAttack(eps, parts=("apgd-ce",), steps=steps)),
    ]


def fresh(eps: float, steps: int, draws: int) -> list[tuple[str, Any]]:
    """Return the attacks on fresh noise."""
    common: dict[str, Any] = {"steps": steps, "loss": "margin"}
    return [
        ("PGD, one draw, last point", PGD(eps, **common, keep="last")),
        ("PGD, EOT", PGD(eps, **common, eot=draws)),
        ("DiffHammer", DiffHammer(eps, **common, eot=draws)),
    ]


def jobs() -> dict[str, Job]:
    known, small = fixed(DIGITS_EPS, 20), fixed(MNIST_EPS, 10)
    path = ("DiffAttack", DiffAttack(DIGITS_EPS, steps=20, loss="margin"))
    whole = ("AutoAttack", AutoAttack(DIGITS_EPS))
    draws = fresh(DIGITS_EPS, 10, 5)
    checked = Probes(images=64, steps=20, queries=1000)
    return {
        "digits-gdmp-fixed": Job(digits_gdmp, 200, [*known, path], "fixed"),
        "digits-rdc-fixed": Job(digits_rdc, 100, known, "fixed"),
        "digits-plain": Job(lambda: frozen(digits_classifier()), 200, [*known, whole]),
        "digits-adversarial": Job(digits_adversarial, 200, [*known, whole]),
        "digits-diffpure-fixed": Job(digits_diffpure, 200, [*known, path], "fixed"),
        "digits-maximization-fixed": Job(digits_maximized, 200, known, "fixed"),
        "digits-maximization-fresh": Job(digits_maximized, 200, draws, "fresh"),
        "digits-diffpure-masking": Job(digits_diffpure, 64, known[:1], "fixed", checked),
        "digits-diffpure-autoattack": Job(digits_diffpure, 64, [whole], "fixed"),
        "digits-gdmp-fresh": Job(digits_gdmp, 200, draws, "fresh"),
        "digits-diffpure-fresh": Job(digits_diffpure, 200, draws, "fresh"),
        "mnist-plain": Job(lambda: frozen(mnist.plain()), 100, small),
        "mnist-adversarial": Job(lambda: frozen(mnist.adversarial()), 100, small),
        "mnist-diffpure-fixed": Job(mnist_diffpure, 100, small, "fixed"),
        "mnist-maximization-fixed": Job(mnist_maximized, 100, small, "fixed"),
        "mnist-gdmp-fixed": Job(mnist_gdmp, 100, small, "fixed"),
        "mnist-rdc-fixed": Job(mnist_defences.rdc, 100, small, "fixed"),
    }


def images(job: str, number: int) -> TensorDataset:
    """Return the first digits, or every 97th image of MNIST: levels were not chosen on these."""
    if job.startswith("mnist"):
        return TensorDataset(*mnist.held_out(97, limit=number))
    data = [digits(train=False)[i] for i in range(number)]
    return TensorDataset(torch.stack([x for x, _ in data]), torch.tensor([y for _, y in data]))


def main() -> None:
    torch.set_num_threads(1)
    every = jobs()
    for name in sys.argv[1:] or every:
        job = every[name]
        evaluate(
            job.build(),
            images(name, job.images),
            job.attacks,
            run=HERE / "rows" / name,
            noise=job.noise,
            undefended=frozen(digits_classifier()) if job.probes else None,
            masking_checks=job.probes is not None,  # they take longer than these short attacks
            probes=job.probes,
            batch_size=job.images,
            pictures=0,
            resume=True,
            identity={"job": name},
            progress=False,
        )
        print(name, flush=True)


if __name__ == "__main__":
    main()
