"""Simulate many workers: how much of them early stopping leaves idle.

    python benchmarks/scale.py [--copies 4] [--latency 0.001] [--json FILE] [--tiny]

The real driver hands out draws to simulated workers, on a clock of their own. A worker
computes 1,000 samples a second, in passes of 64 that are padded. One in ten has half the speed, and
a bundle takes 5 ms on its way. A worker dies once in 1,000 seconds of its work, with the bundle
that it computes, and is back 10 seconds later. Votes are drawn with the probabilities of a log of
Cohen et al. (`replay.py`) of 500 images. The start of the workers is left out. Efficiency is the
time that the samples of all certificates take at the speed of all workers together, over the time
until the last image is finished; padding, and samples ahead that no image asked for, count as idle
time. Shards, for comparison, take every W-th image and lose no worker. The driver's own time is
that of its thread, the simulation included; its share is of one worker's time for 1,000 samples.
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from record import Record, options
from replay import ALPHA, GOLDEN, OTHER, TRUE, Image, N, recover, signed_radii

from art_denoised.runs import Answered, Lost, Ready
from art_denoised.smoothing import AtRadii, Dispatcher, Draw, Piece, Task, drive, simulate

SIGMA, RADII = 0.5, (0.0, 0.25, 0.5, 0.75, 1.0)
SPEED, BETWEEN_DEATHS, AWAY = 1000.0, 1000.0, 10.0
PASS = 64  # samples
X = torch.zeros(1, 1, 1)


class Simulated:
    """A crew on a clock of its own."""

    def __init__(self, images: Sequence[Image], size: int, latency: float) -> None:
        self.images, self.size, self.latency = images, size, latency
        self.random = np.random.default_rng(0)
        self.speeds = speeds(size)
        self.now = 0.0
        self.free = np.zeros(size)  # when each worker will have done what it holds
        self.held: list[deque[Sequence[Piece]]] = [deque() for _ in range(size)]
        self.lives = [0] * size
        # Time, tie-break, worker, and in which of its lives.
        self.events = [(0.0, worker, worker, 0) for worker in range(size)]
        self.ready = [False] * size
        self.number = size

    def send(self, worker: int, bundle: Sequence[Piece]) -> None:
        self.held[worker].append(bundle)
        begin = max(self.free[worker], self.now + self.latency)
        self.free[worker] = begin + work(bundle) / self.speeds[worker]
        self.expect(self.free[worker], worker)

    def receive(self) -> tuple[int, Ready | Answered | Lost]:
        while True:
            self.now, _, worker, life = heapq.heappop(self.events)
            if life == self.lives[worker]:
                break
        if not self.ready[worker]:
            self.ready[worker] = True
            return worker, Ready({})
        bundle = self.held[worker][0]
        seconds = work(bundle) / self.speeds[worker]
        if self.random.random() < seconds / BETWEEN_DEATHS:
            self.lives[worker] += 1
            self.held[worker].clear()
            self.ready[worker] = False
            self.free[worker] = self.now + AWAY
            self.expect(self.free[worker], worker)
            return worker, Lost("a death")
        self.held[worker].popleft()
        votes = [self.votes(piece.index, piece.draw) for piece in bundle]
        return worker, Answered(votes, seconds)

    def expect(self, when: float, worker: int) -> None:
        self.number += 1
        heapq.heappush(self.events, (when, self.number, worker, self.lives[worker]))

    def votes(self, index: int, draw: Draw) -> dict[int, int]:
        n = draw.stop - draw.start
        image = self.images[index]
        k = int(self.random.binomial(n, image.votes / N))
        other = OTHER if image.selected == TRUE else TRUE
        return {label: m for label, m in ((image.selected, k), (other, n - k)) if m}

    def close(self) -> None:
        self.events.clear()


def speeds(size: int) -> np.ndarray:
    return np.where(np.arange(size) % 10 == 9, SPEED / 2, SPEED)


def work(bundle: Sequence[Piece]) -> int:
    """Samples that a worker computes for a bundle, those of padding included."""
    return -(-sum(piece.draw.stop - piece.draw.start for piece in bundle) // PASS) * PASS


def dispatched(
    images: Sequence[Image], stop: AtRadii, size: int, latency: float
) -> tuple[float, float]:
    """Return the efficiency of a dispatcher, and its own seconds for each 1,000 samples."""
    crew = Simulated(images, size, latency)
    record = {"sigma": SIGMA}
    begin = time.thread_time()
    tasks = (Task(i, X, stop.procedure(TRUE, record), stop.looks) for i in range(len(images)))
    found = dict(drive(tasks, Dispatcher(crew, {}, batch_size=PASS)))
    own = time.thread_time() - begin
    assert len(found) == len(images)
    used = sum(one.n0 + one.drawn for one in found.values())
    return used / crew.speeds.sum() / crew.now, 1000 * own / used


def sharded(images: Sequence[Image], stop: AtRadii, size: int) -> float:
    """Return the efficiency of shards."""
    crew = Simulated(images, 1, latency=0.0)
    samples = np.array(
        [
            simulate(stop.procedure(TRUE, {"sigma": SIGMA}), lambda draw, i=i: crew.votes(i, draw))[
                1
            ]
            for i in range(len(images))
        ]
    )
    mine = np.array([samples[worker::size].sum() for worker in range(size)])
    return float(samples.sum() / speeds(size).sum() / (mine / speeds(size)).max())


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--copies", type=int, default=1, help="of the images of the log")
    parser.add_argument("--latency", type=float, default=0.005, help="in seconds")
    given = parser.parse_args()
    sizes = (1, 4) if given.tiny else (1, 8, 64, 256, 1024)
    log = signed_radii(GOLDEN / f"cohen_cifar10_sigma{SIGMA:.2f}.txt")
    images = given.copies * recover(log, SIGMA, N, ALPHA)[: 20 if given.tiny else None]
    stop = AtRadii(RADII, n=10_000 if given.tiny else 100_000)
    record = Record("scale", given.json)
    for size in sizes:
        whole, own = dispatched(images, stop, size, given.latency)
        record.add(
            "workers", f"{size:,} workers",
            shards_percent=100 * sharded(images, stop, size), dispatcher_percent=100 * whole,
            driver_for_1000_samples_ms=1000 * own,
        )  # fmt: skip


if __name__ == "__main__":
    main()
