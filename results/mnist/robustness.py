"""Attack the MNIST defences; rows are kept as they come, and a second call goes on.

    python results/mnist/robustness.py            # all jobs that are not done, in order
    python results/mnist/robustness.py rdc-exact-linf-0.2 [...]
    python results/mnist/robustness.py --list     # the jobs, and what each will take

PGD of `art_denoised.attacks`, on the first images of a permutation (seed 0) of every tenth test
image. Fixed noise: the attacker knows it. Fresh noise: gradients are averaged over 10 draws, and
the image found is then classified 10 times. What BPDA finds is judged by the same defence.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from art_denoised.storage import Journal
from defences import diffusion_classifier, rdc
from networks import HERE, adversarial, held_out, plain
from torch import nn

from art_denoised.attacks import PGD
from art_denoised.rdc import preview_cost

DRAWS, BATCH, SEED = 10, 10, 0
THREATS = (("linf", 0.2), ("linf", 0.1), ("l2", 1.5))


@dataclass(frozen=True)
class Job:
    """One line of the table."""

    name: str
    defence: str
    norm: str
    eps: float
    images: int
    steps: int
    loss: str = "ce"
    eot: int = 1

    def attacked(self) -> nn.Module:
        """Return what the attacker differentiates."""
        if self.defence == "dc":
            return diffusion_classifier()
        if self.defence.startswith("rdc"):
            gradient = "bpda" if self.defence == "rdc-bpda" else "exact"
            return rdc(gradient=gradient, seed=None if self.eot > 1 else SEED)
        return {"plain": plain, "adversarial": adversarial}[self.defence]()

    def judged(self) -> nn.Module:
        """Return what the image found is classified by."""
        return (
            rdc(seed=None if self.eot > 1 else SEED) if "rdc" in self.defence else self.attacked()
        )

    def flop(self) -> float:
        """Count what the attack takes, an upper bound: all classes take part in the gradient."""
        if self.defence in ("plain", "adversarial"):
            return 0.0
        step = preview_cost(self.attacked(), (1, 28, 28)).gradient_flop
        return self.images * self.steps * self.eot * step


def jobs() -> list[Job]:
    found = []
    for name in ("plain", "adversarial"):
        found += [Job(f"{name}-{n}-{e}", name, n, e, 500, 50) for n, e in THREATS]
    for defence in ("rdc-exact", "rdc-bpda", "dc"):
        found += [Job(f"{defence}-{n}-{e}", defence, n, e, 100, 20) for n, e in THREATS]
    found += [Job("rdc-long-linf-0.2", "rdc-long", "linf", 0.2, 100, 50)]
    found += [Job(f"rdc-fresh-{n}-{e}", "rdc-fresh", n, e, 20, 20, eot=DRAWS) for n, e in THREATS]
    return found


def run(job: Job, x: torch.Tensor, y: torch.Tensor, folder: Path) -> None:
    settings = {name: getattr(job, name) for name in job.__dataclass_fields__ if name != "images"}
    attack = PGD(job.eps, norm=job.norm, steps=job.steps, loss=job.loss, eot=job.eot, seed=SEED)
    with Journal(folder / f"{job.name}.jsonl", "robustness", settings, resume=True) as journal:
        done = {row["image"] for row in journal.records}
        for start in range(0, job.images, BATCH):
            numbers = [i for i in range(start, min(start + BATCH, job.images)) if i not in done]
            if not numbers:
                continue
            begin = time.perf_counter()
            model, judge = job.attacked(), job.judged()
            x_adv = attack(model, x[numbers], y[numbers])
            draws = DRAWS if job.eot > 1 else 1
            clean, robust = (_hits(judge, z, y[numbers], draws) for z in (x[numbers], x_adv))
            seconds = (time.perf_counter() - begin) / len(numbers)
            for i, number in enumerate(numbers):
                journal.append(
                    {
                        "image": number,
                        "clean": clean[i],
                        "robust": robust[i],
                        "draws": draws,
                        "seconds": round(seconds, 2),
                    }
                )


@torch.no_grad()
def _hits(model: nn.Module, x: torch.Tensor, y: torch.Tensor, draws: int) -> list[int]:
    """In how many of the draws each image is classified correctly."""
    return sum((model(x).argmax(1) == y).long() for _ in range(draws)).tolist()


def images() -> tuple[torch.Tensor, torch.Tensor]:
    x, y = held_out(10)
    order = torch.from_numpy(np.random.default_rng(SEED).permutation(len(y)))
    return x[order], y[order]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("jobs", nargs="*")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--images", type=int, help="so many instead of the job's own")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    known = {job.name: job for job in jobs()}
    chosen = [known[name] for name in arguments.jobs] or list(known.values())
    if arguments.list:
        for job in chosen:
            print(f"{job.name:24}{job.images:4} images{job.flop() / 1e12:8.1f} TFLOP")
        return
    x, y = images()
    folder = HERE / "rows"
    folder.mkdir(exist_ok=True)
    for job in chosen:
        if arguments.images:
            job = Job(**{**vars(job), "images": arguments.images})
        run(job, x, y, folder)
        print(job.name, flush=True)


if __name__ == "__main__":
    main()
