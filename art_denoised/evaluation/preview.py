"""What a run will cost, from a small pilot whose answers are used for nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.checks.values import counted, duration, memory, operations
from art_denoised.data.images import Chosen, ImageData
from art_denoised.evaluation.answers import ANSWERS, Answers
from art_denoised.evaluation.certify import answers, choose
from art_denoised.evaluation.target import LOOKED, Target, columns
from art_denoised.models.cost import forward_cost, gradient_cost
from art_denoised.runs.journal import read_run
from art_denoised.smoothing.queries import Budget, QueryOnly
from art_denoised.smoothing.smoother import Smoother
from art_denoised.smoothing.stops import (
    AtRadii,
    Counts,
    Draw,
    FixedN,
    Procedure,
    Stage,
    Voting,
    simulate,
)
from art_denoised.types import Images

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
        flop: Floating-point operations for these samples.
        memory: Estimate of the bytes held at once, with the batch size of the smoother.
        n0: Number of the samples of each image that select its class.
    """

    images: int
    samples: float
    low: float
    high: float
    fixed: int
    seconds: float
    cost: float
    flop: float = 0.0
    memory: int = 0
    n0: int = 0

    def __str__(self) -> str:
        """Return it in words, for the terminal."""
        ratio = self.fixed / self.samples
        saving = f", {ratio:.1f}x fewer than without early stopping"
        samples = f"{self.fixed:,} samples"
        if self.low < self.high or ratio > 1:
            samples = (
                f"about {self.samples:,.0f} samples "
                f"({self.low:,.0f} to {self.high:,.0f}{saving if ratio > 1 else ''})"
            )
        words = [f"{counted(self.images, 'image')}: {samples}"]
        if self.n0:
            words.append(f"of which {self.n0:,} an image select its class")
        words.append(duration(self.seconds))
        if self.cost:
            words.append(f"cost {self.cost:,.2f}")
        if self.flop:
            words += [operations(self.flop), memory(self.memory)]
        return ", ".join(words)


