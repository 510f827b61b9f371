"""Replay certification logs: how many samples early stopping saves, and what it loses.

    python benchmarks/replay.py LOG --sigma S --radii R,R [--labels] [--seeds K] [--json]
    python benchmarks/replay.py [--seeds K] [--json FILE] [--tiny]

LOG is a TSV as Cohen et al. publish them (idx label predict radius correct time); without it, two
of theirs are replayed (CIFAR-10, tests/golden). The votes of each image are recovered from its
radius, shuffled, and handed to the procedures of the package, so the samples are those of the
published table. Votes that a log does not hold are assumed to be those that need the most samples:
half of all for the class of an abstention, and all that are left for the true class of a
misclassified image.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from record import Record
from scipy import special

from art_denoised.evaluation import read_log
from art_denoised.smoothing import Anytime, AtRadii, Draw, Stage, simulate

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
N, SELECTION, ALPHA = 100_000, 100, 0.001  # of the published logs
TABLES = {0.25: (0.0, 0.25, 0.5, 0.75), 0.5: (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)}
STDOUT = Path("-")
TRUE, OTHER = 0, 1  # the class of an image, and one that stands for all others


class Image(NamedTuple):
    """One image of a log."""

    votes: int  # for the class that was selected, among all samples
    selected: int  # TRUE or OTHER
    radius: float  # published; -1 where the class is wrong or none was certified


class Replay(NamedTuple):
    """Results on the images of one log."""

    saving: float  # samples of the fixed run over ours, those for selection included
    lost: float  # points of certified accuracy, at the worst radius
    acr: float  # average certified radius over that of the log


def signed_radii(log: Path) -> np.ndarray:
    """Return the radii of a log: negative where the class is wrong, 0 for an abstention."""
    if log.suffix == ".txt":
        return np.loadtxt(log).ravel()
    rows = read_log(log).rows
    return np.array([0.0 if r.prediction == -1 else (r.correct - 0.5) * 2 * r.radius for r in rows])


def recover(radii: np.ndarray, sigma: float, n: int, alpha: float) -> list[Image]:
    """Recover the votes of images that were certified from ``n`` samples at ``alpha``."""
    votes = np.arange(n // 2, n + 1)
    certified = sigma * special.ndtri(special.betaincinv(votes, n - votes + 1, alpha))
    # Radii are printed with few digits; several numbers of votes round to the same radius.
    found = np.searchsorted(certified, np.abs(radii)).clip(0, len(votes) - 1)
    of_selected = np.where(radii == 0, n // 2, votes[found])
    return [
        Image(int(k), OTHER if radius < 0 else TRUE, float(radius) if radius > 0 else -1.0)
        for k, radius in zip(of_selected, radii, strict=True)
    ]


def shuffled(image: Image, n: int, rng: np.random.Generator) -> Callable[[Draw], Mapping[int, int]]:
    """Answer draws with the votes of an image in random order."""
    left = {image.selected: image.votes, 1 - image.selected: n - image.votes}

    def votes(draw: Draw) -> Mapping[int, int]:
        size = draw.size
        if draw.stage is Stage.SELECTION:
            return {image.selected: size}
        true = int(rng.hypergeometric(left[TRUE], left[OTHER], size))
        left[TRUE] -= true
        left[OTHER] -= size - true
        return {TRUE: true, OTHER: size - true}

    return votes


def replay(
    images: Sequence[Image],
    stop: AtRadii | Anytime,
    radii: Sequence[float],
    *,
    sigma: float,
    seeds: Iterable[int] = (0,),
) -> Replay:
    """Run the procedure of a stop rule on every image of a log, in the order of each seed."""
    samples, radius, label = 0, [], TRUE if stop.labels else None
    for seed in seeds:
        rng = np.random.default_rng(seed)
        for image in images:
            votes = shuffled(image, stop.n, rng)
            certificate, used = simulate(stop.procedure(label, {"sigma": sigma}), votes)
            samples += used
            radius.append(certificate.radius if certificate.label == TRUE else -1.0)
    ours, published = np.array(radius), np.array([image.radius for image in images])
    lost = max(100 * (np.mean(published >= r) - np.mean(ours >= r)) for r in radii)
    return Replay(
        saving=len(ours) * (stop.n + SELECTION) / samples,
        lost=round(float(lost), 9),
        acr=float(np.maximum(ours, 0).mean() / np.maximum(published, 0).mean()),
    )


def published(record: Record, seeds: Iterable[int], every: int) -> None:
    """Measure on the logs in tests/golden."""
    for sigma, table in TABLES.items():
        log = signed_radii(GOLDEN / f"cohen_cifar10_sigma{sigma:.2f}.txt")[::every]
        images = recover(log, sigma, N, ALPHA)
        stops: dict[str, AtRadii | Anytime] = {
            f"{len(table)} radii, class selected": AtRadii(table, labels=False),
            f"{len(table)} radii": AtRadii(table, labels="class"),
            **{f"r = {r:g} alone": AtRadii([r], labels="class") for r in table},
            f"any time, {N:,}": Anytime(N, labels=False),
        }
        for name, stop in stops.items():
            radii = stop.radii if isinstance(stop, AtRadii) else table
            found = replay(images, stop, radii, sigma=sigma, seeds=seeds)
            record.add("published", f"sigma {sigma:g}, {name}", **found._asdict())


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log", type=Path, nargs="?", help="TSV of a certify run")
    parser.add_argument("--sigma", type=float, help="noise level of LOG")
    parser.add_argument("--radii", help="radii of the table, R,R,...")
    parser.add_argument("--labels", action="store_true", help="certify the true class, select none")
    parser.add_argument("--n", type=int, default=N, help="samples of LOG (%(default)s)")
    parser.add_argument("--alpha", type=float, default=ALPHA, help="that of LOG (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="orders of the votes (%(default)s)")
    parser.add_argument(
        "--json", nargs="?", const=STDOUT, type=Path, metavar="FILE.json",
        help="with LOG: print JSON; without: file for the results",
    )  # fmt: skip
    parser.add_argument("--tiny", action="store_true", help="smallest size, to try the script")
    args = parser.parse_args(given)
    if args.log is None and args.json is not None and args.json.suffix != ".json":
        parser.error(f"--json is {args.json}; give FILE.json, or a LOG before --json")
    if args.log is not None and args.json not in (None, STDOUT):
        parser.error(f"--json is {args.json} with a LOG; give --json alone, which prints")
    if args.log is None:
        record = Record("replay", args.json)
        published(record, range(1 if args.tiny else args.seeds), 50 if args.tiny else 1)
        return
    if args.sigma is None or args.radii is None:
        parser.error("LOG needs --sigma and --radii")
    radii = sorted(float(radius) for radius in args.radii.split(","))
    images = recover(signed_radii(args.log), args.sigma, args.n, args.alpha)
    stop = AtRadii(radii, args.n, alpha=args.alpha, labels="class" if args.labels else False)
    found = replay(images, stop, radii, sigma=args.sigma, seeds=range(args.seeds))
    if args.json:
        print(json.dumps({"images": len(images), "radii": radii, **found._asdict()}))
    else:
        print(
            f"{found.saving:.1f}x fewer samples than {args.n:,} an image; {found.lost:.2f} points"
        )
        print(
            f"lost at the worst radius; average certified radius {found.acr:.3f} of that in the log"
        )


if __name__ == "__main__":
    main()
