"""What a run will cost, from a small pilot whose samples are used for nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import numpy as np

from art_denoised import checks
from art_denoised.evaluation.runner import Runner
from art_denoised.smoothing.procedures import Counts, Draw, Procedure, Stage, simulate

_SIMULATIONS = 4  # of each pilot image


@dataclass(frozen=True, slots=True)
class Preview:
    """The expected cost of a run.

    Attributes:
        images: Images of the run.
        samples: Expected samples, n0 included.
        low: Lower end of the 95% interval for that number, over the choice of pilot images.
        high: Upper end of it.
        fixed: Samples if none were saved by stopping early.
        seconds: Expected time at the pilot's speed.
        cost: Expected cost, in the unit of what a sample costs.
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
    run: Runner,
    procedure: Callable[[int, int, dict[str, Any]], Procedure[Any]],
    *,
    most: int,
    pilot: int = 16,
    pilot_samples: int = 100,
    cost_per_sample: float = 0.0,
) -> Preview:
    """Estimate samples, time and cost of a run before it is begun.

    A few images, evenly spaced, are sampled a little, from a noise stream of its own: none of the
    samples, nor any choice made from them, enters a certificate. The run's own procedure is then
    simulated on class probabilities drawn from what the pilot leaves possible.

    Args:
        run: Model, data and noise.
        procedure: As for `Runner.answers`.
        most: Samples of an image when nothing stops early, n0 included.
        pilot: Pilot images.
        pilot_samples: Samples of each.
        cost_per_sample: For networks that are paid by the query.

    Example:
        >>> from art_denoised.demo import digits_classifier
        >>> from art_denoised.data import load_data
        >>> from art_denoised.evaluation.run import certifying_procedure
        >>> runner = Runner(digits_classifier(), load_data("digits"), 0.1, "gaussian", 0, 64)
        >>> plan = certifying_procedure(n0=100, n=10_000, alpha=0.001, radii=[0.1])
        >>> cost = preview(runner, plan, most=10_100, pilot=4)
        >>> cost.images, cost.samples < 500 * 10_100, cost.fixed
        (500, True, 5050000)
    """
    indices = list(run.indices)
    pilot = min(checks.count("pilot", pilot), len(indices))
    chosen = [indices[i] for i in np.linspace(0, len(indices) - 1, pilot).astype(int)]

    def sampled(index: int, label: int, record: dict[str, Any]) -> Procedure[Any]:
        return _pilot(pilot_samples, label, record)

    start = time.perf_counter()
    answers = [(index, answer) for index, _, answer, _ in run.answers(chosen, sampled)]
    rate = pilot * pilot_samples / (time.perf_counter() - start)

    rng = np.random.default_rng(0)
    needed = []
    for index, (label, record, counts) in answers:
        for _ in range(_SIMULATIONS):
            votes = _votes(counts, rng)
            needed.append(simulate(procedure(index, label, dict(record)), votes)[1])
    means = np.reshape(needed, (pilot, _SIMULATIONS)).mean(1)
    mean = float(means.mean())
    half = 1.96 * float(means.std(ddof=1)) / pilot**0.5 if pilot > 1 else mean
    total, fixed = len(indices) * mean, len(indices) * most
    return Preview(
        images=len(indices),
        samples=total,
        low=max(0.0, len(indices) * (mean - half)),
        high=min(len(indices) * (mean + half), fixed),
        fixed=fixed,
        seconds=total / rate,
        cost=total * cost_per_sample,
    )


def _pilot(n: int, label: int, record: dict[str, Any]) -> Generator[Draw, Counts, Any]:
    counts = yield Draw(Stage.PILOT, 0, n)
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
