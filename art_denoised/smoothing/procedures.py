"""When to sample and when to stop, as pure procedures: they ask for votes and return statements.

A procedure is a generator. It yields a `Draw`, is sent the votes of those samples, and in the end
returns a `Certificate` or a `Vote`. It knows nothing of images, networks or batches, so the very
code that certifies images is simulated on known probabilities in the tests, replayed on stored
logs, and run ahead in a preview.

Stopping for futility is decided by the votes and may cost power, never soundness: the bound that
is returned holds at every sample count at which the procedure could have stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from enum import IntEnum
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias, TypeVar

from scipy import special, stats

from art_denoised.smoothing.bounds import Looks, Mixture
from art_denoised.smoothing.statistics import ABSTAIN, Certificate, Vote, top_class

# A radius is given up when the rest of the samples would need a success rate that has less than
# this posterior probability. Measured in benchmarks/replay.py: the table loses at most 0.4 points.
FUTILE = 0.01

Counts: TypeAlias = Mapping[int, int]
T = TypeVar("T")


class Stage(IntEnum):
    """What a noise stream is for. Samples of different stages are independent."""

    SELECTION = 0
    ESTIMATION = 1
    VOTE = 2
    SMOOTHING = 3
    PILOT = 4


class Draw(NamedTuple):
    """A request for the votes of samples ``start`` to ``stop`` of one stage's noise stream."""

    stage: Stage
    start: int
    stop: int


Procedure: TypeAlias = Generator[Draw, Counts, T]


def certifying(
    bound: Looks,
    *,
    n0: int,
    alpha: float,
    sigma: float,
    radii: Sequence[float] = (),
    label: int | None = None,
    **record: Any,
) -> Procedure[Certificate]:
    """Select a class, then bound its probability, until nothing is left to prove.

    Nothing is left when all ``radii`` are proved or the next one is out of reach, or, the image's
    class being known, when another one was selected: such an image counts as wrong whatever its
    radius. The best bound of all looks is returned.

    Args:
        bound: Sample counts at which the votes are looked at.
        n0: Selection samples.
        alpha: Failure probability of the certificate.
        sigma: Noise level in image units.
        radii: l2 radii in question, ascending; without any, sampling goes on to the last look.
        label: The image's class, if images that are wrong anyway should be skipped.
        **record: What else `Certificate.from_counts` takes.

    Example:
        >>> steps = certifying(Looks(100, 10_000), n0=50, alpha=0.001, sigma=0.25, radii=[0.25])
        >>> certificate, samples = simulate(steps, lambda draw: {3: draw.stop - draw.start})
        >>> certificate.label, certificate.radius, samples
        (3, 0.32742, 150)
    """
    record |= {"alpha": alpha, "sigma": sigma, "bound": bound}
    selection = yield Draw(Stage.SELECTION, 0, n0)
    selected = top_class(selection)
    best = Certificate.from_counts(selection, {}, **record)
    if label is not None and selected != label:
        return best
    counts: dict[int, int] = {}
    n = 0
    for look in bound.counts:
        counts = _sum(counts, (yield Draw(Stage.ESTIMATION, n, look)))
        n = look
        votes = counts.get(selected, 0) if selected != ABSTAIN else 0
        certificate = Certificate.from_counts(selection, counts, **record)
        best = max(best, certificate, key=lambda c: (c.p_lower, c.n))
        unproved = [r for r in radii if not best.proves(r)]
        if radii and (not unproved or _futile(bound, votes, n, alpha, unproved[0] / sigma)):
            break
    return best.after(drawn=n)


def tightening(
    bound: Mixture,
    *,
    n0: int,
    n: int,
    earlier: Certificate | None = None,
    label: int | None = None,
    **record: Any,
) -> Procedure[Certificate]:
    """Certify at any time: go on from an earlier certificate, up to ``n`` samples in all.

    The last draw may be answered with the votes of its first samples alone, when time is up.

    Args:
        bound: The bound, the same for all parts of one run.
        n0: Selection samples, drawn if there is no earlier certificate.
        n: Estimation samples in all.
        earlier: What to go on from.
        label: The image's class, if images that are wrong anyway should be skipped.
        **record: What else `Certificate.from_counts` takes.

    Example:
        >>> record = {"n0": 50, "alpha": 0.001, "sigma": 0.25}
        >>> def unanimous(draw):
        ...     return {3: draw.stop - draw.start}
        >>> first, _ = simulate(tightening(Mixture(), n=100, **record), unanimous)
        >>> second, samples = simulate(
        ...     tightening(Mixture(), n=500, earlier=first, **record), unanimous
        ... )
        >>> second.radius > first.radius, second.n, samples
        (True, 500, 400)
    """
    record |= {"bound": bound}
    if earlier is None:
        selection = yield Draw(Stage.SELECTION, 0, n0)
        earlier = Certificate.from_counts(selection, {}, **record)
    selection = earlier.selection_counts
    if (label is not None and top_class(selection) != label) or earlier.n >= n:
        return earlier
    further = yield Draw(Stage.ESTIMATION, earlier.n, n)
    return Certificate.from_counts(selection, _sum(earlier.counts, further), **record)


def voting(n: int, **record: Any) -> Procedure[Vote]:
    """Predict from the votes of ``n`` samples (Cohen et al., Predict), without their ``tv``.

    Example:
        >>> simulate(voting(100, alpha=0.001, sigma=0.25), lambda draw: {3: 90, 5: 10})[0].label
        3
    """
    record.pop("tv", None)
    return Vote.from_counts((yield Draw(Stage.VOTE, 0, n)), **record)


def simulate(procedure: Procedure[T], votes: Callable[[Draw], Counts]) -> tuple[T, int]:
    """Run a procedure on votes from elsewhere than a network.

    Args:
        procedure: A fresh one.
        votes: Answers a draw with class -> votes.

    Returns:
        What the procedure returns, and the number of samples that it asked for.
    """
    samples = 0
    try:
        draw = next(procedure)
        while True:
            samples += draw.stop - draw.start
            draw = procedure.send(votes(draw))
    except StopIteration as end:
        return end.value, samples


def _sum(counts: Counts, further: Counts) -> dict[int, int]:
    return {c: counts.get(c, 0) + further.get(c, 0) for c in sorted({*counts, *further})}


def _futile(bound: Looks, k: int, n: int, alpha: float, ratio: float) -> bool:
    """Whether the last look will hardly prove a radius of ``ratio`` times sigma.

    The remaining samples would need a success rate q; it is compared with the Beta posterior of
    the probability under Jeffreys' prior.
    """
    if n == bound.last:
        return True
    q = (_needed(bound.last, bound.level(bound.last, alpha), ratio) - k) / (bound.last - n)
    return q > 1 or (q > 0 and float(special.betaincc(k + 0.5, n - k + 0.5, q)) < FUTILE)


@lru_cache(maxsize=1024)
def _needed(n: int, level: float, ratio: float) -> int:
    """Fewest successes among n whose Clopper-Pearson bound at ``level`` exceeds Phi(ratio)."""
    return int(stats.binom.isf(level, n, special.ndtr(ratio))) + 1
