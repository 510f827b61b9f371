"""What a run will cost, from a small pilot whose samples are used for nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.data.images import ImageData
from art_denoised.evaluation.certify import answers, choose
from art_denoised.smoothing.queries import QueryOnly
from art_denoised.smoothing.smoother import Smoother
from art_denoised.smoothing.stops import AtRadii, Counts, Draw, FixedN, Procedure, Stage, simulate

_SIMULATIONS = 4  # for each pilot image
_PILOT_SAMPLES = 100


@dataclass(frozen=True, slots=True)
class Preview:
    """The expected cost of a run.

    Attributes:
        images: Number of images of the run.
        samples: Expected number of samples, n0 included.
        low: Lower end of the 95% interval for that number, over the choice of pilot images.
        high: Upper end of it.
        fixed: Number of samples if none were saved by stopping early.
        seconds: Expected time at the pilot's speed.
        cost: Expected cost, in the unit of the cost of a sample.
    """

    images: int
    samples: float
    low: float
    high: float
    fixed: int
    seconds: float
    cost: float

    def __str__(self) -> str:
        """Return it in words, for the terminal."""
        ratio = self.fixed / self.samples
        saving = f", {ratio:.1f}x fewer than without early stopping"
        words = (
            f"{self.images} images: about {self.samples:,.0f} samples "
            f"({self.low:,.0f} to {self.high:,.0f}{saving if ratio > 1 else ''}), "
            f"{_duration(self.seconds)}"
        )
        return words + (f", cost {self.cost:,.2f}" if self.cost else "")


def preview(
    smoother: Smoother,
    data: ImageData,
    stop: FixedN | AtRadii,
    *,
    indices: Sequence[int] | None = None,
    pilot: int = 16,
    cost_per_sample: float = 0.0,
) -> Preview:
    """Estimate samples, time and cost of `certify` before it is begun.

    A few images, evenly spaced, are sampled a little, from a noise stream of its own: none of the
    samples, nor any choice made from them, enters a certificate. The stop rule's own procedure is
    then simulated on class probabilities drawn from what the pilot leaves possible.

    Args:
        smoother: What will be certified.
        data: Pairs of an image and its class.
        stop: When an image is done. `Anytime` has no cost of its own.
        indices: Indices of the images; None: all.
        pilot: Number of pilot images.
        cost_per_sample: Price of a sample, for networks that are paid by the query.

    Raises:
        InputError: There are no images, or a value is out of range.

    Example:
        >>> from art_denoised.data import load_data
        >>> from art_denoised.demo import digits_classifier
        >>> smoother = Smoother(digits_classifier(), sigma=0.1)
        >>> cost = preview(smoother, load_data("digits"), AtRadii([0.1], n=10_000), pilot=4)
        >>> cost.images, cost.samples < 500 * 10_100, cost.fixed
        (500, True, 5050000)
    """
    if not isinstance(stop, (FixedN, AtRadii)):
        raise InputError(f"stop is {stop!r}; a preview needs FixedN or AtRadii")
    if isinstance(smoother.base, QueryOnly):
        raise InputError("a preview would pay for its pilot; multiply n by the price of a query")
    if not 0 <= cost_per_sample < float("inf"):
        raise InputError(f"cost_per_sample is {cost_per_sample}; give a number >= 0")
    images = choose(smoother, data, indices)
    if not len(images):
        raise InputError("there are no images; give at least one")
    pilot = min(checks.count("pilot", pilot), len(images))
    chosen = [images.indices[i] for i in np.linspace(0, len(images) - 1, pilot).astype(int)]
    start = time.perf_counter()
    with closing(smoother.voter()) as voter:
        found = [answer for _, _, answer, _ in answers(smoother, images, _Pilot(), chosen, voter)]
    samples_a_second = pilot * _PILOT_SAMPLES / (time.perf_counter() - start)

    rng = np.random.default_rng(0)
    needed = [
        simulate(stop.procedure(label, record), _votes(counts, rng))[1]
        for label, record, counts in found
        for _ in range(_SIMULATIONS)
    ]
    means = np.reshape(needed, (pilot, _SIMULATIONS)).mean(1)
    mean = float(means.mean())
    half = 1.96 * float(means.std(ddof=1)) / pilot**0.5 if pilot > 1 else mean
    total, fixed = len(images) * mean, len(images) * (stop.n0 + stop.n)
    return Preview(
        images=len(images),
        samples=total,
        low=max(0.0, len(images) * (mean - half)),
        high=min(len(images) * (mean + half), fixed),
        fixed=fixed,
        seconds=total / samples_a_second,
        cost=total * cost_per_sample,
    )


class _Pilot:
    """A stop rule that ends after a few samples, with all that is known of an image."""

    settings: ClassVar[dict[str, Any]] = {}
    looks: ClassVar[Sequence[int]] = ()

    def procedure(
        self, label: int | None, record: Mapping[str, Any], earlier: object = None
    ) -> Procedure[Any]:
        counts = yield Draw(Stage.PILOT, 0, _PILOT_SAMPLES)
        return label, record, counts


def _votes(counts: Counts, rng: np.random.Generator) -> Callable[[Draw], Counts]:
    """Return a voter with class probabilities from the Dirichlet posterior of the pilot's votes."""
    classes = [*sorted(counts), max(counts) + 1]  # the last stands for all that were not seen
    weights = [counts.get(c, 0) + 1 / len(classes) for c in classes]
    probabilities = rng.dirichlet(weights)

    def votes(draw: Draw) -> Counts:
        drawn = rng.multinomial(draw.stop - draw.start, probabilities)
        return {c: int(k) for c, k in zip(classes, drawn, strict=True) if k}

    return votes


def _duration(seconds: float) -> str:
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
