"""Replay certification logs: how many samples early stopping saves, and what it loses.

    python benchmarks/replay.py LOG --sigma S [--radii R,R] [--labels] [--seeds K] [--json]

LOG is a TSV as Cohen et al. publish them (idx label predict radius correct time), of N samples an
image at a fixed alpha. The votes of each image are recovered from its radius, shuffled, and handed
to the procedures of the package, so the samples are those of the published table. Votes that a log
does not hold are assumed to be those that need the most samples: half of them for the class of an
abstention, and all that are left for the true class of a misclassified image.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import special

from art_denoised.evaluation import read_log
from art_denoised.smoothing import (
    Anytime,
    AtRadii,
    Certificate,
    Draw,
    Procedure,
    Stage,
    simulate,
)

TRUE, OTHER = 0, 1  # the class of an image, and one that stands for all others


class Image(NamedTuple):
    """One image of a log."""

    votes: int  # for the class with a radius, or an abstention's class, among all samples
    predicted: int  # TRUE or OTHER
    radius: float  # published; -1 where the class is wrong or there is none


class Replay(NamedTuple):
    """Results on the images of one log."""

    saving: float  # samples of the fixed run over ours, selection included
    lost: float  # points of certified accuracy, at the worst radius
    acr: float  # average certified radius over that of the log


def read(path: Path | str, sigma: float, n: int, alpha: float) -> list[Image]:
    """Recover the votes of a log."""
    votes = np.arange(n // 2, n + 1)
    certified = sigma * special.ndtri(special.betaincinv(votes, n - votes + 1, alpha))
    images = []
    for row in read_log(path).rows:
        # Radii are printed with few digits; several numbers of votes round to the same radius.
        found = min(int(np.searchsorted(certified, row.radius)), len(votes) - 1)
        k = int(votes[found]) if row.prediction != -1 else n // 2
        wrong = row.prediction not in (-1, row.label)
        images.append(Image(k, OTHER if wrong else TRUE, row.radius if row.correct else -1.0))
    return images


def shuffled(image: Image, n: int, rng: np.random.Generator) -> Callable[[Draw], Mapping[int, int]]:
    """Answer draws with the votes of an image in random order."""
    left = {image.predicted: image.votes, 1 - image.predicted: n - image.votes}

    def votes(draw: Draw) -> Mapping[int, int]:
        size = draw.stop - draw.start
        if draw.stage is Stage.SELECTION:
            return {image.predicted: size}
        true = int(rng.hypergeometric(left[TRUE], left[OTHER], size))
        left[TRUE] -= true
        left[OTHER] -= size - true
        return {TRUE: true, OTHER: size - true}

    return votes


def replay(
    images: Sequence[Image],
    procedure: Callable[[], Procedure[Certificate]],
    radii: Sequence[float],
    *,
    n: int,
    n0: int = 100,
    seeds: int = 1,
) -> Replay:
    """Run a procedure on every image of a log, in the order of each of some seeds."""
    samples, radius = 0, np.zeros((seeds, len(images)))
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        for i, image in enumerate(images):
            certificate, used = simulate(procedure(), shuffled(image, n, rng))
            samples += used
            radius[seed, i] = certificate.radius if certificate.label == TRUE else -1.0
    published = np.array([image.radius for image in images])
    lost = max(100 * (np.mean(published >= r) - np.mean(radius >= r)) for r in radii)
    fixed = seeds * len(images) * (n + n0)
    ours, theirs = np.maximum(radius, 0).mean(), np.maximum(published, 0).mean()
    return Replay(fixed / samples, float(lost), float(ours / theirs))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log", type=Path)
    parser.add_argument("--sigma", type=float, required=True)
    parser.add_argument("--radii", default="0,0.25,0.5,0.75")
    parser.add_argument("--labels", action="store_true", help="labels are known: certify them")
    parser.add_argument("--anytime", action="store_true", help="the bound of Anytime, no radii")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--n", type=int, default=100_000, help="samples of the log")
    parser.add_argument("--alpha", type=float, default=0.001)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(arguments)
    radii = sorted(float(radius) for radius in asked.radii.split(","))
    images = read(asked.log, asked.sigma, asked.n, asked.alpha)
    stop: AtRadii | Anytime = AtRadii(
        radii, asked.n, alpha=asked.alpha, labels="class" if asked.labels else False
    )
    if asked.anytime:
        stop = Anytime(asked.n, alpha=asked.alpha, labels=asked.labels)
    found = replay(
        images,
        lambda: stop.procedure(TRUE if asked.labels else None, {"sigma": asked.sigma}),
        radii,
        n=asked.n,
        seeds=asked.seeds,
    )
    if asked.json:
        print(json.dumps({"images": len(images), "radii": radii, **found._asdict()}))
    else:
        print(
            f"{found.saving:.1f}x fewer samples than {asked.n:,} an image, {found.lost:.2f} points"
        )
        print(f"lost at the worst radius; average certified radius {found.acr:.3f} of the log's")


if __name__ == "__main__":
    main()
