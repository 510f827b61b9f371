"""Real worker processes: their efficiency, and what is left of a run whose workers are killed.

    python benchmarks/workers.py [--kills 100] [--pause 1] [--json FILE] [--tiny]

First two workers of one thread each against one, in turns, after a warm-up. Beside it, two
processes that compute the same at once without a driver against one, because two cores that share
caches and memory are less than twice one. The load of the machine is recorded: a busy machine says
nothing. Then workers are killed at random, half of the kills while images are certified and half
while they are attacked, and the rows are compared with those of one process: nothing may be lost,
and nothing may be there twice.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import tempfile
import threading
import time
from contextlib import closing
from pathlib import Path

import torch
from record import Record, options
from torch import nn

from art_denoised import PGD, FixedN, Smoother, Workers, certify, evaluate, load_data
from art_denoised.demo import digits_classifier
from art_denoised.smoothing import Task, drive

PRELOADED = [
    "art_denoised.demo",
    "art_denoised.evaluation.attack",
    "art_denoised.runs.workers",
    "art_denoised.smoothing.dispatch",
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
            begin, stop = time.perf_counter(), FixedN(samples, min(samples, 100))
            record = smoother.record(images.shape[1:])
            tasks = (Task(i, x, stop.procedure(None, record)) for i, x in enumerate(images))
            assert len(list(drive(tasks, voter))) == len(images)
    return len(images) * (n + stop.n0) / (time.perf_counter() - begin)


def alone(processes: int, n: int) -> float:
    """Return samples a second of processes without a driver, all at once."""
    with multiprocessing.get_context("forkserver").Pool(processes) as pool:
        return sum(pool.starmap(speed, [(0, n)] * processes, chunksize=1))


def efficiency(record: Record, n: int, turns: int) -> None:
    """Measure the efficiency of two workers and of two processes, the best of several turns."""
    for name, measure in (("worker", speed), ("process without a driver", alone)):
        found = [(measure(1, n), measure(2, n)) for _ in range(turns)]
        one, two = map(max, zip(*found, strict=True))
        record.add("efficiency", f"one {name}", samples_a_second=one)
        share = 50 * two / one
        record.add("efficiency", f"two: {name}", samples_a_second=two, efficiency_percent=share)


class Killer(threading.Thread):
    """Kills children of this process until it is stopped, after pauses of up to some seconds.

    It waits until a log has grown: workers that are killed before they can answer end the run.
    """

    def __init__(self, kills: int, pause: float, log: Path) -> None:
        super().__init__(daemon=True)
        self.left, self.pause, self.log, self.done = kills, pause, log, threading.Event()
        self.random = random.Random(0)

    def run(self) -> None:
        seen = 0
        while self.left and not self.done.wait(self.random.uniform(0, self.pause)):
            while not (children := multiprocessing.active_children()) or self.size() <= seen:
                if self.done.wait(0.01):
                    return
            self.random.choice(children).kill()
            seen, self.left = self.size(), self.left - 1

    def size(self) -> int:
        return self.log.stat().st_size if self.log.exists() else 0

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


def killed(
    record: Record, kind: str, kills: int, pause: float, folder: Path, *, n: int, images: int
) -> None:
    """Write a log with workers that are killed and one without workers, and compare them."""
    data, net = load_data("digits"), digits_classifier()
    workers = Workers(2, build=digits_classifier)
    begin = time.monotonic()

    def run(name: str, workers: Workers | None) -> list[str]:
        place = folder / kind / name
        if kind == "certify":
            smoother = Smoother(net, sigma=0.25, workers=workers)
            certify(smoother, data, FixedN(n), run=place, indices=range(images), progress=False)
        else:
            evaluate(
                net,
                data,
                [PGD(0.1, steps=n // 50)],
                run=place,
                workers=workers,
                indices=range(images),
                batch_size=4,
                masking_checks=False,
                progress=False,
            )
        return rows(place / f"{kind}.jsonl")

    one, turns = run("one", None), 0
    left = kills
    while left:
        with Killer(left, pause, folder / kind / str(turns) / f"{kind}.jsonl") as killer:
            assert run(str(turns), workers) == one, "rows are lost, or twice"
        left, turns = killer.left, turns + 1
    seconds = time.monotonic() - begin
    record.add("killed", kind, kills=kills, runs=turns, equal_rows=len(one), seconds=seconds)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--pause", type=float, default=1.0, help="longest between two, in seconds")
    given = parser.parse_args()
    kills = 2 if given.tiny else given.kills
    size = {"n": 1000, "images": 20} if given.tiny else {"n": 10_000, "images": 200}
    pause = given.pause / 20 if given.tiny else given.pause
    record = Record("workers", given.json)
    # A worker that is replaced starts at once, so that kills hit workers that compute.
    multiprocessing.set_forkserver_preload(PRELOADED)
    efficiency(record, n=40 if given.tiny else 2000, turns=1 if given.tiny else 2)
    torch.set_num_threads(1)  # two that wait for each other are slower on a small network
    with tempfile.TemporaryDirectory() as folder:
        for kind, count in (("certify", kills // 2), ("attack", kills - kills // 2)):
            killed(record, kind, count, pause, Path(folder), **size)


if __name__ == "__main__":
    main()
