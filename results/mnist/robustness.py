"""Attack the MNIST defences. Rows are written batch by batch, and a second call continues.

    python results/mnist/robustness.py            # all jobs that are not done, in order
    python results/mnist/robustness.py rdc-exact-linf-0.2 [...]
    python results/mnist/robustness.py --list     # the jobs, and the cost of each

PGD of `art_denoised` on the first images of a permutation (seed 0) of every tenth test image. With
fixed noise the attacker knows the noise. With fresh noise gradients are averaged over 10 draws, and
the attacked image is classified 10 times. Images found by BPDA are judged by the same defence.

The committed files of `rows/` were written by an earlier version. They are read; to complete an
unfinished one, choose another folder with --out.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from defences import diffusion_classifier, rdc
from networks import HERE, adversarial, held_out, plain
from torch import nn

from art_denoised import PGD
from art_denoised.diffusion import preview_cost
from art_denoised.runs import Kind, Row, Run, read_run

DRAWS, BATCH, SEED = 10, 10, 0
THREATS = (("linf", 0.2), ("linf", 0.1), ("l2", 1.5))


class ImageRow(Row, frozen=True, kw_only=True):
    """One attacked image.

    Attributes:
        index: Place of the image in the permutation.
        clean: Number of draws in which the unattacked image is right.
        robust: Number of draws in which the attacked image is right.
        draws: Number of evaluations of each image.
        seconds: Time of the attack for one image.
    """

    index: int
    clean: int
    robust: int
    draws: int
    seconds: float

    @property
    def key(self) -> int:
        """Index of the image."""
        return self.index


def _upgraded(record: dict[str, Any]) -> dict[str, Any]:
    """Return a row of version 1, which called the index "image", in the form of today."""
    index = record.pop("image")
    return {"index": index, **record}


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

    @property
    def kind(self) -> Kind[ImageRow]:
        """The journal of this job: NAME.jsonl."""
        return Kind(self.name, ImageRow, _upgraded, title="robustness")

    def attacked(self) -> nn.Module:
        """Return the model that the attacker differentiates."""
        if self.defence == "dc":
            return diffusion_classifier()
        if self.defence.startswith("rdc"):
            gradient = "bpda" if self.defence == "rdc-bpda" else "exact"
            return rdc(gradient=gradient, seed=None if self.eot > 1 else SEED)
        return {"plain": plain, "adversarial": adversarial}[self.defence]()

    def judged(self) -> nn.Module:
        """Return the model that classifies the attacked image."""
        return (
            rdc(seed=None if self.eot > 1 else SEED) if "rdc" in self.defence else self.attacked()
        )

    def flop(self) -> float:
        """Return an upper bound of the FLOP: all classes take part in the gradient."""
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


def rows(job: Job, folder: Path) -> list[ImageRow]:
    """Return the rows of a job in the order of the file; none if it was not begun."""
    path = folder / f"{job.name}.jsonl"
    return list(read_run(path, job.kind).rows.values()) if path.exists() else []


def run(job: Job, x: torch.Tensor, y: torch.Tensor, folder: Path) -> None:
    """Attack the images of a job that have no row yet."""
    if len(rows(job, folder)) >= job.images:
        return
    settings = {name: value for name, value in asdict(job).items() if name != "images"}
    attack = PGD(job.eps, norm=job.norm, steps=job.steps, loss=job.loss, eot=job.eot, seed=SEED)
    draws = DRAWS if job.eot > 1 else 1
    with Run(folder, job.kind, settings, resume=True) as journal:
        for start in range(0, job.images, BATCH):
            batch = range(start, min(start + BATCH, job.images))
            todo = [i for i in batch if i not in journal.rows]
            if not todo:
                continue
            begin = time.perf_counter()
            model, judge = job.attacked(), job.judged()
            x_adv = attack(model, x[todo], y[todo])
            clean, robust = (_hits(judge, z, y[todo], draws) for z in (x[todo], x_adv))
            seconds = round((time.perf_counter() - begin) / len(todo), 2)
            journal.append(
                ImageRow(index=i, clean=c, robust=r, draws=draws, seconds=seconds)
                for i, c, r in zip(todo, clean, robust, strict=True)
            )


@torch.no_grad()
def _hits(model: nn.Module, x: torch.Tensor, y: torch.Tensor, draws: int) -> list[int]:
    """Return for each image the number of draws in which it is classified correctly."""
    return sum((model(x).argmax(1) == y).long() for _ in range(draws)).tolist()


def images() -> tuple[torch.Tensor, torch.Tensor]:
    x, y = held_out(10)
    order = torch.from_numpy(np.random.default_rng(SEED).permutation(len(y)))
    return x[order], y[order]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("jobs", nargs="*")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--images", type=int, help="number of images; default: the job's own")
    parser.add_argument("--out", type=Path, default=HERE / "rows", help="folder of the rows")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    known = {job.name: job for job in jobs()}
    chosen = [known[name] for name in arguments.jobs] or list(known.values())
    if arguments.list:
        for job in chosen:
            print(f"{job.name:24}{job.images:4} images{job.flop() / 1e12:8.1f} TFLOP")
        return
    x, y = images()
    for job in chosen:
        if arguments.images:
            job = replace(job, images=arguments.images)
        run(job, x, y, arguments.out)
        print(job.name, flush=True)


if __name__ == "__main__":
    main()
