"""Replay stored certification logs: what early stopping saves, and what it loses.

    python benchmarks/replay.py [--seeds 5] [--tiny]

The votes of each image in a log of Cohen et al. (100,000 samples, tests/golden) are recovered from
its radius, shuffled, and handed to our procedures. So the samples are those of the published table.
The log does not keep the votes of abstentions: half of them are assumed to be for the top class,
which needs the most samples.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import special

from art_denoised.smoothing import (
    Anytime,
    AtRadii,
    Certificate,
    Draw,
    Procedure,
    Stage,
    simulate,
)

Counts = Mapping[int, int]
GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
N, N0, ALPHA = 100_000, 100, 0.001
LOGS = {0.25: (0.0, 0.25, 0.5, 0.75), 0.5: (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)}


class Replay(NamedTuple):
    """Results of a procedure on the images of one log."""

    saving: float  # samples of the fixed-n run over ours, n0 included
    accuracy: np.ndarray  # certified accuracy in percent, at each radius
    published: np.ndarray  # certified accuracy in the log
    acr: float  # average certified radius over that of the log


def read(sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the signed radii of a log, and the votes of the selected class among N."""
    radii = np.loadtxt(GOLDEN / f"cohen_cifar10_sigma{sigma:.2f}.txt").ravel()
    votes = np.arange(N // 2, N + 1)
    certified = sigma * special.ndtri(special.betaincinv(votes, N - votes + 1, ALPHA))
    # Radii are printed with three digits; several numbers of votes round to the same radius.
    found = np.searchsorted(certified, np.abs(radii)).clip(0, len(votes) - 1)
    return radii, np.where(radii == 0, N // 2, votes[found])


def shuffled(right: int, rng: np.random.Generator) -> Callable[[Draw], Counts]:
    """Answer draws with recorded votes in random order: 1 for the selected class, 0 for others."""
    left = {True: right, False: N - right}

    def votes(draw: Draw) -> Counts:
        if draw.stage is Stage.SELECTION:
            return {1: draw.stop}
        k = int(rng.hypergeometric(left[True], left[False], draw.stop - draw.start))
        left[True] -= k
        left[False] -= draw.stop - draw.start - k
        return {1: k, 0: draw.stop - draw.start - k}

    return votes


def replay(
    sigma: float,
    radii: tuple[float, ...],
    procedure: Callable[[int | None], Procedure[Certificate]],
    *,
    use_labels: bool,
    seed: int,
    every: int = 1,
) -> Replay:
    """Run ``procedure(label)`` on every image of a log, or on every ``every``-th."""
    rng = np.random.default_rng(seed)
    log, votes = (column[::every] for column in read(sigma))
    correct = log > 0
    samples, proved, ours = 0, np.zeros(len(radii)), 0.0
    for right, is_correct, in_log in zip(votes, correct, log, strict=True):
        known = (1 if is_correct or in_log == 0 else 0) if use_labels else None
        certificate, used = simulate(procedure(known), shuffled(int(right), rng))
        samples += used
        if is_correct:
            proved += [certificate.proves(r) for r in radii]
            ours += certificate.radius
    return Replay(
        saving=len(log) * (N + N0) / samples,
        accuracy=100 * proved / len(log),
        published=np.array([100 * np.mean(correct & (log >= r)) for r in radii]),
        acr=ours / log[correct].sum(),
    )


def table(sigma: float, radii: tuple[float, ...]) -> Callable[[int | None], Procedure[Certificate]]:
    """Return the procedure for a table of radii."""
    stop = AtRadii(radii, N, N0, ALPHA)
    return lambda label: stop.procedure(label, {"sigma": sigma})


def anytime(sigma: float, n: int) -> Callable[[int | None], Procedure[Certificate]]:
    """Return the procedure for a deadline after ``n`` samples."""
    stop = Anytime(n, N0, ALPHA)
    return lambda label: stop.procedure(label, {"sigma": sigma})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="smallest size, to try the script")
    arguments = parser.parse_args()
    seeds, every = (range(1), 50) if arguments.tiny else (range(arguments.seeds), 1)
    print(f"fewer samples than {N:,} an image, and points of certified accuracy lost\n")
    print(f"{'':44}{'saving':>8}{'lost at most':>14}{'ACR':>8}")
    for sigma, radii in LOGS.items():
        runs = {
            f"sigma {sigma:g}, {len(radii)} radii": (radii, table(sigma, radii), False),
            f"sigma {sigma:g}, {len(radii)} radii, labels": (radii, table(sigma, radii), True),
            **{
                f"sigma {sigma:g}, r = {r:g} alone, labels": ((r,), table(sigma, (r,)), True)
                for r in radii
            },
            f"sigma {sigma:g}, any time, {N:,}": (radii, anytime(sigma, N), False),
        }
        for name, (at, procedure, use_labels) in runs.items():
            done = [
                replay(sigma, at, procedure, use_labels=use_labels, seed=s, every=every)
                for s in seeds
            ]
            saving = np.mean([r.saving for r in done])
            lost = max(float((r.published - r.accuracy).max()) for r in done)
            acr = np.mean([r.acr for r in done])
            print(f"{name:44}{saving:7.1f}x{lost:14.2f}{acr:8.3f}", flush=True)


if __name__ == "__main__":
    main()
