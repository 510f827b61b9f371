"""Simulate many workers: how much of them early stopping leaves idle.

    python benchmarks/scale.py [--images 500] [--tiny]

The real driver hands out draws to simulated workers, on a clock of their own. A worker
computes 1,000 samples a second. One in ten has half the speed, a bundle takes 5 ms on its way, and
one bundle in 2,000 is lost with its worker, which is back 10 seconds later. Votes are drawn with
the probabilities of a log of Cohen et al. (`replay.py`). The start of the workers is left out.
Efficiency is the time that all samples take at the speed of all workers together, over the time
until the last image is finished. Shards, for comparison, take every W-th image and lose no worker.
"""

from __future__ import annotations

import argparse
import heapq
import time
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from replay import ALPHA, GOLDEN, OTHER, TRUE, Image, N, recover, signed_radii

from art_denoised.smoothing import (
    Answered,
    AtRadii,
    Dispatcher,
    Draw,
    Lost,
    Piece,
    Ready,
    Task,
    drive,
    simulate,
)

SIGMA, RADII = 0.5, (0.0, 0.25, 0.5, 0.75, 1.0)
SPEED, LATENCY, DEATHS, AWAY = 1000.0, 0.005, 1 / 2000, 10.0
X = torch.zeros(1, 1, 1)


class Simulated:
    """A crew on a clock of its own."""

    def __init__(self, images: Sequence[Image], size: int, deaths: float = DEATHS) -> None:
        self.images, self.size, self.deaths = images, size, deaths
        self.random = np.random.default_rng(0)
        self.speeds = speeds(size)
        self.now = 0.0
        self.samples = 0
        self.free = np.zeros(size)  # when each worker will have done what it holds
        self.held: list[deque[Sequence[Piece]]] = [deque() for _ in range(size)]
        self.lives = [0] * size
        # Time, tie-break, worker, and in which of its lives.
        self.events = [(0.0, worker, worker, 0) for worker in range(size)]
        self.ready = [False] * size
        self.number = size

    def send(self, worker: int, bundle: Sequence[Piece]) -> None:
        self.held[worker].append(bundle)
        begin = max(self.free[worker], self.now + LATENCY)
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
        if self.random.random() < self.deaths:
            self.lives[worker] += 1
            self.held[worker].clear()
            self.ready[worker] = False
            self.free[worker] = self.now + AWAY
            self.expect(self.free[worker], worker)
            return worker, Lost("a death")
        bundle = self.held[worker].popleft()
        self.samples += work(bundle)
        votes = [self.votes(piece.index, piece.draw) for piece in bundle]
        return worker, Answered(votes, work(bundle) / self.speeds[worker])

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
    return sum(piece.draw.stop - piece.draw.start for piece in bundle)


def dispatched(images: Sequence[Image], stop: AtRadii, size: int) -> tuple[float, float]:
    """Return the efficiency of a dispatcher, and its own seconds for each 1,000 samples."""
    crew = Simulated(images, size)
    record = {"sigma": SIGMA}
    begin = time.perf_counter()
    tasks = (Task(i, X, stop.procedure(TRUE, record)) for i in range(len(images)))
    assert len(dict(drive(tasks, Dispatcher(crew, {})))) == len(images)
    own = time.perf_counter() - begin
    return crew.samples / crew.speeds.sum() / crew.now, 1000 * own / crew.samples


def sharded(images: Sequence[Image], stop: AtRadii, size: int) -> float:
    """Return the efficiency of shards."""
    crew = Simulated(images, 1)
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    count = 20 if options.tiny else options.images
    sizes = (1, 4) if options.tiny else (1, 8, 64, 256, 1024)
    log = signed_radii(GOLDEN / f"cohen_cifar10_sigma{SIGMA:.2f}.txt")
    images = recover(log, SIGMA, N, ALPHA)[:count]
    stop = AtRadii(RADII, n=10_000 if options.tiny else 100_000)
    print("| workers | shards | dispatcher | its own ms for 1,000 samples |")
    print("|---|---|---|---|")
    for size in sizes:
        whole, own = dispatched(images, stop, size)
        print(f"| {size} | {sharded(images, stop, size):.0%} | {whole:.0%} | {1000 * own:.2f} |")


if __name__ == "__main__":
    main()
