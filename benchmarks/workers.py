"""Real worker processes: their efficiency, and what is left of a run whose workers are killed.

    python benchmarks/workers.py [--kills 100] [--pause 1] [--tiny]

First two workers of one thread each against one, in turns, after a warm-up; the load of the machine
is printed, because a busy machine says nothing. Then workers are killed at random, half of the
kills while images are certified and half while they are attacked, and the rows are compared with
those of one process: nothing may be lost, and nothing may be there twice.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import tempfile
import threading
import time
from contextlib import closing
from pathlib import Path

import torch
from torch import nn

from art_denoised import PGD, FixedN, Smoother, Workers, certify, evaluate, load_data
from art_denoised.demo import digits_classifier
from art_denoised.smoothing import Task, drive

PRELOADED = [
    "art_denoised.demo",
    "art_denoised.evaluation.spread",
    "art_denoised.runs.replica",
    "art_denoised.smoothing.remote",
]


def network() -> nn.Module:
    """A network with as much to compute as a small ResNet."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).eval()


def speed(workers: int, n: int) -> float:
    """Return samples a second of workers of one thread each."""
    torch.set_num_threads(workers)  # which they share
    smoother = Smoother(network(), sigma=0.25, workers=Workers(workers))
    images = smoother.prepare(torch.rand(4, 3, 32, 32))
    with closing(smoother.voter()) as voter:
        for samples in (n // 4, n):
            begin, stop = time.perf_counter(), FixedN(samples, min(samples, 100))
            record = smoother.record(images.shape[1:])
            tasks = (Task(i, x, stop.procedure(None, record)) for i, x in enumerate(images))
            assert len(list(drive(tasks, voter))) == len(images)
    return len(images) * (n + stop.n0) / (time.perf_counter() - begin)


def efficiency(n: int, turns: int) -> None:
    """Print the efficiency of two workers, the best of several turns of each."""
    load = os.getloadavg()[0]
    one, two = (
        max(speeds)
        for speeds in zip(*((speed(1, n), speed(2, n)) for _ in range(turns)), strict=True)
    )
    cores = len(os.sched_getaffinity(0))
    print(f"2 workers: {two:,.0f} samples/s, 1 worker: {one:,.0f}; efficiency {two / 2 / one:.1%}")
    print(f"load of the machine at the start: {load:.1f} on {cores} cores")


class Killer(threading.Thread):
    """Kills children of this process until it is stopped, after pauses of up to some seconds."""

    def __init__(self, kills: int, pause: float) -> None:
        super().__init__(daemon=True)
        self.left, self.pause, self.done = kills, pause, threading.Event()
        self.random = random.Random(0)

    def run(self) -> None:
        while self.left and not self.done.wait(self.random.uniform(0, self.pause)):
            if children := multiprocessing.active_children():
                self.random.choice(children).kill()
                self.left -= 1

    def __enter__(self) -> Killer:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.done.set()
        self.join()


def rows(log: Path) -> list[str]:
    """The rows of a log without times, sorted."""
    lines = log.read_text(encoding="utf-8").splitlines()[1:]
    return sorted(json.dumps({**json.loads(line), "seconds": 0}) for line in lines)


def killed(kind: str, kills: int, pause: float, folder: Path, **options: int) -> None:
    """Write a log with workers that are killed and one without workers, and compare them."""
    data, net = load_data("digits"), digits_classifier()
    workers = Workers(2, build=digits_classifier)
    begin = time.monotonic()

    def run(name: str, workers: Workers | None) -> list[str]:
        place = folder / kind / name
        if kind == "certify":
            smoother = Smoother(net, sigma=0.25, workers=workers)
            stop, indices = FixedN(options["n"]), range(options["images"])
            certify(smoother, data, stop, run=place, indices=indices, progress=False)
        else:
            evaluate(
                net,
                data,
                [PGD(0.1, steps=options["steps"])],
                run=place,
                workers=workers,
                indices=range(options["images"]),
                batch_size=4,
                masking_checks=False,
                progress=False,
            )
        return rows(place / f"{kind}.jsonl")

    one, turns = run("one", None), 0
    left = kills
    while left:
        with Killer(left, pause) as killer:
            assert run(str(turns), workers) == one, "rows are lost, or twice"
        left, turns = killer.left, turns + 1
    seconds = time.monotonic() - begin
    print(f"{kind}: {kills} kills in {turns} runs, {len(one)} rows each, {seconds:.0f} s: equal")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--pause", type=float, default=1.0, help="longest between two, in seconds")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    kills = 2 if options.tiny else options.kills
    size = {"n": 1000, "images": 20} if options.tiny else {"n": 10_000, "images": 200}
    # A worker that is replaced starts at once, so that kills hit workers that compute.
    multiprocessing.set_forkserver_preload(PRELOADED)
    efficiency(n=40 if options.tiny else 2000, turns=1 if options.tiny else 2)
    torch.set_num_threads(1)  # two that wait for each other are slower on a small network
    with tempfile.TemporaryDirectory() as folder:
        killed("certify", kills // 2, options.pause, Path(folder), **size)
        killed(
            "attack", kills - kills // 2, options.pause, Path(folder), **size, steps=size["n"] // 50
        )


if __name__ == "__main__":
    main()
