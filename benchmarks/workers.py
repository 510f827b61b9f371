"""Real worker processes: their efficiency, and what is left of a run whose workers are killed.

    python benchmarks/workers.py [--kills 100] [--pause 1] [--tiny]

First two workers of one thread each against one, in turns, after a warm-up. Beside it, two
processes that compute the same at once without a driver against one, because two cores that share
caches and memory are less than twice one. The load of the machine is printed: a busy machine says
nothing. Then workers are killed at random, half of the kills while images are certified and half
while they are attacked, and the rows are compared with those of one process: nothing may be lost,
and nothing may be there twice. A kill comes once an answer has come since the one before, because a
run whose workers only die is given up.
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
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from art_denoised import PGD, FixedN, Smoother, Workers, certify, evaluate, load_data
from art_denoised.demo import digits_classifier
from art_denoised.runs import Answered, Crew, Failed, Lost, Plan, Ready
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
    """Return samples a second of workers of one thread each; of this process if there are none."""
    torch.set_num_threads(max(1, workers))  # which they share
    place = Workers(workers) if workers else None
    smoother = Smoother(network(), sigma=0.25, workers=place)
    images = smoother.prepare(torch.rand(4, 3, 32, 32))
    with closing(smoother.voter()) as voter:
        for samples in (n // 4, n):
            begin, stop = time.perf_counter(), FixedN(samples)
            record = smoother.record(images.shape[1:])
            tasks = (Task(i, x, stop.procedure(None, record)) for i, x in enumerate(images))
            assert len(list(drive(tasks, voter))) == len(images)
    return len(images) * (n + stop.n0) / (time.perf_counter() - begin)


def alone(processes: int, n: int) -> float:
    """Return samples a second of processes without a driver, all at once."""
    with multiprocessing.get_context("forkserver").Pool(processes) as pool:
        return sum(pool.starmap(speed, [(0, n)] * processes, chunksize=1))


def efficiency(n: int, turns: int) -> None:
    """Print the efficiency of two workers and of two processes, the best of several turns."""
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    for name, measure in (("worker", speed), ("process without a driver", alone)):
        found = [(measure(1, n), measure(2, n)) for _ in range(turns)]
        one, two = map(max, zip(*found, strict=True))
        print(f"one {name}: {one:,.0f} samples/s, two: {two:,.0f}; efficiency {two / 2 / one:.1%}")
    print(f"load of the machine at the start: {load:.1f} on {cores} cores", flush=True)


@dataclass(frozen=True)
class Watched(Workers):
    """Workers that say when one of them has answered."""

    answered: threading.Event = field(default_factory=threading.Event)

    def start(self, plan: Plan, *, gpu: bool) -> Crew:
        return Watching(super().start(plan, gpu=gpu), self.answered)


class Watching:
    """A crew, and whether it has answered."""

    def __init__(self, crew: Crew, answered: threading.Event) -> None:
        self.size, self.send, self.close = crew.size, crew.send, crew.close
        self.crew, self.answered = crew, answered

    def receive(self) -> tuple[int, Ready | Answered | Failed | Lost]:
        worker, report = self.crew.receive()
        if isinstance(report, Answered):
            self.answered.set()
        return worker, report


class Killer(threading.Thread):
    """Kills children of this process until it is stopped, after pauses of up to some seconds."""

    def __init__(self, kills: int, pause: float, answered: threading.Event) -> None:
        super().__init__(daemon=True)
        self.left, self.pause, self.done = kills, pause, threading.Event()
        self.random, self.answered = random.Random(0), answered

    def run(self) -> None:
        while self.left and not self.done.wait(self.random.uniform(0, self.pause)):
            children = multiprocessing.active_children()
            if children and self.answered.is_set():
                self.answered.clear()
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
    workers = Watched(2, build=digits_classifier)
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
        with Killer(left, pause, workers.answered) as killer:
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
    efficiency(n=200 if options.tiny else 2000, turns=1 if options.tiny else 2)
    torch.set_num_threads(1)  # two that wait for each other are slower on a small network
    with tempfile.TemporaryDirectory() as folder:
        killed("certify", kills // 2, options.pause, Path(folder), **size)
        killed(
            "attack", kills - kills // 2, options.pause, Path(folder), **size, steps=size["n"] // 50
        )


if __name__ == "__main__":
    main()