def preview(
    smoother: Smoother,
    data: ImageData,
    stop: FixedN | AtRadii | Voting,
    *,
    indices: Sequence[int] | None = None,
    pilot: int = 16,
    cost_per_sample: float = 0.0,
) -> Preview:
    """Estimate samples, operations, memory and time of `certify` or `predict` beforehand.

    A few images, evenly spaced, are sampled a little, from a noise stream of its own: none of the
    samples, nor any choice made from them, enters a certificate. The stop rule's own procedure is
    then simulated on class probabilities drawn from what the pilot leaves possible.

    Args:
        smoother: What will be certified, or predict.
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
    if not isinstance(stop, (FixedN, AtRadii, Voting)):
        raise InputError(f"stop is {stop!r}; a preview needs FixedN, AtRadii or Voting")
    if smoother.network is None:
        raise InputError("the pilot of a preview would be paid; give preview_queries")
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
    n0 = 0 if isinstance(stop, Voting) else stop.n0
    total, fixed = len(images) * mean, len(images) * (n0 + stop.n)
    x, _ = images[chosen[0]]
    one = forward_cost(smoother.network, smoother.prepare(x[None]))
    return Preview(
        images=len(images),
        samples=total,
        low=max(0.0, len(images) * (mean - half)),
        high=min(len(images) * (mean + half), fixed),
        fixed=fixed,
        seconds=total / samples_a_second,
        cost=total * cost_per_sample,
        flop=total * one.flop,
        memory=one.memory(smoother.batch_size),
        n0=n0,
    )


@dataclass(frozen=True, slots=True)
class QueryPreview:
    """The expected cost of certifying a classifier that is paid by the query.

    Attributes:
        images: Number of images of the run.
        fewest: Smallest number of queries that are still to be sent, if none fails.
        most: Largest number.
        answered: Number of queries that the journal of the run answers already.
        cost: Cost of ``most`` queries.
        seconds: Time of ``most`` queries, if each takes a second.
        limit: Number of queries that the budget still allows, infinite without one.
    """

    images: int
    fewest: int
    most: int
    answered: int
    cost: float
    seconds: float
    limit: float

    def __str__(self) -> str:
        """Return it in words, for the terminal."""
        number = f"{self.most:,}"
        if self.fewest < self.most:
            number = f"{self.fewest:,} to {number}"
        words = f"{counted(self.images, 'image')}: {number} queries"
        words += f", cost {self.cost:,.2f} at most, without retries" if self.cost else ""
        words += f", {duration(self.seconds)} at a second a query"
        words += f", {self.answered:,} already answered" if self.answered else ""
        if self.limit < self.most:
            words += f"; the budget allows {max(self.limit, 0):,.0f}"
        return words


def preview_queries(
    smoother: Smoother,
    data: ImageData,
    stop: FixedN | AtRadii,
    *,
    run: Path | str | None = None,
    indices: Sequence[int] | None = None,
) -> QueryPreview:
    """Return what `certify` of a query-only classifier will cost. It sends no query.

    Args:
        smoother: A smoother of a `BlackBox`.
        data: Pairs of an image and its class.
        stop: When an image is done.
        run: Folder of a run to continue, whose answers are not paid for again.
        indices: Indices of the images; None: all.

    Raises:
        InputError: The base is not query-only, there are no images, or the journal is damaged.

    Example:
        >>> from art_denoised.data import load_data
        >>> from art_denoised.smoothing import BlackBox, Budget
        >>> price = Budget(cost=1.0, cost_per_query=0.0015)
        >>> names = ["zero", "one", "two"]
        >>> box = BlackBox(lambda images: ["two"] * len(images), names, budget=price)
        >>> smoother = Smoother(box, sigma=0.25)
        >>> print(preview_queries(smoother, load_data("digits"), FixedN(100, n0=20), indices=[0]))
        1 image: 120 queries, cost 0.18 at most, without retries, 30 s at a second a query
    """
    if not isinstance(smoother.base, QueryOnly):
        raise InputError("the base is not query-only; give preview")
    base: Any = smoother.base
    if not isinstance(stop, (FixedN, AtRadii)):
        raise InputError(f"stop is {stop!r}; a query-only base takes FixedN or AtRadii")
    images = choose(smoother, data, indices)
    if not len(images):
        raise InputError("there are no images; give at least one")
    rows: Iterable[Any] = ()
    if run is not None and Path(run, f"{ANSWERS.name}.jsonl").exists():
        rows = read_run(run, ANSWERS).rows.values()
    journal = Answers(base.words, rows)
    record = smoother.record(images.shape or (1, 1, 1))
    fewest = most = answered = 0
    for index, x, label in images:
        journal.check(index, x, label)
        held, needed = journal.held(index), journal.needed(index, label, stop, record)
        answered, fewest = answered + held, fewest + needed
        most += stop.n0 + stop.n - held if needed else 0
    budget = getattr(base, "budget", Budget())
    return QueryPreview(
        images=len(images),
        fewest=fewest,
        most=most,
        answered=answered,
        cost=most * budget.cost_per_query,
        seconds=most / (base.workers * base.batch_size),
        limit=budget.limit - max(base.spent, journal.spent),
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
        drawn = rng.multinomial(draw.size, probabilities)
        return {c: int(k) for c, k in zip(classes, drawn, strict=True) if k}

    return votes


@dataclass(frozen=True, slots=True)
class AttackPreview:
    """The expected cost of a run of attacks, masking checks aside.

    Attributes:
        images: Number of images of the run.
        nfe: Number of function evaluations (forward passes of an image), about and at most: images
            that the model gets wrong are not attacked.
        unknown: Names of attacks whose number is not known; they are not included.
        flop: Floating-point operations; evaluations of attacks that take gradients count with one.
        seconds: Time at the speed of two batches.
        memory: Estimate of the bytes held at once.
    """

    images: int
    nfe: int
    unknown: tuple[str, ...]
    flop: float
    seconds: float
    memory: int

    def __str__(self) -> str:
        """Return it in words, for the terminal."""
        images = counted(self.images, "image")
        words = f"{images}: up to {self.nfe:,} forward passes, {duration(self.seconds)}, "
        words += f"{operations(self.flop)}, {memory(self.memory)}"
        if self.unknown:
            words += f"; without {', '.join(self.unknown)}, whose cost is not known"
        return words + "; masking checks come on top"


def preview_attack(
    model: Any,
    data: ImageData,
    attacks: Sequence[Any] | Mapping[str, Any],
    *,
    indices: Sequence[int] | None = None,
    noise: str | None = None,
    gradients: Sequence[str] | None = None,
    repeats: int = 10,
    batch_size: int = 64,
) -> AttackPreview:
    """Estimate passes, operations, memory and time of `evaluate` before it is begun.

    The model is called as `evaluate` calls it at first, to detect randomness, and evaluates one
    batch, with a gradient and without.

    Args:
        model: Module or estimator to attack.
        data: Pairs of an image and its class.
        attacks: Sequence of attacks or of pairs of a name and an attack.
        indices: Indices of the images; None: all.
        noise: Noise of the defence, "fixed" or "fresh"; None: the model's own setting.
        gradients: Ways of taking gradients; None: all that the defence has.
        repeats: Number of later evaluations of a randomised model.
        batch_size: Number of images attacked at once.

    Raises:
        InputError: There are no images, or the model or an attack cannot be used.

    Example:
        >>> from art_denoised import PGD
        >>> from art_denoised.data import load_data
        >>> from art_denoised.demo import digits_classifier
        >>> cost = preview_attack(
        ...     digits_classifier(), load_data("digits"), [PGD(0.1, steps=9)], indices=range(20)
        ... )
        >>> cost.nfe == 20 * (2 + 10 + 1), cost.unknown
        (True, ())
    """
    images = Chosen(data, indices)
    if not images.whole:
        raise InputError("there are no images; give at least one")
    x, _ = images.stack(images.whole[: checks.count("batch_size", batch_size)])
    target = Target(model, x[:LOOKED], noise=noise, repeats=repeats, seed=0, batch_size=batch_size)
    used, x = list(columns(attacks, target.gradients(gradients))), x.to(target.device)
    module = target.module
    with target.as_asked(), target.session(0), torch.no_grad():
        forward, seconds = forward_cost(module, x), _seconds(module, x)
    nfe = target.repeats if target.randomised else 2  # without attack
    flop, time_each, held = nfe * forward.flop, nfe * seconds, forward.memory(len(x))
    unknown = []
    for column in used:
        passes, seeing = getattr(column.attack, "nfe", None), column.gradient != "none"
        if passes is None:
            unknown.append(column.name)
            continue
        one, each = forward, seconds
        if seeing:
            with target.as_asked(), target.session(0), target.taking(column.gradient):
                one, each = gradient_cost(module, x), _seconds(_gradient(module), x)
        later = target.repeats  # evaluations of the attacked images
        nfe += passes + later
        flop += passes * one.flop + later * forward.flop
        time_each += passes * each + later * seconds
        held = max(held, one.memory(len(x)))
    number = len(images.indices)
    return AttackPreview(
        images=number,
        nfe=number * nfe,
        unknown=tuple(unknown),
        flop=number * flop,
        seconds=number * time_each,
        memory=held,
    )


def _gradient(module: Callable[[Images], Any]) -> Callable[[Images], object]:
    def call(x: Images) -> object:
        with torch.enable_grad():
            leaf = x.detach().clone().requires_grad_()
            output = module(leaf)
            return torch.autograd.grad(getattr(output, "logits", output).float().sum(), leaf)

    return call


def _seconds(function: Callable[[Images], object], x: Images) -> float:
    """Return the time of a pass for each image of a batch; a first pass warms up."""
    for _ in range(2):
        begin = time.perf_counter()
        function(x)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
    return (time.perf_counter() - begin) / len(x)
